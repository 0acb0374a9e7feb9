"""The interface of backends, which tell the memory model and the search what a device takes beside tensors.

A backend answers from constants and counts, and measures nothing. The device's ceiling, in
``streamcnn.ceiling``, measures and limits its memory.
"""

from __future__ import annotations

import sys
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TypeVar

from streamcnn.graph.costs import CallBytes, Cost
from streamcnn.plan.level_bytes import HeldBytes, Ints
from streamcnn.plan.storage import MemoryTerm

Bytes = TypeVar("Bytes", int, Ints)


@dataclass(frozen=True, slots=True)
class Fragmentation:
    """Bytes that an allocator loses to holes, for one way of treating freed blocks."""

    step_percent: int = 0
    """Percent of the bytes that a step holds."""
    fixed: int = 0
    """Bytes lost in any case."""
    per_stage: int = 0
    """Bytes for every stage, whose small values stay and divide holes."""
    held: float = 0.0
    """The share of the largest step's reusable blocks, which leave holes at every other moment."""

    def of_step(self, nbytes: Bytes) -> Bytes:
        """Bytes lost while a step of ``nbytes`` runs."""
        return nbytes * self.step_percent // 100

    def of_pass(self, steps: int, tail: int, num_stages: int) -> int:
        """Bytes lost throughout a pass, given the bytes of steps and of the tail in reusable blocks."""
        largest = max(int(self.held * steps), tail) if self.held else 0
        return self.fixed + self.per_stage * num_stages + largest


@dataclass(frozen=True, kw_only=True)
class Backend(ABC):
    """One kind of device."""

    runtime_bytes: int
    """Bytes reserved for what the first pass takes beside tensors."""
    reusable_bytes: int
    """Freed blocks below this size may be kept for reuse; others always go back."""
    keeping: Fragmentation
    """Bytes lost if freed blocks are kept, which is faster."""
    returning: Fragmentation
    """Bytes lost if freed blocks are given back, as they are if maps are offloaded: memory is short then, and
    the loss to kept blocks is known too roughly."""
    fragmentation: str
    """The name of the plan's term for lost bytes."""
    has_choice: bool
    """Whether a pass can be told to keep freed blocks or not."""
    keeps_blocks: bool = False
    """Whether freed blocks are kept up to a number of bytes in the plan: they then lose no more than
    ``returning``, and no block comes fresh from the operating system."""
    beside_tensors: frozenset[str] = frozenset()
    """Names of the backend's terms that are no tensors."""
    overlaps: bool = False
    """Whether tiles are moved to and from other tiers while others are computed."""
    runs_ahead: bool = False
    """Whether the host launches operators while earlier ones run. Then only the longer of the two times
    counts."""
    fuses_norms: bool = False
    """Whether a norm is fused with an activation and a sum that follow it."""
    fuses_attention: bool
    """Whether attention is a single kernel for all its options."""
    prefers_bands: bool
    """Whether bands of full rows are better than square tiles with as many pixels."""
    most_elements: int = sys.maxsize
    """Elements of the largest tile of a map that kernels are made for."""

    def workspace(self, cost: Cost, nbytes: CallBytes) -> int:
        """Bytes that a call takes besides operands, parameters and result: those declared and converted."""
        declared = 0 if cost.workspace is None else cost.workspace(nbytes)
        return declared + self.converted(cost, nbytes)

    def backward_workspace(self, cost: Cost, nbytes: CallBytes) -> int:
        """Bytes that a call's backward pass takes besides operands, parameters, result, their gradients and
        saved values."""
        if cost.backward_workspace is None:
            return self.workspace(cost, nbytes)
        return cost.backward_workspace(nbytes) + self.converted(cost, nbytes)

    def converted(self, cost: Cost, nbytes: CallBytes) -> int:
        """Bytes of copies in another element type, which the device's arithmetic needs in each pass: none."""
        return 0

    @abstractmethod
    def step_terms(self, num_kernels: int, num_products: int) -> tuple[MemoryTerm, ...]:
        """Terms of a step for the kernels that it compiles, and for matrix products of different sizes."""

    @abstractmethod
    def kept(self, num_kernels: Ints, *, training: bool) -> HeldBytes:
        """Bytes that libraries keep at every moment of a pass.

        Parameters
        ----------
        num_kernels
            By level, how many different convolutions the forward pass runs, counted once for each shape of
            tile.
        training
            Whether a backward pass follows.
        """
