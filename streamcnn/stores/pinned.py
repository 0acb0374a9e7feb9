"""Pinned host memory, kept from maps that are done with for the next ones.

Pinning takes the kernel some 0.3 s a GiB, many times what filling the memory takes. PyTorch's own allocator
of pinned memory keeps it too, but rounds up to a power of two: half of a host's RAM may be lost to that.
"""

from __future__ import annotations

import math
import mmap
import sys
from collections.abc import Callable
from contextlib import suppress
from threading import Lock
from typing import Any
from weakref import WeakSet, finalize

import torch
from torch import Tensor

Pin = Callable[[Tensor], Callable[[], None] | None]
"""Pins memory and returns what undoes that; None if it cannot be pinned."""

_LARGEST_WASTE = 1.25
"""The largest block for a map, and the most memory held, over what maps need."""
HUGE_PAGE_BYTES = 2**25
"""Mappings of at least this many bytes ask for 2 MiB pages, which are zeroed and mapped in fewer steps."""

_WIPE_ON_FORK = 18
"""Linux's ``MADV_WIPEONFORK``, which the module mmap does not name."""


class PinnedBlock:
    """Host memory of its own, pinned if that was possible, until it is collected."""

    def __init__(self, nbytes: int, pin: Pin) -> None:
        self.memory = fresh_memory(nbytes, inherited=False)
        undo = pin(self.memory)
        self.is_pinned = undo is not None
        if undo is not None:
            # The memory is known to the finalizer, and so outlives the pinning.
            finalize(self, _unpin, undo, self.memory).atexit = False

    @property
    def nbytes(self) -> int:
        """Its size."""
        return self.memory.nbytes


def _unpin(undo: Callable[[], None], memory: Tensor) -> None:
    del memory
    undo()


class SparePinned:
    """Spare blocks. Together with those in use they take at most a quarter more than maps ever took at once.

    A copy starts without any.
    """

    def __init__(self) -> None:
        self._lock = Lock()
        self._spare: list[PinnedBlock] = []
        self._in_use = WeakSet[PinnedBlock]()
        """Weak, since a store that is collected takes its block along."""
        self._most_in_use = 0

    def __reduce__(self) -> tuple[Any, ...]:
        return SparePinned, ()

    @property
    def nbytes(self) -> int:
        """Bytes of all spare blocks; a diagnostic."""
        with self._lock:
            return sum(block.nbytes for block in self._spare)

    def take(self, nbytes: int, pin: Pin) -> PinnedBlock:
        """A block of ``nbytes`` or a little more; what is in it is undefined."""
        with self._lock:
            fitting = [b for b in self._spare if nbytes <= b.nbytes <= _LARGEST_WASTE * nbytes]
            found = min(fitting, key=lambda block: block.nbytes, default=None)
            if found is not None:
                self._spare.remove(found)
            else:
                self._make_room(nbytes)
                found = PinnedBlock(nbytes, pin)
            self._in_use.add(found)
            self._most_in_use = max(self._most_in_use, sum(each.nbytes for each in self._in_use))
        return found

    def keep(self, block: PinnedBlock) -> None:
        """Keep a block that nobody uses any more."""
        with self._lock:
            self._in_use.discard(block)
            self._spare.append(block)

    def close(self) -> None:
        """Drop all spare blocks."""
        with self._lock:
            self._spare.clear()

    def _make_room(self, nbytes: int) -> None:
        """Drop spare blocks, the smallest first, until a new one of ``nbytes`` fits within the bound."""
        used = sum(block.nbytes for block in self._in_use) + nbytes
        excess = sum(block.nbytes for block in self._spare) + used
        excess -= int(_LARGEST_WASTE * max(self._most_in_use, used))
        self._spare.sort(key=lambda block: block.nbytes)
        while excess > 0 and self._spare:
            excess -= self._spare.pop(0).nbytes


def fresh_memory(nbytes: int, *, inherited: bool = True) -> Tensor:
    """Bytes of host memory: zeros whose pages are not touched yet, in a mapping of their own.

    ``torch.zeros`` writes every page (1.07 GB became resident for a tensor of 2**30 bytes); pages fresh
    from the kernel are zero. A map taken from the C library's heap would outlive tiles' tensors around
    it and leave holes. The mapping is private, so that a limit on the data segment counts it.

    Parameters
    ----------
    inherited
        Whether a forked child sees what is in it; otherwise it sees zeros. When a process forks, Linux copies
        every pinned page; before 5.9 it gave a new page to whoever wrote first, and a GPU kept the old one.
    """
    if not hasattr(mmap, "MAP_ANONYMOUS"):
        return torch.zeros(nbytes, dtype=torch.uint8)
    buffer = mmap.mmap(-1, max(nbytes, 1), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE") and nbytes >= HUGE_PAGE_BYTES:
        buffer.madvise(mmap.MADV_HUGEPAGE)
    if not inherited and sys.platform == "linux":
        with suppress(OSError):
            buffer.madvise(_WIPE_ON_FORK)
    return torch.frombuffer(buffer, dtype=torch.uint8, count=nbytes)


def shaped(memory: Tensor, shape: tuple[int, ...], dtype: torch.dtype, order: torch.memory_format) -> Tensor:
    """The first bytes of ``memory`` as a map."""
    flat = memory[: math.prod(shape) * dtype.itemsize].view(dtype)
    if order is not torch.channels_last:
        return flat.view(shape)
    n, c, h, w = shape
    return flat.view(n, h, w, c).permute(0, 3, 1, 2)
