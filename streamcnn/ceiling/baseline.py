"""The baseline: memory that the process holds at one moment, above which an update's host memory counts."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from streamcnn.ceiling.allocator import (
    cache_thread_stack,
    free_matrix_buffers,
    start_thread_pool,
    trim_heap,
)
from streamcnn.ceiling.heap import HoleFiller, free_heap_bytes
from streamcnn.ceiling.kept_blocks import KeptBlocks, free_block_bytes, resident_free_block_bytes
from streamcnn.ceiling.process import status_bytes, untouched_code_bytes

HEAP_LEAST = 2**24
"""Bytes that a heap may hold free under any budget."""


@dataclass(frozen=True, slots=True)
class Baseline:
    """Memory that the process held at one moment; the ceilings of one update count from it.

    The forward and backward pass of an update share a baseline, since what the forward pass keeps counts
    towards the backward pass's budget too.
    """

    data_bytes: int | None
    """Data segment without free kept blocks and untouched compiled code; None if unknown."""
    resident_bytes: int | None
    """Resident memory without free kept blocks; None if unknown."""
    free_bytes: int = 0
    """Bytes of the data segment that the heap holds free and will hand out again."""
    file_bytes: int | None = None
    """Resident pages of files, library code above all; None if unknown."""
    holes: HoleFiller | None = field(default=None, repr=False, compare=False)
    """Keeps the heap's larger holes from being handed out, as long as the baseline is referenced."""
    others: dict[object, int] = field(default_factory=dict, repr=False, compare=False)
    """By another baseline's ``key``: bytes that its thread's updates may take under their own ceiling."""
    key: object = field(default_factory=object, repr=False, compare=False)
    passes: list[KeptBlocks] = field(default_factory=list, repr=False, compare=False)
    """The kept blocks of the update's latest direction, if any: the next direction takes over its tensors."""

    @classmethod
    def now(cls, *, fill_holes: bool = True) -> Baseline:
        """Measure the process now, after starting PyTorch's threads and giving free memory back.

        Parameters
        ----------
        fill_holes
            Whether to leave the calling thread's heap without large holes, as in a fresh process.
        """
        start_thread_pool()
        cache_thread_stack()
        free_matrix_buffers()
        trim_heap()
        holes = HoleFiller(HEAP_LEAST) if fill_holes else None
        data, resident = status_bytes("VmData"), status_bytes("VmRSS")
        return cls(
            None if data is None else data - free_block_bytes() - untouched_code_bytes(),
            None if resident is None else resident - resident_free_block_bytes(),
            free_heap_bytes(),
            status_bytes("RssFile"),
            holes,
        )

    def less(self, nbytes: int) -> Baseline:
        """The baseline without ``nbytes`` of resident memory, which then count as taken since."""
        data, resident = self.data_bytes, self.resident_bytes
        return replace(
            self,
            data_bytes=None if data is None else data - nbytes,
            resident_bytes=None if resident is None else resident - nbytes,
        )
