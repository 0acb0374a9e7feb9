"""Measure what the C library's heap holds free, and keep a pass from taking it.

In a process that has run plain PyTorch the heap may hold a gigabyte free, in holes. Blocks of any size then
come from there. The kernel is not asked, so it refuses nothing; and freed blocks stay resident, so tiles'
tensors of many sizes spread over all of it. With the holes filled, a pass finds the heap of a fresh process.
"""

from __future__ import annotations

import ctypes
import re
from collections import deque
from weakref import finalize

from streamcnn.ceiling.allocator import libc, set_mmap_threshold

LEAST_HOLE = 2**18
"""Bytes of the smallest hole that is filled: smaller blocks come from the heap in a fresh process too."""
_STEP = 8
"""A block that fits into no hole is tried again, smaller by one part in this many."""
_IS_MMAPPED = 2
"""The flag in the word before a block of glibc's that did not come from the heap."""
_WORD = ctypes.sizeof(ctypes.c_size_t)


def free_heap_bytes() -> int:
    """Bytes that the main heap holds free and will hand out without asking the kernel; 0 if unknown.

    The heaps that glibc gives to other threads are left out: this thread cannot take from them, and those
    threads need what they hold free for their own work, such as decoding chunks.
    """
    library = libc()
    if library is None:
        return 0
    return _free_in(_malloc_info(library).partition("</heap>")[0])


class HoleFiller:
    """Takes the holes of the calling thread's heap until it is dropped.

    The blocks are never written to, so their pages stay with the kernel, but for one or two of each.

    Parameters
    ----------
    at_least
        Bytes that the heap must hold free for anything to be done.
    """

    def __init__(self, at_least: int = 0) -> None:
        self._blocks: list[int] = []
        library = libc()
        if library is None:
            return
        # No Python code, which an interrupt could end: errors in finalizers are lost.
        finalize(self, deque[None](maxlen=0).extend, map(library.free, self._blocks)).atexit = False
        free = _free_in(_malloc_info(library).rpartition("</heap>")[2])
        if free >= max(at_least, LEAST_HOLE) and set_mmap_threshold():
            self._fill(library, free)

    @property
    def nbytes(self) -> int:
        """Bytes of the holes that are taken; a diagnostic."""
        return sum(_header(block) & ~7 for block in list(self._blocks))

    def _fill(self, library: ctypes.CDLL, size: int) -> None:
        """Take every hole of ``LEAST_HOLE`` and more, the largest first; none is larger than ``size``."""
        while size >= LEAST_HOLE:
            self._blocks.append(library.malloc(ctypes.c_size_t(size - _WORD)) or 0)
            if not self._blocks[-1] or _header(self._blocks[-1]) & _IS_MMAPPED:
                # No hole is that large.
                library.free(self._blocks.pop())
                size -= max(16, size // _STEP // 16 * 16)


def _header(block: int) -> int:
    """The word before a block: its size, and flags in the last three bits."""
    return ctypes.c_size_t.from_address(block - _WORD).value


def _free_in(description: str) -> int:
    """Free bytes according to a part of glibc's description."""
    sizes = re.findall(r'<total type="(?:fast|rest)" count="\d+" size="(\d+)"', description)
    return sum(map(int, sizes))


def _malloc_info(library: ctypes.CDLL) -> str:
    """glibc's description of its heaps in XML, the main one first, all together last; empty if unknown."""
    library.open_memstream.restype = ctypes.c_void_p
    text, size = ctypes.c_void_p(), ctypes.c_size_t()
    stream = ctypes.c_void_p(library.open_memstream(ctypes.byref(text), ctypes.byref(size)))
    if not stream:
        # There is no memory for the text, and glibc would write to a null pointer.
        return ""
    library.malloc_info(0, stream)
    library.fclose(stream)
    try:
        return ctypes.string_at(text.value or 0, size.value).decode()
    finally:
        library.free(text)
