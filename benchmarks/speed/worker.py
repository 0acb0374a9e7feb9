"""The process of one kind, as seen from the one that commands it."""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
import tempfile
import time
from typing import Any

from benchmarks.record import resident_bytes
from benchmarks.speed.kinds import KEPT_HEAP
from benchmarks.speed.task import Task

_INTERVAL = 0.01
"""Seconds between readings of the process's resident memory."""
_LAST_WORDS = 10
"""Lines of standard error that are told of a process that failed."""


class Ended(Exception):
    """The process makes no more passes."""

    def __init__(self, outcome: str, reason: str) -> None:
        super().__init__(reason)
        self.outcome = outcome
        """``refused`` where memory was, else ``failed``."""


class Worker:
    """A process that makes one kind of pass on command; `close` ends it.

    Parameters
    ----------
    task
        What it is to compute.
    """

    def __init__(self, task: Task) -> None:
        self._words = tempfile.TemporaryFile("w+")
        self._process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.speed.passes", task.to_json()],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._words,
            text=True,
            env={**os.environ, **(KEPT_HEAP if task.kind.keeps_heap else {})},
        )
        self._before = 0
        self.readings: list[tuple[float, int]] = []
        """Seconds since the last command, and bytes of resident memory above that before the first pass."""

    def ready(self) -> dict[str, Any]:
        """Wait until it can make passes; its device, threads and versions.

        Raises
        ------
        Ended
            If it cannot.
        """
        ready = self._answer()
        self._before = self.resident_bytes
        return ready

    def make_pass(self) -> tuple[dict[str, Any], dict[str, Any] | None]:
        """A pass: what it took, with resident memory above that before the first one, and its plan.

        Raises
        ------
        Ended
            If memory was refused or the process ended.
        """
        answer = self._ask("pass")
        if "refused" in answer:
            raise Ended("refused", answer["refused"])
        peak = max(nbytes for _, nbytes in self.readings)
        return {**answer["pass"], "resident_bytes": peak}, answer["plan"]

    def rest(self) -> None:
        """Have it give free memory back."""
        self._ask("rest")

    @property
    def resident_bytes(self) -> int:
        """Resident memory of the process now."""
        return resident_bytes(self._process.pid)

    def close(self) -> None:
        """End the process. Closing again does nothing."""
        self._process.kill()
        self._process.communicate()
        self._words.close()

    def _ask(self, command: str) -> dict[str, Any]:
        assert self._process.stdin is not None
        try:
            print(command, file=self._process.stdin, flush=True)
        except BrokenPipeError:
            raise self._failed() from None
        return self._answer()

    def _answer(self) -> dict[str, Any]:
        """The answer to the last command; resident memory is read until it comes."""
        assert self._process.stdout is not None
        start, self.readings = time.perf_counter(), []
        self._read(start)
        while not select.select([self._process.stdout], [], [], _INTERVAL)[0]:
            self._read(start)
        line = self._process.stdout.readline()
        if not line:
            raise self._failed()
        answer: dict[str, Any] = json.loads(line)
        return answer

    def _read(self, start: float) -> None:
        self.readings.append((time.perf_counter() - start, self.resident_bytes - self._before))

    def _failed(self) -> Ended:
        """How the process ended, with its last words."""
        status = self._process.wait()
        self._words.seek(0)
        words = self._words.read().strip().splitlines()[-_LAST_WORDS:]
        if status < 0:
            # By the kernel, most often, where memory ran out.
            words.append(f"ended by {signal.Signals(-status).name}")
        return Ended("failed", "\n".join(words) or f"exit status {status}")
