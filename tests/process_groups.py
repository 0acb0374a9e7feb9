"""Groups of two processes in PyTorch's distributed package."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import distributed as dist

TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
"""The command that starts a group of two processes."""


def prepare_commands(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let commands in this process and in others find factories in ``folder``, and use one thread each."""
    monkeypatch.syspath_prepend(folder)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(folder), str(Path(__file__).parents[1])]))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


def write_class_folders(folder: Path, splits: tuple[str, str]) -> None:
    """Write three dark and three bright images (34, 30) for each split."""
    draw = np.random.default_rng(0)
    for split, name, index in product(splits, ("dark", "bright"), range(3)):
        path = folder / split / name / f"{index}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = draw.integers(0, 120, (34, 30, 3)) + 120 * (name == "bright")
        Image.fromarray(pixels.astype(np.uint8)).save(path)


def run_in_group(rank: int, work: Callable[..., Any], folder: str, arguments: tuple[Any, ...]) -> None:
    """Run ``work`` as one of two processes, and leave its result in ``folder``."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/group", rank=rank, world_size=2)
    try:
        torch.save(work(rank, *arguments), f"{folder}/{rank}.pt")
    finally:
        dist.destroy_process_group()


def in_two_processes(work: Callable[..., Any], folder: Path, *arguments: Any) -> list[Any]:
    """The results of ``work`` in each process of a group of two, given its rank and the arguments."""
    torch.multiprocessing.spawn(run_in_group, (work, str(folder), arguments), nprocs=2)
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(2)]
