"""Where stored maps live, how large they are, and how long they are held."""

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
    """A stored map: where, how large, and when it can go."""

    tier: Tier
    gradient_tier: Tier
    nbytes: int
    kept: bool
    """Whether the backward pass needs it, or who reads the results of a forward pass."""
    last_reader: int
    """Level of the last phase or segment that reads it in the forward pass."""
    tile: tuple[int, int]
    """Fewest rows and columns by which it is written or read, a hint for chunking."""
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
