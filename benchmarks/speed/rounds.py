"""Processes take turns, so that whatever else the machine does meets all kinds of pass."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from benchmarks.speed.results import Row
from benchmarks.speed.task import Task
from benchmarks.speed.worker import Ended, Worker
from streamcnn.ceiling.rooms import host_room

WARM_UPS = 2
"""Passes of each kind that are made before those that are measured."""


class Runner:
    """The passes of one kind, and how they ended.

    Parameters
    ----------
    task
        What to compute.
    allowance
        Bytes of host memory that its process may hold while others run. If it holds more after a pass, it
        gives that back, and fills it again by another pass before each that is measured. Thus kinds that
        keep memory are measured with it in place although there is none for all of them at once.
    """

    def __init__(self, task: Task, allowance: int) -> None:
        self.row = Row(task.kind.name, task.kind.label, task.kind.budget)
        self._worker = Worker(task)
        self._allowance = allowance
        self._rests = False

    def start(self) -> dict[str, Any]:
        """Wait until its process is ready; what that said, nothing if it failed."""
        try:
            return self._worker.ready()
        except Ended as end:
            self._end(end)
            return {}

    def turn(self, *, measured: bool) -> str:
        """A pass; its time, or how it ended, as text."""
        try:
            if self._rests:
                self._worker.make_pass()
            found, plan = self._worker.make_pass()
            self._rests = self._rests or self._worker.resident_bytes > self._allowance
            if self._rests:
                self._worker.rest()
        except Ended as end:
            self._end(end)
            return self.row.outcome
        self.row.plan = plan
        self.row.rests = self._rests
        if self.row.first_seconds is None:
            self.row.first_seconds = found["seconds"]
        if measured:
            self.row.passes.append(found)
        return f"{found['seconds']:.3f} s"

    def close(self) -> None:
        """End its process."""
        self._worker.close()

    def _end(self, end: Ended) -> None:
        self.row.outcome, self.row.reason = end.outcome, str(end)
        self.close()


def measure(
    tasks: Sequence[Task], repeats: int, tell: Callable[[str], None]
) -> tuple[dict[str, Any], list[Row]]:
    """What the machine is, and what each task's passes took.

    Parameters
    ----------
    tasks
        Of one case and one device.
    repeats
        Measured passes of each.
    tell
        Called with what is done, line by line.
    """
    # A card's memory is kept by no process while another one plans for what is free.
    allowance = 0 if tasks[0].device == "cuda" else available_bytes() // len(tasks)
    with ExitStack() as stack:
        runners, machine = [], dict[str, Any]()
        # One after the other: starting takes all cores, and the first streamed one may measure rates.
        for task in tasks:
            tell(f"starting {task.kind.label}")
            runner = Runner(task, allowance)
            stack.callback(runner.close)
            machine = runner.start() or machine
            runners.append(runner)
        for turn in range(WARM_UPS + repeats):
            for runner in (each for each in runners if each.row.is_finished):
                took = runner.turn(measured=turn >= WARM_UPS)
                tell(f"round {turn + 1} of {WARM_UPS + repeats}, {runner.row.label}: {took}")
    return machine, [runner.row for runner in runners]


def available_bytes() -> int:
    """Host memory that can be had without paging and within the limits of control groups."""
    lines = Path("/proc/meminfo").read_text().splitlines()
    fields = dict(line.split(":", 1) for line in lines)
    available, room = int(fields["MemAvailable"].split()[0]) * 1024, host_room()
    return available if room is None else min(available, room.nbytes)
