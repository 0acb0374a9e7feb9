"""Temporary folders that do not outlive their owner."""

from __future__ import annotations

import itertools
import os
import shutil
import tempfile
import warnings
import weakref
from pathlib import Path
from typing import Any, Self

from streamcnn.stores.owners import abandoned, new_name
from streamcnn.support.disk import lies_in_memory

_ON_DISK = Path("/var/tmp")
"""The system's temporary folder for large files, used where the first one lies in memory."""


def spill_place(parent: str | os.PathLike[str] | None) -> Path:
    """The folder in which spill folders are made: ``parent``, or the system's temporary folder if None.

    If the temporary folder lies in memory, which spilling is to save, it is ``/var/tmp`` instead, unless the
    environment names the temporary folder or ``/var/tmp`` cannot be used.
    """
    if parent is not None:
        return Path(parent)
    usual = Path(tempfile.gettempdir())
    is_named = any(os.environ.get(name) for name in ("TMPDIR", "TEMP", "TMP"))
    if is_named or not lies_in_memory(usual) or lies_in_memory(_ON_DISK):
        return usual
    return _ON_DISK if _ON_DISK.is_dir() and os.access(_ON_DISK, os.W_OK | os.X_OK) else usual


def free_bytes(parent: str | os.PathLike[str] | None) -> int:
    """Bytes that can still be written in the folder given by :func:`spill_place`."""
    return shutil.disk_usage(spill_place(parent)).free


def remove_abandoned(parent: str | os.PathLike[str] | None) -> None:
    """Remove the spill folders in ``parent`` that killed processes have left.

    Only folders of this user, this boot of the machine and this PID namespace are removed; see
    ``streamcnn.stores.owners``. A warning names each folder that cannot be removed.
    """
    for folder in abandoned(spill_place(parent)):
        try:
            shutil.rmtree(folder)
        except FileNotFoundError:
            # Another process was faster.
            continue
        except OSError as error:
            warnings.warn(
                f"the spill folder {folder} of a process that was killed cannot be removed ({error}): "
                "remove it by hand",
                RuntimeWarning,
                stacklevel=2,
            )


def remove_with(owner: object, folder: Path) -> weakref.finalize[[Path, int], Any]:
    """A finalizer that removes ``folder`` when called, when ``owner`` is collected or when the process ends.

    A forked child inherits the owner but not the folder: its end removes nothing.
    """
    return weakref.finalize(owner, _remove_tree, folder, os.getpid())


def _remove_tree(folder: Path, owner_process: int) -> None:
    # The folder around it may have been removed before.
    if os.getpid() == owner_process and folder.exists():
        shutil.rmtree(folder)


class SpillFolder:
    """A temporary folder with a sub-folder per store, removed with everything in it.

    It is removed on ``close``, at the end of a ``with`` block, on collection or when the interpreter exits,
    whichever comes first. If a process is killed, the next process that makes a folder in the same place
    removes the killed one's. Everything else there stays.

    Parameters
    ----------
    parent
        Existing folder to create it in; for None see :func:`spill_place`.

    Raises
    ------
    OSError
        If the folder cannot be created.
    """

    def __init__(self, parent: str | os.PathLike[str] | None = None) -> None:
        remove_abandoned(parent)
        self.path = (spill_place(parent) / new_name()).absolute()
        self._owner_process = os.getpid()
        self._numbers = itertools.count()
        # Before the folder is there, so that no interrupt in between leaves it.
        self._remove = remove_with(self, self.path)
        try:
            self.path.mkdir(mode=0o700)
        except OSError:
            self._remove.detach()
            raise

    def new_folder(self) -> Path:
        """A new path inside the folder, at which nothing exists yet.

        Raises
        ------
        ValueError
            If the folder is closed.
        """
        if not self._remove.alive:
            raise ValueError(f"the spill folder {self.path} is closed: it takes no new stores")
        return self.path / f"map-{next(self._numbers):06d}"

    def close(self) -> None:
        """Remove the folder and all in it. Closing again completes an interrupted call."""
        self._remove()
        _remove_tree(self.path, self._owner_process)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()
