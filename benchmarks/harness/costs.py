"""What training takes: seconds, bytes, updates and epochs."""

from __future__ import annotations

import time
from pathlib import Path

from benchmarks.harness.json_files import read_json, write_json
from streamcnn.ceiling.device import Limit
from streamcnn.training import Trainer
from streamcnn.training.checkpoints import CheckpointFolder


class Costs:
    """What one stage of training takes, over all the processes that it takes.

    Parameters
    ----------
    folder
        The stage's own.
    """

    def __init__(self, folder: Path) -> None:
        self._path = folder / "costs.json"
        self._checkpoints = CheckpointFolder(folder / "checkpoints")
        self._newest = self._newest_checkpoint()
        self._started = time.perf_counter()
        known = read_json(self._path)
        self._before: float = known.get("seconds", 0.0)
        self._saved: float = known.get("saved_seconds", 0.0)
        self._saved_before = self._saved
        self.seconds = self._before
        """Spent, what was lost with a process included."""
        self.trained_seconds = self._saved
        """What the weights have had: until the newest checkpoint, and since."""
        self.peak: int = known.get("peak", 0)
        """Bytes."""
        self.updates: int = known.get("updates", 0)
        self.epochs: float = known.get("epochs", 0.0)

    def note(self, limit: Limit, trainer: Trainer) -> None:
        """Write down what it has cost until now."""
        elapsed = time.perf_counter() - self._started
        self.seconds, self.trained_seconds = self._before + elapsed, self._saved_before + elapsed
        self.peak = max(self.peak, limit.peak_bytes or 0)
        self.updates = trainer.progress.update
        self.epochs = trainer.progress.epoch + trainer.progress.num_images / len(trainer.images)
        newest = self._newest_checkpoint()
        if newest != self._newest:
            self._newest, self._saved = newest, self.trained_seconds
        found = {"seconds": self.seconds, "saved_seconds": self._saved, "peak": self.peak}
        write_json(self._path, {**found, "updates": self.updates, "epochs": self.epochs})

    def _newest_checkpoint(self) -> str | None:
        paths = self._checkpoints.paths()
        return paths[0].name if paths else None
