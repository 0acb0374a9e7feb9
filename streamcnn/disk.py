"""One error for whatever keeps a file from being written."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from streamcnn.errors import CannotWrite, StreamError
from streamcnn.units import format_bytes

_FULL = (errno.ENOSPC, errno.EDQUOT)
_REFUSED = (errno.EACCES, errno.EPERM, errno.EROFS)


@contextmanager
def writing(path: Path, *, needed: int | None = None, kept: str = "") -> Iterator[None]:
    """Turn an `OSError` of the block, which writes ``path``, into one `CannotWrite`.

    Parameters
    ----------
    path
        A file or a folder, which need not be there.
    needed
        Bytes that are to be written, if they are known.
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
        found = CannotWrite(f"cannot write {path}: {_reason(path, error, needed)}{kept and f'. {kept}'}")
        found.errno = error.errno
        raise found from error


def _reason(path: Path, error: OSError, needed: int | None) -> str:
    text = error.strerror or str(error)
    size = "" if needed is None else f"{format_bytes(needed)} needed, "
    if error.errno in _FULL:
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
