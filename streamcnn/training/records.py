"""What a run writes as it goes, into a folder that is locked meanwhile: checkpoints, and its log.

The first process writes. All processes make the same calls, and a write that fails in the first is an error
in all of them.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from streamcnn.errors import DamagedCheckpoint
from streamcnn.training.checkpoints import CheckpointFolder
from streamcnn.training.lock import holding
from streamcnn.training.log import RunLog
from streamcnn.training.processes import Processes
from streamcnn.training.progress import Progress
from streamcnn.training.state import require_state
from streamcnn.training.task import Evaluation

Listener = Callable[[str, Mapping[str, Any]], None]
"""Told the kind and the values of each line that is written to the log."""


class Records:
    """Writes what a run is resumed from (checkpoints) and judged by (the log).

    Parameters
    ----------
    folder
        The run's folder.
    processes
        The processes that train the model.
    """

    def __init__(self, folder: Path, processes: Processes) -> None:
        self.folder = folder
        self.checkpoints = CheckpointFolder(folder / "checkpoints")
        self._first = processes.first
        self._log: RunLog

    @contextmanager
    def held(self) -> Iterator[None]:
        """Keep others from training in the folder during the block; see `holding`."""
        with ExitStack() as block:
            self._first(lambda: block.enter_context(holding(self.folder)))
            yield

    @contextmanager
    def open_log(self, **options: Any) -> Iterator[None]:
        """Open the log for the block, as `RunLog` does with these options."""
        with ExitStack() as block:

            def open_it() -> None:
                self._log = block.enter_context(RunLog(self.folder, **options))

            self._first(open_it)
            yield

    def note(self, kind: str, values: Mapping[str, Any], update: int, listener: Listener | None) -> None:
        """Append a line to the log, and tell the listener."""

        def write() -> None:
            self._log.write(kind, values, update)
            if listener is not None:
                listener(kind, values)

        self._first(write)

    def newest(self) -> dict[str, Any] | None:
        """A trainer's state from the newest intact checkpoint; see `CheckpointFolder.newest`."""
        saved = self._first(self.checkpoints.newest)
        if saved is not None:
            require_state(saved, self.checkpoints.folder)
        return saved

    def save(self, state: Callable[[], dict[str, Any]], update: int) -> None:
        """Write a checkpoint of the state after ``update`` updates, together with the length of the log."""
        self._first(lambda: self.checkpoints.save({**state(), "log_bytes": self._log.flush()}, update))

    def keep_best(self, found: Evaluation, update: int) -> str:
        """Write what the page shows of the best weights; return the name that their checkpoint will have."""

        def keep() -> str:
            found.keep(self.folder)
            return self.checkpoints.next_name(update)

        return self._first(keep)

    def mark_best(self, name: str | None) -> None:
        """Mark the best checkpoint; see `CheckpointFolder.mark_best`."""
        self._first(lambda: self.checkpoints.mark_best(name))

    def restore_best(self, progress: Progress) -> None:
        """Mark the best checkpoint that a run knows of; if it is gone, the next epoch is taken for the best.

        The run may have been killed before it marked this one, or after it marked a later, damaged one.
        """

        def is_gone() -> bool:
            best = progress.best
            if best is None or (self.checkpoints.folder / best).exists():
                return False
            warnings.warn(
                f"{best}, the best checkpoint, is gone: the next epoch is taken for the best", stacklevel=3
            )
            return True

        if self._first(is_gone):
            progress.forget_best()
        self.mark_best(progress.best)

    def best(self) -> Path:
        """The best checkpoint.

        Raises
        ------
        DamagedCheckpoint
            If none is marked, or the marked one is gone.
        """
        best = self._first(self.checkpoints.best)
        if best is None:
            raise DamagedCheckpoint(
                f"the best checkpoint in {self.checkpoints.folder} is gone: train for more epochs to have "
                "another"
            )
        return best
