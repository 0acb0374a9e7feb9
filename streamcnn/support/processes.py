"""Processes that work together in the default group of ``torch.distributed``."""

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
"""Time to wait for processes with larger images; one that has died is noticed at once."""


def all_processes() -> Group | None:
    """The default group of processes; None if this process works alone."""
    if not dist.is_available() or not dist.is_initialized():
        return None
    world = dist.group.WORLD
    assert world is not None
    return world.group_name, world.size()


def processes_here() -> int:
    """Number of processes that ``torchrun`` has started on this machine, including this one."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def join() -> None:
    """Join the other processes of ``torchrun`` in a group, if there are any."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1 or "RANK" not in os.environ:
        return
    # Imported while there is a group, its functions would keep that as a default, even after `leave`, and
    # threads of the group that are alive when the interpreter exits may abort the process.
    import_module("torch.distributed.nn")
    has_gpus = torch.cuda.is_available() and dist.is_nccl_available()
    dist.init_process_group("cpu:gloo,cuda:nccl" if has_gpus else "gloo", timeout=_WAIT)
    atexit.register(leave)  # after an error too, as threads of the group may abort the process


def leave() -> None:
    """Leave the group, if there is one."""
    if all_processes() is not None:
        dist.destroy_process_group()


def await_end() -> None:
    """Wait until another process has ended."""
    with suppress(RuntimeError):
        dist.all_gather_object([None] * dist.get_world_size(), None)


def take_own_gpu(device: str) -> None:
    """Let ``"cuda"`` mean the GPU with this process's local number, if there are several processes.

    Raises
    ------
    ValueError
        If there is no such GPU, or ``device`` names a particular one, which all processes would take.
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
