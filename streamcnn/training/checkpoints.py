"""The checkpoints of a run; they stay usable whenever a crash happens.

No name is used twice, so a file never meets another one's digest. The two newest are kept, so that there is
one to fall back to if a disk damages the other, and the best, whose name is in a file of its own.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from streamcnn.errors import DamagedCheckpoint, RunMismatch
from streamcnn.support.atomic import replace_file
from streamcnn.support.disk import writing
from streamcnn.support.documents import read_within, require_within
from streamcnn.support.text import printable
from streamcnn.training.checkpoint_file import (
    DIGEST,
    TEMPORARY,
    digest_path,
    flush,
    load_checkpoint,
    reading,
    tensor_bytes,
    write_checkpoint,
)

BEST = "best.txt"
"""Names the best checkpoint."""
KEPT = 2
"""Checkpoints kept besides the best."""
_NAME = re.compile(r"save-([0-9]{1,18})-update-([0-9]{1,18})\.pt")
_MARKER_BYTES = 2**12
_DAMAGED = ".damaged"
"""Added to the name of a checkpoint that was passed over, which then counts no more."""


class CheckpointFolder:
    """The checkpoints of one run.

    Parameters
    ----------
    folder
        Created with the first checkpoint. Files of other names in it are left alone.

    Raises
    ------
    RunMismatch
        If the folder is a link that leads out of the folder above it.
    """

    def __init__(self, folder: Path) -> None:
        require_within(folder.parent, folder, error=RunMismatch)
        self.folder = folder

    def next_name(self, update: int) -> str:
        """File name of the next checkpoint, if it is saved after ``update`` updates."""
        serial = 1 + max((_serial(path) for path in self.paths()), default=0)
        return f"save-{serial:06d}-update-{update:08d}.pt"

    def save(self, state: Mapping[str, Any], update: int) -> Path:
        """Write ``state``, as it is after ``update`` updates, and remove checkpoints that are no longer kept.

        Parameters
        ----------
        state
            Tensors, numbers, texts, and lists, tuples and dicts of them.

        Raises
        ------
        CannotWrite
            If there is no room, or the folder may not be written to; earlier checkpoints are as they were.
        """
        with writing(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
        path, before = self.folder / self.next_name(update), self.paths()
        kept = f"The checkpoint before it, {before[0].name}, is as it was" if before else ""
        with writing(path, needed=tensor_bytes(state), kept=kept):
            write_checkpoint(state, path)
            best = self.best()
            for old in self.paths()[KEPT:]:
                if old != best:
                    old.unlink()
                    digest_path(old).unlink(missing_ok=True)
            self._remove_leftovers()
        return path

    def _remove_leftovers(self) -> None:
        """Remove the temporary files of processes that were killed while saving."""
        for left in self.folder.glob(f"save-*{TEMPORARY}"):
            left.unlink()
        for digest in self.folder.glob(f"save-*.pt{DIGEST}"):
            if not digest.with_suffix("").exists():
                digest.unlink()

    def mark_best(self, name: str | None) -> None:
        """Keep the checkpoint of that name as the best, instead of the previous best; None marks none.

        Raises
        ------
        CannotWrite
            If the folder may not be written to, or there is no room.
        """
        with writing(self.folder / BEST):
            if name is None:
                (self.folder / BEST).unlink(missing_ok=True)
                return
            replace_file(self.folder / BEST, f"{name}\n", flush=True)
            flush(self.folder)

    def best(self) -> Path | None:
        """The best checkpoint; None if none was marked.

        Raises
        ------
        DamagedCheckpoint
            If the marker holds something other than a checkpoint's name.
        """
        marker = self.folder / BEST
        try:
            with reading(marker):
                content = read_within(self.folder, marker, error=DamagedCheckpoint, most_bytes=_MARKER_BYTES)
        except FileNotFoundError:
            return None
        name = content.decode(errors="backslashreplace").strip()
        if not is_checkpoint_name(name):
            raise DamagedCheckpoint(
                f"{marker} names {name!r}: allowed are checkpoints beside it, such as "
                "'save-000001-update-00000010.pt'; train the run on"
            )
        return self.folder / name

    def paths(self) -> list[Path]:
        """All checkpoints in the folder, the newest first; the best is among them.

        Raises
        ------
        DamagedCheckpoint
            If the path is not a folder, or the folder cannot be read.
        """
        try:
            with reading(self.folder):
                found = list(self.folder.iterdir())
        except FileNotFoundError:
            return []
        return sorted((p for p in found if _NAME.fullmatch(p.name)), key=_serial, reverse=True)

    def newest(self) -> dict[str, Any] | None:
        """The state in the newest intact checkpoint; None if there is no checkpoint at all.

        A damaged checkpoint is skipped with a warning, and renamed so that it does not count as one to keep.

        Raises
        ------
        DamagedCheckpoint
            If there are checkpoints, and all are damaged.
        """
        damaged: dict[Path, str] = {}
        for path in self.paths():
            try:
                state = load_checkpoint(path)
            except DamagedCheckpoint as error:
                damaged[path] = str(error)
                continue
            for bad, text in damaged.items():
                warnings.warn(f"{printable(text)}; going on from {path.name}, the one before", stacklevel=2)
                with writing(self.folder):
                    bad.rename(bad.with_name(bad.name + _DAMAGED))
            return state
        if damaged:
            raise DamagedCheckpoint(
                f"no checkpoint in {self.folder} can be used: {'; '.join(damaged.values())}. Begin a new run"
            )
        return None


def is_checkpoint_name(name: str) -> bool:
    """Whether ``name`` has the form of a checkpoint's file name, which cannot lead out of the folder."""
    return _NAME.fullmatch(name) is not None


def _serial(path: Path) -> int:
    match = _NAME.fullmatch(path.name)
    assert match is not None
    return int(match[1])
