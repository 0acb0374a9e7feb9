"""Disks: whether a folder is on a disk or in memory, and one error for all failures to write a file."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from streamcnn.errors import CannotWrite, StreamError
from streamcnn.support.units import format_bytes

_FULL = (errno.ENOSPC, errno.EDQUOT)
_REFUSED = (errno.EACCES, errno.EPERM, errno.EROFS)
_IN_MEMORY = ("tmpfs", "ramfs")
"""File systems whose files are in RAM only."""


@contextmanager
def writing(
    path: Path, *, needed: int | None = None, at_most: bool = False, kept: str = ""
) -> Iterator[None]:
    """Turn an `OSError` in the block, which writes ``path``, into `CannotWrite`.

    Parameters
    ----------
    path
        A file or a folder, which need not exist.
    needed
        Bytes to write, if known.
    at_most
        Whether ``needed`` is an upper bound, as for compressed data.
    kept
        A sentence, without its full stop, for the error's text: what has stayed as it was.

    Raises
    ------
    CannotWrite
        For an `OSError`. The text names the path, the reason and the remedy; for a full disk, also the disk,
        the bytes needed and the bytes free.
    """
    try:
        yield
    except StreamError:
        raise
    except OSError as error:
        size = "" if needed is None else f"{'up to ' * at_most}{format_bytes(needed)} needed, "
        found = CannotWrite(f"cannot write {path}: {_reason(path, error, size)}{kept and f'. {kept}'}")
        found.errno = error.errno
        raise found from error


def is_full(error: OSError) -> bool:
    """Whether an error says that a disk, or the user's quota on it, is full."""
    return error.errno in _FULL


def _reason(path: Path, error: OSError, size: str) -> str:
    text = error.strerror or str(error)
    if is_full(error):
        disk = mount_point(path)
        free = format_bytes(shutil.disk_usage(disk).free)
        return (
            f"the disk at {disk} is full ({text}): {size}{free} free; make room there and give the same "
            "command again"
        )
    if error.errno == errno.EFBIG:
        return f"it would be larger than a file may be ({text}): {size}raise the limit, as with `ulimit -f`"
    if error.errno in _REFUSED:
        return f"{text}: give a folder that you may write to, on a disk that is not read-only"
    return f"{text}: give a folder that you may write to"


def mount_point(path: Path) -> Path:
    """The mount point of the disk that ``path`` is on, or would be on."""
    place = path.absolute()
    while not os.path.ismount(place) and place != place.parent:
        place = place.parent
    return place


def lies_in_memory(folder: Path, mounts: Path = Path("/proc/self/mountinfo")) -> bool:
    """Whether files in an existing folder are in RAM rather than on a disk; False if unknown.

    Parameters
    ----------
    mounts
        Linux's table of mounts: see proc_pid_mountinfo(5).
    """
    try:
        device = folder.stat().st_dev
        lines = mounts.read_text(errors="replace").splitlines()
    except OSError:
        return False
    number = f"{os.major(device)}:{os.minor(device)}"
    # The type of a file system comes after a hyphen, as the number of fields before it varies.
    kinds = (line.partition(" - ")[2].split(" ")[0] for line in lines if line.split(" ")[2:3] == [number])
    return next(kinds, "") in _IN_MEMORY
