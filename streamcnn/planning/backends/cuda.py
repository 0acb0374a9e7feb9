"""The backend of CUDA cards: the caching allocator, and convolutions' workspace in it."""

from __future__ import annotations

from dataclasses import dataclass

from streamcnn.plan.level_bytes import HeldBytes, Ints, LevelBytes
from streamcnn.plan.storage import MemoryTerm
from streamcnn.planning.backends.base import Backend, Fragmentation

KEEPING = Fragmentation(fixed=3 * 2**24, per_stage=5 * 2**18, held=1.25)
"""Loss where the caching allocator keeps freed blocks, rounds sizes up and splits blocks too large."""
RETURNING = Fragmentation(step_percent=10)
"""Loss where memory is short, so that the allocator gives kept blocks back and only a step's own remain."""


@dataclass(frozen=True, kw_only=True)
class CudaBackend(Backend):
    """A card's memory. Bytes for context, kernels and handles are measured or assumed, and reserved before a
    pass.

    A convolution's workspace is what its declared cost says: copies of operands, weights and result. cuDNN
    takes such copies for its layouts, and scratch memory for its faster algorithms, from the caching
    allocator. Neither the workspace nor the allocator's loss was measured on its own: with these figures the
    runs on an H100 stayed within their budgets.
    """

    runtime_bytes: int = 3 * 2**23
    """Bytes for kernels that are loaded late, and for scratch memory of the library of matrix products."""
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
    """In ``channels_last``, full rows of an image have no gaps in memory, so kernels read them in place at
    full speed, without a copy."""
    most_elements: int = 2**31 - 1
    """For larger maps streamcnn's kernels for norms are not called, ATen's go position by position, cuDNN has
    few algorithms, and others fail, as bilinear upsampling of channels_last maps did (pytorch#185788)."""

    def step_terms(self, num_kernels: int, num_products: int) -> tuple[MemoryTerm, ...]:
        """No terms: no memory of kernels comes and goes with a step."""
        return ()

    def kept(self, num_kernels: Ints, *, training: bool) -> HeldBytes:
        """No bytes: memory for kernels is reserved before a pass."""
        nothing = LevelBytes.of(len(num_kernels))
        return HeldBytes(nothing, nothing, nothing)
