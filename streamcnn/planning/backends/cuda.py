"""CUDA cards: the caching allocator, and convolutions' workspace in it."""

from __future__ import annotations

from dataclasses import dataclass

from streamcnn.plan.level_bytes import HeldBytes, Ints, LevelBytes
from streamcnn.plan.storage import MemoryTerm
from streamcnn.planning.backends.base import Backend, Fragmentation

KEEPING = Fragmentation(fixed=3 * 2**24, per_stage=5 * 2**18, held=1.25)
"""The caching allocator keeps freed blocks, rounds sizes up and splits blocks that are too large."""
RETURNING = Fragmentation(step_percent=10)
"""When memory is short, it gives kept blocks back, and only a step's own remain."""


@dataclass(frozen=True, kw_only=True)
class CudaBackend(Backend):
    """A card's memory. What context, kernels and handles take is measured, or assumed, and reserved before a
    pass.

    A convolution's workspace is what is declared of it, copies of operands, weights and result: cuDNN takes
    such copies for its layouts, and scratch memory for its faster algorithms, from the caching allocator.
    Neither that nor what the allocator loses was measured on its own: the figures are those with which the
    runs on an H100 stayed within their budgets.
    """

    runtime_bytes: int = 3 * 2**23
    """Kernels that are loaded late, and scratch memory of the library of matrix products."""
    reusable_bytes: int = 2**25
    """Blocks of this size and more get segments of their own, which they fill."""
    keeping: Fragmentation = KEEPING
    returning: Fragmentation = RETURNING
    fragmentation: str = "rounding and fragmentation of the caching allocator"
    has_choice: bool = False
    overlaps: bool = True
    runs_ahead: bool = True
    fuses_norms: bool = True
    fuses_attention: bool = True
    prefers_bands: bool = True
    """Whole rows of an image whose channels lie beside each other have no gaps in memory: kernels read them
    at full speed where they are, and no copy is made of them."""
    most_elements: int = 2**31 - 1
    """Past it streamcnn's kernels for norms are not called, ATen's go position by position, cuDNN has few
    algorithms, and others fail: bilinear upsampling of channels_last maps did so (pytorch#185788)."""

    def step_terms(self, num_kernels: int, num_products: int) -> tuple[MemoryTerm, ...]:
        """Nothing that comes and goes with a step."""
        return ()

    def kept(self, num_kernels: Ints, *, training: bool) -> HeldBytes:
        """Nothing: memory for kernels is reserved before a pass."""
        nothing = LevelBytes.of(len(num_kernels))
        return HeldBytes(nothing, nothing, nothing)
