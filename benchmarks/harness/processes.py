"""Processes of rows: how one is started, asked to save, ended, and followed by another."""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from benchmarks.harness.attempts import Attempts
from benchmarks.harness.results import Key
from benchmarks.harness.row import AGAIN, SAVED
from streamcnn.support.signals import BY_SIGNAL

SECONDS_TO_SAVE = 30
"""For a row that is out of time: the present update or validation batch, and saving."""
_PR_SET_PDEATHSIG = 1
_CRASHES = (signal.SIGABRT, signal.SIGBUS, signal.SIGSEGV)
"""How libraries end the process where memory is refused them."""


class OutOfTime(Exception):
    """The command was given so many seconds, and they are over."""


class Deadline:
    """The end of the seconds that a command was given; None is no end."""

    def __init__(self, seconds: float | None) -> None:
        self._end = None if seconds is None else time.monotonic() + seconds

    @property
    def seconds_left(self) -> float | None:
        """Not below 0; None if there is no end."""
        return None if self._end is None else max(0.0, self._end - time.monotonic())

    def check(self) -> None:
        """Raise `OutOfTime` if it is past."""
        if self.seconds_left == 0:
            raise OutOfTime


def end_with(parent: int) -> None:
    """Have SIGTERM sent to this process when its parent is gone, so that it saves and ends."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
        if os.getppid() != parent:
            raise SystemExit("the process that started this one is gone")


def run_row_in_process(key: Key, scale_folder: Path, folder: Path, deadline: Deadline) -> dict[str, Any]:
    """What the row's process found; where it failed, its last words.

    A library that is refused memory on the CPU may end the process. What was tried then counts as refused,
    and the row goes on in another process.

    Raises
    ------
    OutOfTime
        If the time is over before the row is done.
    """
    Attempts(folder).forget_last()
    arguments = ("row", json.dumps(key.to_dict()), str(scale_folder), str(folder), str(os.getpid()))
    command = [sys.executable, "-m", "benchmarks", *arguments]
    while True:
        deadline.check()
        process = run_to_end(command, deadline)
        if process.returncode == 0:
            found: dict[str, Any] = json.loads(process.stdout.splitlines()[-1])
            if found["outcome"] == AGAIN:
                continue
            if found["outcome"] == SAVED:
                deadline.check()
                return {**found, "outcome": "failed"}
            return found
        print(process.stderr, file=sys.stderr)
        words = process.stderr.strip().splitlines() or [f"exit status {process.returncode}"]
        if key.device == "cpu" and -process.returncode in _CRASHES:
            signal_name = signal.Signals(-process.returncode).name
            if Attempts(folder).refuse_last(f"a library ended the process: {signal_name}, {words[-1]}"):
                continue
        return {"outcome": "failed", "reason": words[-1]}


def run_to_end(command: list[str], deadline: Deadline) -> subprocess.CompletedProcess[str]:
    """A process that has run to its end, which it is asked to come to when time is over.

    Raises
    ------
    OutOfTime
        If it was ended where it had nothing to save, or takes too long.
    KeyboardInterrupt
        If a signal asked this process to end, when the row has saved; at a second one at once.
    """
    pipe = subprocess.PIPE
    # Apart from the terminal, whose Ctrl-C would be a second signal to a row, and end it before it has saved.
    with subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True, start_new_session=True) as process:
        try:
            try:
                out, words = process.communicate(timeout=deadline.seconds_left)
            except subprocess.TimeoutExpired:
                process.terminate()
                out, words = process.communicate(timeout=SECONDS_TO_SAVE)
                if process.returncode in (-signal.SIGTERM, BY_SIGNAL + signal.SIGTERM):
                    raise OutOfTime from None
            except KeyboardInterrupt:
                process.terminate()
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.communicate(timeout=SECONDS_TO_SAVE)
                raise
        except subprocess.TimeoutExpired:
            raise OutOfTime from None
        finally:
            process.kill()
    return subprocess.CompletedProcess(command, process.returncode, out, words)
