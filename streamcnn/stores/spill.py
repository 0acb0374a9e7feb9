"""Temporary folders that do not outlive their owner."""

from __future__ import annotations

import itertools
import os
import shutil
import tempfile
import warnings
import weakref
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from streamcnn.stores.owners import abandoned, new_name
from streamcnn.support.disk import lies_in_memory

_ON_DISK = Path("/var/tmp")
"""The system's other temporary folder, for what is large, where the first one lies in memory."""


def spill_place(parent: str | os.PathLike[str] | None) -> Path:
    """Where folders are made: in ``parent``, or in the system's temporary folder if None.

    That may lie in memory, which spilling is to save: then it is ``/var/tmp``, unless the environment names
    another one or ``/var/tmp`` cannot be used.
    """
    if parent is not None:
        return Path(parent)
    usual = Path(tempfile.gettempdir())
    is_named = any(os.environ.get(name) for name in ("TMPDIR", "TEMP", "TMP"))
    if is_named or not lies_in_memory(usual) or lies_in_memory(_ON_DISK):
        return usual
    return _ON_DISK if _ON_DISK.is_dir() and os.access(_ON_DISK, os.W_OK | os.X_OK) else usual


def free_bytes(parent: str | os.PathLike[str] | None) -> int:
    """Bytes that can still be written where folders are made; see :func:`spill_place`."""
    return shutil.disk_usage(spill_place(parent)).free


def remove_abandoned(parent: str | os.PathLike[str] | None) -> None:
    """Remove the spill folders in ``parent`` that killed processes have left.

    Only those of this user, of this boot of the machine and of this PID namespace; see
    ``streamcnn.stores.owners``. A warning names what cannot be removed.
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
    """Removes ``folder`` when called, at the latest when ``owner`` is collected or the process ends.

    A forked child inherits the owner and not the folder: its end removes nothing.
    """
    return weakref.finalize(owner, _remove_tree, folder, os.getpid())


def _remove_tree(folder: Path, owner_process: int) -> None:
    # The folder around it may have been removed before.
    if os.getpid() == owner_process and folder.exists():
        shutil.rmtree(folder)


class SpillFolder:
    """A temporary folder with a sub-folder per store, removed with everything in it.

    Removed on ``close``, at the end of a ``with`` block, when collected and when the interpreter
    exits, whichever comes first. What a killed process leaves is removed by the next one that makes a
    folder in the same place. Everything else there stays.

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
        """A path inside that was never handed out before; nothing exists there yet.

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

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()
