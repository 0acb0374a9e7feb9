"""Tiers, sizes and lifetimes of stored maps."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum


class Tier(StrEnum):
    """Storage tiers: where a stored map lives, the fastest first."""

    MEMORY = "memory"
    """The compute device's memory."""
    HOST = "host"
    """Host RAM, where that is not the compute device's memory."""
    DISK = "disk"
    """A chunked zarr array."""


@dataclass(frozen=True, slots=True)
class StorePlan:
    """The tier, size and lifetime of a stored map."""

    tier: Tier
    gradient_tier: Tier
    nbytes: int
    kept: bool
    """Whether it stays after its last forward reader, for the backward pass or as a result of the model."""
    last_reader: int
    """Level of the last phase or segment that reads it in the forward pass."""
    tile: tuple[int, int]
    """Fewest rows and columns of a region that is written or read; a hint for chunking."""
    rematerialised: int | None = None
    """Level before whose backward phase it is computed again, if it is dropped after its last forward reader
    and the backward pass needs it."""


OUTPUTS = "outputs in the loss"
"""Name of the term for the model's outputs, which the caller holds whole to compute the loss."""


@dataclass(frozen=True, slots=True)
class MemoryTerm:
    """One named term of the projected bytes."""

    name: str
    nbytes: int
