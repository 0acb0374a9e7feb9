"""The planner's inputs: the pass that a plan is wanted for, and the machine that will run it."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from streamcnn.plan.hardware import HardwareProfile
from streamcnn.plan.reading import NO_READING, BatchCost
from streamcnn.plan.storage import Tier
from streamcnn.planning.backends import Backend


@dataclass(frozen=True, slots=True)
class PassSpec:
    """A pass that a plan is wanted for, whatever the machine."""

    image_shape: tuple[int, int, int, int]
    dtype: torch.dtype
    """Element type of the image."""
    casts: torch.dtype | None
    """Element type to which autocast casts, if it is on."""
    leaves: frozenset[str]
    """States and image whose gradients are wanted; empty for inference."""
    budget: int | None
    """Bytes that the plan and the machine's reserved bytes may take together; None for no ceiling."""
    tile: tuple[int, int] | None = None
    """Extents (h, w) of a tile in input pixels; None leaves them to the planner."""
    target: int | None = None
    """Bytes that the plan may take beside the machine's reserved ones, if the budget allows more."""
    tail: bool = True
    """Whether the last operators may run on whole maps, as a resident tail."""
    keeps_results: bool = False
    """Whether results that are maps stay in stores for the caller to read, and are not made whole."""
    reading: BatchCost = NO_READING
    """Bytes that reading the batch takes of the memory that the budget limits."""

    @property
    def computed_in(self) -> torch.dtype:
        """The element type of most convolutions."""
        return self.casts or self.dtype

    def room(self, reserved: int) -> int | None:
        """Bytes that the plan may take beside ``reserved`` bytes; None for any number."""
        within = None if self.budget is None else self.budget - reserved
        return min((nbytes for nbytes in (within, self.target) if nbytes is not None), default=None)


@dataclass(frozen=True, slots=True)
class OffloadTier:
    """A place for maps that the device's memory has no room for."""

    tier: Tier
    capacity: int | None = None
    """Bytes that the tier has room for; None for any number. On disk these are the most at one time."""
    buffered: int = 0
    """Bytes written to disk that the system buffers in RAM, so that no writer waits for the disk."""


@dataclass(frozen=True, slots=True)
class Machine:
    """The machine that a plan is made for; equal machines have equal plans."""

    hardware: HardwareProfile
    offload_tiers: tuple[OffloadTier, ...]
    """The fastest tier first."""
    reserved: int
    """Bytes of the budget that the device holds before a pass begins, which no plan allocates."""
    backend: Backend

    def with_room_on_disk(self, nbytes: int) -> Machine:
        """The same machine with room for ``nbytes`` bytes of maps on disk at one time."""
        tiers = (
            replace(each, capacity=nbytes) if each.tier is Tier.DISK else each for each in self.offload_tiers
        )
        return replace(self, offload_tiers=tuple(tiers))
