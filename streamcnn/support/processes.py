"""The processes that work together, as PyTorch's distributed package knows them."""

from __future__ import annotations

import atexit
import os
from contextlib import suppress
from datetime import timedelta
from importlib import import_module

import torch
from torch import distributed as dist

Group = tuple[str, int]
"""Name of a group of processes, and their number."""

_WAIT = timedelta(days=7)
"""For processes with larger images. One that is gone is told at once."""


def all_processes() -> Group | None:
    """The group of all processes, if they are to work together."""
    if not dist.is_available() or not dist.is_initialized():
        return None
    world = dist.group.WORLD
    assert world is not None
    return world.group_name, world.size()


def processes_here() -> int:
    """How many processes ``torchrun`` has started on this machine, this one among them."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def join() -> None:
    """Work together with the processes that ``torchrun`` has started beside this one, if it has."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1 or "RANK" not in os.environ:
        return
    # Its functions have the group of their import as a default, and would keep it beyond `leave`: threads of
    # the group that are alive when the interpreter ends may abort the process.
    import_module("torch.distributed.nn")
    has_gpus = torch.cuda.is_available() and dist.is_nccl_available()
    dist.init_process_group("cpu:gloo,cuda:nccl" if has_gpus else "gloo", timeout=_WAIT)
    atexit.register(leave)  # after an error too, lest threads of the group abort the process


def leave() -> None:
    """Work alone again."""
    if all_processes() is not None:
        dist.destroy_process_group()


def await_end() -> None:
    """Wait until another process has ended."""
    with suppress(RuntimeError):
        dist.all_gather_object([None] * dist.get_world_size(), None)


def take_own_gpu(device: str) -> None:
    """Have ``"cuda"`` mean the GPU that has this process's number on this machine, if there are several.

    Raises
    ------
    ValueError
        If there is no such GPU, or the device is a particular one, which all processes would take.
    """
    if device == "cpu" or all_processes() is None or not torch.cuda.is_available():
        return
    if device != "cuda":
        raise ValueError(
            f"device={device!r}: allowed are cpu and cuda, for of several processes each has a GPU of its own"
        )
    number, present = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
    if number >= present:
        raise ValueError(
            f"device='cuda': this is process {number + 1} of this machine, which has {present} GPUs: start "
            "as many processes as there are GPUs"
        )
    torch.cuda.set_device(number)
