"""Groups of two processes, as PyTorch's distributed package has them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import distributed as dist


def run_in_group(rank: int, work: Callable[..., Any], folder: str, arguments: tuple[Any, ...]) -> None:
    """One of two processes; leaves what ``work`` gives in ``folder``."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/group", rank=rank, world_size=2)
    try:
        torch.save(work(rank, *arguments), f"{folder}/{rank}.pt")
    finally:
        dist.destroy_process_group()


def in_two_processes(work: Callable[..., Any], folder: Path, *arguments: Any) -> list[Any]:
    """What ``work`` gives in each of two processes that are a group, given its rank and the arguments."""
    torch.multiprocessing.spawn(run_in_group, (work, str(folder), arguments), nprocs=2)
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(2)]
