"""Files of finished maps, kept for the next maps on disk.

Allocating a new page of a file takes longer than writing it: some 6 µs on a virtual machine, ten times as
long as writing it again. So the next map takes over a finished map's file, as allocators reuse blocks.
"""

from __future__ import annotations

import itertools
import os
from pathlib import Path
from threading import Lock
from typing import Any

from streamcnn.stores.spill import SpillFolder


class SpareFiles:
    """Spare files in a folder of their own.

    Files and folder are removed on ``close``, on collection and when the interpreter exits. Together with the
    maps on disk, spare files take no more than maps have taken at once. A copy and a forked child start
    without spare files.

    Parameters
    ----------
    parent
        Existing folder to keep them in, on the disk of the maps; a temporary folder of the system's if None.
    """

    def __init__(self, parent: str | os.PathLike[str] | None = None) -> None:
        self.parent = parent
        self._lock = Lock()
        self._numbers = itertools.count()
        self._reset()

    def __reduce__(self) -> tuple[Any, ...]:
        return SpareFiles, (self.parent,)

    def _reset(self) -> None:
        self._process = os.getpid()
        self._folder: SpillFolder | None = None
        self._spare: dict[Path, int] = {}
        self._in_use: dict[Path, int] = {}
        self._most_in_use = 0

    @property
    def nbytes(self) -> int:
        """Bytes of all spare files."""
        with self._lock:
            self._forget_lost()
            return sum(self._spare.values())

    def take(self, path: Path, nbytes: int) -> bool:
        """Move a spare file to ``path``, and return whether there was one.

        The file has at most ``nbytes``, and its content is undefined. Even without a spare file, ``path``
        counts as a file of ``nbytes`` from now on, until it is removed or kept.

        Raises
        ------
        OSError
            If the file cannot be moved.
        """
        with self._lock:
            self._forget_lost()
            found = self._best(nbytes)
            if found is not None:
                size = self._spare.pop(found)
                os.replace(found, path)
                if size > nbytes:
                    os.truncate(path, nbytes)
            self._note_in_use(path, nbytes)
            self._make_room()
            return found is not None

    def keep(self, path: Path) -> None:
        """Keep a file that nobody uses any more.

        Raises
        ------
        OSError
            If the file cannot be moved.
        """
        with self._lock:
            self._forget_lost()
            if self._folder is None or not self._folder.path.exists():
                self._folder = SpillFolder(self.parent)
            spare = self._folder.path / f"spare-{next(self._numbers):06d}"
            os.replace(path, spare)
            self._in_use.pop(path, None)
            self._spare[spare] = spare.stat().st_size

    def close(self) -> None:
        """Remove all spare files."""
        with self._lock:
            self._spare.clear()
            if self._folder is not None:
                self._folder.close()
                self._folder = None

    def _best(self, nbytes: int) -> Path | None:
        """The smallest file that is large enough, or else the largest."""
        large = {path: size for path, size in self._spare.items() if size >= nbytes}
        if large:
            return min(large, key=large.__getitem__)
        return max(self._spare, key=self._spare.__getitem__, default=None)

    def _forget_lost(self) -> None:
        """Forget the files of a parent process, and files removed by others.

        The system, for one, cleans up old temporary files.
        """
        if self._process != os.getpid():
            self._reset()
        self._spare = {path: size for path, size in self._spare.items() if path.exists()}

    def _note_in_use(self, path: Path, nbytes: int) -> None:
        # A collected store has taken its file along.
        self._in_use = {other: size for other, size in self._in_use.items() if other.exists()}
        self._in_use[path] = nbytes
        self._most_in_use = max(self._most_in_use, sum(self._in_use.values()))

    def _make_room(self) -> None:
        """Cut spare files, the smallest first, until all files take no more than maps have taken at once."""
        excess = sum(self._spare.values()) + sum(self._in_use.values()) - self._most_in_use
        for path, size in sorted(self._spare.items(), key=lambda item: item[1]):
            if excess <= 0:
                return
            if size > excess:
                os.truncate(path, size - excess)
                self._spare[path] = size - excess
            else:
                path.unlink()
                del self._spare[path]
            excess -= size
