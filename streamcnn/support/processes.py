"""The processes that work together, as PyTorch's distributed package knows them."""

from __future__ import annotations

from torch import distributed as dist

Group = tuple[str, int]
"""Name of a group of processes, and their number."""


def all_processes() -> Group | None:
    """The group of all processes, if they are to work together."""
    if not dist.is_available() or not dist.is_initialized():
        return None
    world = dist.group.WORLD
    assert world is not None
    return world.group_name, world.size()
