"""What the memory model and the search ask a device: bytes beside tensors, and what freed blocks cost.

A backend answers from constants and counts, and measures nothing. What measures and limits a device's memory
is its ceiling, in ``streamcnn.ceiling``.
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
    """Bytes that an allocator loses to holes, in one of its ways of treating freed blocks."""

    step_percent: int = 0
    """Percent of what a step holds."""
    fixed: int = 0
    """Bytes lost in any case."""
    per_stage: int = 0
    """Bytes for every stage, whose small values stay and divide holes."""
    held: float = 0.0
    """The share of the largest step's reusable blocks, which leave holes at every other moment."""

    def of_step(self, nbytes: Bytes) -> Bytes:
        """What is lost while a step of ``nbytes`` runs."""
        return nbytes * self.step_percent // 100

    def of_pass(self, steps: int, tail: int, num_stages: int) -> int:
        """What is lost throughout a pass, given the bytes of steps and of the tail in reusable blocks."""
        largest = max(int(self.held * steps), tail) if self.held else 0
        return self.fixed + self.per_stage * num_stages + largest


@dataclass(frozen=True, kw_only=True)
class Backend(ABC):
    """One kind of device."""

    runtime_bytes: int
    """Reserved for what the first pass takes beside tensors."""
    reusable_bytes: int
    """Freed blocks below this size may be kept for reuse; others always go back."""
    keeping: Fragmentation
    """What is lost if freed blocks are kept, which is faster."""
    returning: Fragmentation
    """What is lost if freed blocks are given back. That is done if maps are offloaded: memory is short then,
    and what kept blocks lose is known too roughly."""
    fragmentation: str
    """The name of the plan's term for either."""
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
    """Whether the host launches operators while earlier ones run: then only the longer of the two counts."""
    fuses_norms: bool = False
    """Whether a norm is fused with an activation and a sum behind it."""
    fuses_attention: bool
    """Whether attention is a single kernel for all its options."""
    prefers_bands: bool
    """Whether tiles of whole rows are better than square ones with as many pixels."""
    most_elements: int = sys.maxsize
    """Elements of the largest tile of a map that kernels are made for."""

    def workspace(self, cost: Cost, nbytes: CallBytes) -> int:
        """Bytes that a call takes besides operands, parameters and result: those declared."""
        return 0 if cost.workspace is None else cost.workspace(nbytes)

    def backward_workspace(self, cost: Cost, nbytes: CallBytes) -> int:
        """Bytes that its backward pass takes besides those, their gradients and what is saved."""
        declared = cost.backward_workspace
        return self.workspace(cost, nbytes) if declared is None else declared(nbytes)

    @abstractmethod
    def step_terms(self, num_kernels: int, num_products: int) -> tuple[MemoryTerm, ...]:
        """What a step takes for the kernels that it compiles and its matrix products of different sizes."""

    @abstractmethod
    def kept(self, num_kernels: Ints, *, training: bool) -> HeldBytes:
        """What is kept at every moment of a pass.

        Parameters
        ----------
        num_kernels
            By level, how many different convolutions the forward pass runs; each shape counts.
        training
            Whether a backward pass follows.
        """
