"""One process at a time in a run's folder.

The lock is the operating system's, on an open file: it is gone once its process has ended, however it ended,
and after a restart of the machine. On a shared disk the file server holds the locks; it frees those of a
machine that no longer answers.
"""

from __future__ import annotations

import errno
import os
import platform
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout

from streamcnn.errors import CannotWrite, RunInUse, RunMismatch
from streamcnn.support.atomic import replace_file
from streamcnn.support.disk import writing
from streamcnn.support.documents import read_within
from streamcnn.support.text import printable

LOCK = "run.lock"
"""Locked while a process trains."""
HOLDER = "run.pid"
"""Who does. A file of its own, since on some systems a locked file can be read by its holder alone."""
_HOLDER_BYTES = 2**12
_WITHOUT_LOCKS = (errno.ENOLCK, errno.EOPNOTSUPP)


@contextmanager
def holding(folder: Path) -> Iterator[None]:
    """Keep other processes from training in ``folder`` during the block.

    A missing folder is created, and removed again if the block leaves nothing in it.

    Raises
    ------
    RunInUse
        If another process trains there; the text names it.
    CannotWrite
        If the folder may not be written to, or is on a disk without locks.
    """
    with writing(folder):
        is_new = not folder.exists()
        folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / LOCK, blocking=False)
    _acquire(lock, folder)
    try:
        _warn_of_other_machine(folder)
        with writing(folder / HOLDER):
            replace_file(folder / HOLDER, f"{os.getpid()} {platform.node()}\n")
        yield
    finally:
        try:
            _remove_traces(folder, is_new=is_new)
        finally:
            lock.release()


def _acquire(lock: FileLock, folder: Path) -> None:
    with writing(folder / LOCK):
        try:
            lock.acquire()
        except Timeout:
            advice = f"; if it is dead, remove {LOCK} there" if _may_outlive(folder / LOCK) else ""
            raise RunInUse(
                f"{folder} is in use: {_described(folder)} trains there; wait until it is over, stop it, or "
                f"give another folder{advice}"
            ) from None
        except OSError as error:
            if error.errno not in _WITHOUT_LOCKS:
                raise
            raise CannotWrite(
                f"cannot lock {folder / LOCK}: {error.strerror}: give a folder on a disk that has file locks"
            ) from error


def _may_outlive(lock: Path) -> bool:
    """Whether a lock may outlive its process.

    Where the file system has no locks, the lock is a file that names its holder; elsewhere the file is empty.
    """
    with suppress(OSError):
        return lock.stat().st_size > 0
    return False


def _remove_traces(folder: Path, *, is_new: bool) -> None:
    with writing(folder):
        (folder / HOLDER).unlink(missing_ok=True)
        # While it is still locked, so that no other process can have locked it.
        if is_new and os.listdir(folder) == [LOCK]:
            (folder / LOCK).unlink()
            folder.rmdir()


def _warn_of_other_machine(folder: Path) -> None:
    """Warn that another machine's process is taken for dead: its lock may be known on that machine alone."""
    holder = _holder(folder)
    if holder is not None and holder[1] != platform.node():
        warnings.warn(
            f"{_described(folder)} has not ended its run in {folder}, and its lock there is free: it is "
            "taken for dead; if it is not, the disk's locks do not reach over machines, and two runs mix",
            stacklevel=4,
        )


def _described(folder: Path) -> str:
    """A text that names the process that holds the lock, or was killed while it held it."""
    holder = _holder(folder)
    if holder is None:  # it has only just begun
        return "another process"
    pid, host = holder
    return f"process {pid} on {host}"


def _holder(folder: Path) -> tuple[str, str] | None:
    """The process that a run's folder names as its trainer, and that process's machine."""
    try:
        content = read_within(folder, folder / HOLDER, error=RunMismatch, most_bytes=_HOLDER_BYTES)
    except FileNotFoundError:
        return None
    pid, _, host = printable(content.decode(errors="replace").strip()).partition(" ")
    return pid, host
