"""One process at a time in a run's folder."""

from __future__ import annotations

import os
import platform
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from streamcnn.atomic import replace_file
from streamcnn.disk import writing
from streamcnn.errors import RunInUse

LOCK = "run.lock"
"""Locked while a process trains. The system unlocks it when the process ends, in whatever way."""
HOLDER = "run.pid"
"""Who does. A file of its own, since on some systems a locked file can be read by its holder alone."""


@contextmanager
def holding(folder: Path) -> Iterator[None]:
    """Keep other processes from training in ``folder``, which is there, during the block.

    Raises
    ------
    RunInUse
        If another process does; the text names it.
    CannotWrite
        If the folder may not be written to.
    """
    lock, holder = FileLock(folder / LOCK, blocking=False), folder / HOLDER
    with writing(folder / LOCK):
        try:
            lock.acquire()
        except Timeout:
            raise RunInUse(
                f"{folder} is in use: {_described(holder)} trains there; wait until it is over, stop it, or "
                "give another folder"
            ) from None
    try:
        with writing(holder):
            replace_file(holder, f"{os.getpid()} {platform.node()}\n")
        yield
    finally:
        holder.unlink(missing_ok=True)
        lock.release()


def _described(holder: Path) -> str:
    """The process that holds the lock."""
    try:
        pid, _, host = holder.read_text(errors="replace").strip().partition(" ")
    except FileNotFoundError:  # it has only just begun
        return "another process"
    return f"process {pid}" if host == platform.node() else f"process {pid} on {host}"
