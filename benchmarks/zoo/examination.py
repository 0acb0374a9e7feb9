"""The process of one family, as seen from the one that commands it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.zoo.families import Family
from benchmarks.zoo.one import PARTS


class Examination:
    """A family's process, from its start; `close` ends it.

    Parameters
    ----------
    family
        What it examines.
    limit
        Seconds that it may take.
    """

    def __init__(self, family: Family, limit: float) -> None:
        self.family = family
        self._limit = limit
        self._start = time.monotonic()
        self._folder = tempfile.TemporaryDirectory()
        self._words = tempfile.TemporaryFile("w+")
        module = [sys.executable, "-m", "benchmarks.zoo.one"]
        self._process = subprocess.Popen(
            [*module, family.library, family.name, self._folder.name, str(os.getpid())],
            stdout=subprocess.DEVNULL,
            stderr=self._words,
            # Apart from the terminal, whose Ctrl-C would be a row that ended.
            start_new_session=True,
        )

    @property
    def is_over(self) -> bool:
        """Whether it has ended, or has had its time."""
        return self._process.poll() is not None or self._seconds > self._limit

    @property
    def _seconds(self) -> float:
        return time.monotonic() - self._start

    def found(self) -> dict[str, Any]:
        """What it found, as far as it came, and how it ended if not by itself."""
        parts = Path(self._folder.name) / PARTS
        lines = parts.read_text().splitlines() if parts.exists() else []
        found: dict[str, Any] = {}
        for line in lines:
            found |= json.loads(line)
        if ended := self._how_it_ended():
            found["ended"] = ended
        return {**found, "seconds": round(self._seconds, 1)}

    def _how_it_ended(self) -> str:
        """In words, where it was not by itself."""
        status = self._process.poll()
        if status is None:
            return f"out of time after {self._limit:g} s"
        if status == 0:
            return ""
        self._words.seek(0)
        words = self._words.read().strip().splitlines() or ["no words"]
        how = signal.Signals(-status).name if status < 0 else f"exit status {status}"
        return f"{how}: {words[-1]}"

    def close(self) -> None:
        """End it now."""
        self._process.kill()
        self._process.wait()
        self._words.close()
        self._folder.cleanup()
