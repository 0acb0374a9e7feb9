"""Disks: whether a folder is on one at all, and one error for whatever keeps a file from being written."""

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
"""File systems whose files are in RAM and nowhere else."""


@contextmanager
def writing(
    path: Path, *, needed: int | None = None, at_most: bool = False, kept: str = ""
) -> Iterator[None]:
    """Turn an `OSError` of the block, which writes ``path``, into one `CannotWrite`.

    Parameters
    ----------
    path
        A file or a folder, which need not be there.
    needed
        Bytes that are to be written, if they are known.
    at_most
        Whether fewer may do, as for what is compressed.
    kept
        What is as it was, for the error's text: a sentence without its full stop.

    Raises
    ------
    CannotWrite
        Naming the path, the reason and what to do; where the disk is full, also the disk, the bytes needed
        and the bytes free.
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
    """Whether it is an error of a disk, or of a share of one, that has no more room."""
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
    """Where the disk is mounted that ``path`` is on, or would be."""
    place = path.absolute()
    while not os.path.ismount(place) and place != place.parent:
        place = place.parent
    return place


def lies_in_memory(folder: Path, mounts: Path = Path("/proc/self/mountinfo")) -> bool:
    """Whether what is written to an existing folder takes RAM, and no disk; False where nothing tells.

    Parameters
    ----------
    mounts
        What is mounted, as Linux tells it: see proc_pid_mountinfo(5).
    """
    try:
        device = folder.stat().st_dev
        lines = mounts.read_text(errors="replace").splitlines()
    except OSError:
        return False
    number = f"{os.major(device)}:{os.minor(device)}"
    # The type of a file system stands behind a hyphen, as there may be any number of fields before.
    kinds = (line.partition(" - ")[2].split(" ")[0] for line in lines if line.split(" ")[2:3] == [number])
    return next(kinds, "") in _IN_MEMORY
