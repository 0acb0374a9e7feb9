"""PyTorch's CPU allocator while a pass runs: blocks are kept from tile to tile, counted, and capped.

glibc gives large blocks back to the kernel when they are freed, which costs page faults, or keeps them in a
heap, which fragments and so costs memory. ``kept_blocks.cpp`` does neither; this module builds, loads and
calls it. Without it everything works, but slower.
"""

from __future__ import annotations

import ctypes
import functools
import os
import sys
import warnings
from pathlib import Path
from weakref import finalize

from streamcnn.ceiling.building import CannotBuild, loaded

VARIABLE = "STREAMCNN_KEEP_BLOCKS"
"""Environment variable: ``0`` leaves PyTorch's allocator as it is."""
SOURCE = Path(__file__).with_name("kept_blocks.cpp")
LEAST_BYTES = 2**16
"""The smallest block that is kept."""


class KeptBlocks:
    """A pass whose tensors come from kept blocks, on the thread that has entered it.

    Parameters
    ----------
    cap
        Bytes that its tensors may hold; None for no limit. Tensors past it are refused with PyTorch's own
        error, before the kernel is asked.
    keep
        Bytes that its tensors and free blocks may hold together; None for no limit. Past it, free blocks go
        back to the kernel.

    Raises
    ------
    RuntimeError
        If ``kept_blocks_available()`` is false.
    """

    def __init__(self, cap: int | None = None, keep: int | None = None) -> None:
        library = _library()
        if library is None:
            raise RuntimeError("blocks cannot be kept here: see kept_blocks_available()")
        self._library = library
        self._pass = ctypes.c_void_p(library.kept_blocks_pass(_bytes(cap), _bytes(keep)))
        if not self._pass:
            raise MemoryError("there is no memory to count a pass's blocks")
        finalize(self, library.kept_blocks_forget, self._pass).atexit = False

    def enter(self) -> None:
        """Take this thread's tensors from kept blocks until ``leave``. A pass is entered once."""
        self._library.kept_blocks_enter(self._pass)

    def keep(self, nbytes: int) -> None:
        """Let tensors and free blocks hold ``nbytes`` together; free blocks beyond that go back now."""
        self._library.kept_blocks_keep(self._pass, _bytes(nbytes))

    def inherit(self, other: KeptBlocks) -> None:
        """From now on, count the tensors of another pass, such as an earlier part of this one, as its own."""
        self._library.kept_blocks_inherit(self._pass, other._pass)

    def leave(self) -> None:
        """End the pass, for good and on all threads. Its tensors live on. Leaving again does nothing."""
        self._library.kept_blocks_leave(self._pass)

    @property
    def peak(self) -> int:
        """The most bytes that the pass's tensors and free blocks held together; a diagnostic."""
        return self._counts()[2]

    def _counts(self) -> tuple[int, int, int]:
        """Bytes in whole pages: the pass's tensors now, their peak, and the peak with free blocks."""
        counts = (ctypes.c_size_t * 3)()
        self._library.kept_blocks_count(self._pass, counts)
        return counts[0], counts[1], counts[2]


def kept_blocks_available() -> bool:
    """Whether blocks can be kept: the variable allows it, and the library exists or could be built now.

    If it cannot be built, a warning says so, once.
    """
    return os.environ.get(VARIABLE) != "0" and _library() is not None


def free_block_bytes() -> int:
    """Bytes of free blocks, which the process holds and hands out again."""
    library = _loaded()
    return 0 if library is None else int(library.kept_blocks_free())


def resident_free_block_bytes() -> int:
    """Bytes of free blocks that were touched, and so are resident."""
    library = _loaded()
    return 0 if library is None else int(library.kept_blocks_resident())


def give_back(*, but: int = 0) -> None:
    """Give free blocks back to the kernel until there are no more than ``but`` bytes of them."""
    library = _loaded()
    if library is not None:
        library.kept_blocks_give_back(but)


def extents() -> list[tuple[int, int, int]]:
    """Extents of the range of addresses: each start, bytes, and state (0 without memory, 1 free, 2 used).

    A diagnostic, to see that they tile the range.
    """
    library = _loaded()
    if library is None:
        return []
    room = library.kept_blocks_extents(None, 0)
    found = (ctypes.c_size_t * (3 * room))()
    count = min(room, library.kept_blocks_extents(found, room))
    return [(found[3 * i], found[3 * i + 1], found[3 * i + 2]) for i in range(count)]


def _bytes(limit: int | None) -> ctypes.c_size_t:
    return ctypes.c_size_t(2**63 - 1 if limit is None else max(0, limit))


def _loaded() -> ctypes.CDLL | None:
    """The library, if it has been loaded."""
    return _library() if _library.cache_info().currsize else None


@functools.cache
def _library() -> ctypes.CDLL | None:
    """Load the library and put it in front of PyTorch's allocator; None if that is not possible."""
    if sys.platform != "linux":
        return None
    try:
        library = loaded(SOURCE)
    except CannotBuild as error:
        _warn(str(error))
        return None
    for name, result, arguments in _FUNCTIONS:
        function = getattr(library, f"kept_blocks_{name}")
        function.restype, function.argtypes = result, arguments
    if not library.kept_blocks_install():
        _warn("there is no room for it in the address space, or PyTorch has another allocator")
        return None
    return library


_POINTER, _SIZE = ctypes.c_void_p, ctypes.c_size_t
_FUNCTIONS = (
    ("install", ctypes.c_int, ()),
    ("pass", _POINTER, (_SIZE, _SIZE)),
    ("enter", None, (_POINTER,)),
    ("keep", None, (_POINTER, _SIZE)),
    ("inherit", None, (_POINTER, _POINTER)),
    ("leave", None, (_POINTER,)),
    ("forget", None, (_POINTER,)),
    ("count", None, (_POINTER, _POINTER)),
    ("free", _SIZE, ()),
    ("resident", _SIZE, ()),
    ("give_back", None, (_SIZE,)),
    ("extents", _SIZE, (_POINTER, _SIZE)),
)


def _warn(reason: str) -> None:
    warnings.warn(
        "streamcnn's allocator, which keeps freed blocks of memory from tile to tile, is not used: "
        f"{reason}. Results and budgets are the same, passes on the CPU take up to twice as long; "
        f"{VARIABLE}=0 in the environment silences this",
        stacklevel=2,
    )
