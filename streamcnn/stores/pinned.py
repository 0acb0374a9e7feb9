"""Pinned host memory, kept from finished maps for the next ones.

Pinning takes the kernel some 0.3 s per GiB, many times as long as filling the memory. PyTorch's own allocator
keeps pinned memory too, but rounds up to a power of two, which may waste half of a host's RAM.
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
"""Pins memory and returns a function that undoes that; None if it cannot be pinned."""

_LARGEST_WASTE = 1.25
"""Upper bound of a block's size over its map's, and of all memory held over the most in use at once."""
HUGE_PAGE_BYTES = 2**25
"""Mappings of at least this many bytes ask for 2 MiB pages, which are zeroed and mapped in fewer steps."""

_WIPE_ON_FORK = 18
"""Linux's ``MADV_WIPEONFORK``, which the module mmap does not name."""


class PinnedBlock:
    """A mapping of host memory, pinned if possible, until it is collected."""

    def __init__(self, nbytes: int, pin: Pin) -> None:
        self.memory = fresh_memory(nbytes, inherited=False)
        undo = pin(self.memory)
        self.is_pinned = undo is not None
        self.settle: Callable[[], object] | None = None
        """Waits for the copies that its last map has left under way."""
        if undo is not None:
            # The memory is known to the finalizer, and so outlives the pinning.
            finalize(self, _unpin, undo, self.memory).atexit = False

    @property
    def nbytes(self) -> int:
        """The block's size."""
        return self.memory.nbytes


def _settle(block: PinnedBlock) -> None:
    if block.settle is not None:
        block.settle()
        block.settle = None


def _unpin(undo: Callable[[], None], memory: Tensor) -> None:
    del memory
    undo()


class SparePinned:
    """Spare blocks. With blocks in use they take at most a quarter more than those in use ever took at once.

    A copy starts without spare blocks.
    """

    def __init__(self) -> None:
        self._lock = Lock()
        self._spare: list[PinnedBlock] = []
        self._in_use = WeakSet[PinnedBlock]()
        """Weak references, since a collected store takes its block along."""
        self._most_in_use = 0

    def __reduce__(self) -> tuple[Any, ...]:
        return SparePinned, ()

    @property
    def nbytes(self) -> int:
        """Bytes of all spare blocks; a diagnostic."""
        with self._lock:
            return sum(block.nbytes for block in self._spare)

    def take(self, nbytes: int, pin: Pin) -> PinnedBlock:
        """Take a block of ``nbytes``, or up to a quarter more, with undefined content."""
        # A map may have no elements, but no bytes cannot be pinned.
        nbytes = max(nbytes, 1)
        with self._lock:
            fitting = [b for b in self._spare if nbytes <= b.nbytes <= _LARGEST_WASTE * nbytes]
            found = min(fitting, key=lambda block: block.nbytes, default=None)
            if found is not None:
                self._spare.remove(found)
                _settle(found)
            else:
                self._make_room(nbytes)
                found = PinnedBlock(nbytes, pin)
            self._in_use.add(found)
            self._most_in_use = max(self._most_in_use, sum(each.nbytes for each in self._in_use))
        return found

    def keep(self, block: PinnedBlock, settle: Callable[[], object]) -> None:
        """Keep a block that nobody uses once ``settle`` has returned: whoever takes it waits for that."""
        with self._lock:
            self._in_use.discard(block)
            block.settle = settle
            self._spare.append(block)

    def close(self) -> None:
        """Drop all spare blocks."""
        with self._lock:
            while self._spare:
                self._drop(-1)

    def _drop(self, place: int) -> int:
        """Drop a spare block, and return its size."""
        # Memory must not be unpinned while it is copied.
        _settle(self._spare[place])
        return self._spare.pop(place).nbytes

    def _make_room(self, nbytes: int) -> None:
        """Drop spare blocks, the smallest first, until a new one of ``nbytes`` fits within the bound."""
        used = sum(block.nbytes for block in self._in_use) + nbytes
        excess = sum(block.nbytes for block in self._spare) + used
        excess -= int(_LARGEST_WASTE * max(self._most_in_use, used))
        self._spare.sort(key=lambda block: block.nbytes)
        while excess > 0 and self._spare:
            excess -= self._drop(0)


def fresh_memory(nbytes: int, *, inherited: bool = True) -> Tensor:
    """Zeroed host memory as bytes, in a mapping of its own whose pages are not touched yet.

    ``torch.zeros`` writes every page (1.07 GB became resident for a tensor of 2**30 bytes); pages fresh
    from the kernel are zero. A map in the C library's heap would outlive the tiles' tensors around it and
    leave holes. The mapping is private, so that a limit on the data segment counts it.

    Parameters
    ----------
    inherited
        Whether a forked child sees the memory's content; otherwise it sees zeros. When a process forks, Linux
        copies every pinned page; before 5.9 the process that wrote first got a new page, and a GPU kept the
        old one.
    """
    if not hasattr(mmap, "MAP_ANONYMOUS"):
        return torch.zeros(nbytes, dtype=torch.uint8)
    buffer = mmap.mmap(-1, max(nbytes, 1), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE") and nbytes >= HUGE_PAGE_BYTES:
        _advise(buffer, mmap.MADV_HUGEPAGE)
    if not inherited and sys.platform == "linux":
        _advise(buffer, _WIPE_ON_FORK)
    # A map may have no elements; a mapping and a tensor of it may not have no bytes.
    return torch.frombuffer(buffer, dtype=torch.uint8)[:nbytes]


def _advise(buffer: mmap.mmap, advice: int) -> None:
    """Give the kernel advice on a mapping; one that was built without what is advised refuses it."""
    with suppress(OSError):
        buffer.madvise(advice)


def shaped(memory: Tensor, shape: tuple[int, ...], dtype: torch.dtype, order: torch.memory_format) -> Tensor:
    """The first bytes of ``memory`` as a map."""
    flat = memory[: math.prod(shape) * dtype.itemsize].view(dtype)
    if order is not torch.channels_last:
        return flat.view(shape)
    n, c, h, w = shape
    return flat.view(n, h, w, c).permute(0, 3, 1, 2)
