"""This process's memory according to the kernel; the only module that reads it."""

from __future__ import annotations

import ctypes
import mmap
import os
from io import FileIO
from pathlib import Path

from streamcnn.ceiling.allocator import libc

STATUS = Path("/proc/self/status")
_MAPS = Path("/proc/self/maps")
_PAGES = "/proc/self/statm"
_WRITABLE_CODE = b" rwxp "


def resident_bytes() -> tuple[int, int] | None:
    """Resident memory now and its high-water mark, in bytes; None if the kernel does not say."""
    resident, mark = status_bytes("VmRSS"), status_bytes("VmHWM")
    return None if resident is None or mark is None else (resident, mark)


def status_bytes(name: str) -> int | None:
    """One counter of ``/proc/self/status`` in bytes; None where there is none."""
    try:
        lines = STATUS.read_text().splitlines()
    except FileNotFoundError:
        return None
    for line in lines:
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024
    return None


class ResidentFile:
    """Resident memory, read from a file that is kept open, since opening it takes longer than reading it."""

    def __init__(self) -> None:
        self._file = FileIO(_PAGES)

    def read(self) -> int:
        """Resident memory now, in bytes."""
        # At an offset, since several threads read the file.
        return int(os.pread(self._file.fileno(), 128, 0).split()[1]) * mmap.PAGESIZE

    def close(self) -> None:
        """Close the file. Closing again does nothing."""
        self._file.close()


def untouched_code_bytes() -> int:
    """Bytes of address space of code that was compiled in this process and never touched."""
    nbytes = 0
    *mappings, _ = _MAPS.read_bytes().split(_WRITABLE_CODE)
    for mapping in mappings:
        span = mapping[mapping.rfind(b"\n") + 1 :]
        if b" " not in span:  # else the flags were part of a file's path
            start, end = (int(edge, 16) for edge in span.split(b"-"))
            nbytes += _absent_bytes(start, end - start)
    return nbytes


def _absent_bytes(start: int, nbytes: int) -> int:
    """Bytes of a mapping that are not resident; 0 if the kernel does not say."""
    pages = ctypes.create_string_buffer(-(-nbytes // mmap.PAGESIZE))
    library = libc()
    if library is None or library.mincore(ctypes.c_void_p(start), ctypes.c_size_t(nbytes), pages):
        # The mapping may also have gone since it was listed.
        return 0
    return pages.raw.count(b"\0") * mmap.PAGESIZE
