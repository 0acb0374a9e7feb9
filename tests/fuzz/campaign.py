"""Run inputs in workers, which are replaced if they die or hang, and keep the inputs that are faults.

An input may be accepted, or be refused with a `StreamError`. Anything else is a fault: another exception; a
process that dies, or takes longer than `SECONDS` or more memory than `worker.MEMORY_BYTES`; anything opened
or changed outside of the input's folder.
"""

from __future__ import annotations

import json
import multiprocessing
import shutil
import time
import warnings
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path

from .seeds import SEEDS
from .worker import Case, Outcome, make_case, serve

SECONDS = 30.0
"""The most seconds that an input may take: a hundred times the slowest valid one's, for busy machines."""
_FORKED = multiprocessing.get_context("fork")


@dataclass
class Tally:
    """The outcomes of the inputs of one target."""

    counts: Counter[str] = field(default_factory=Counter)
    faults: dict[str, tuple[Case, str]] = field(default_factory=dict)
    """The first input of each fault, by its text's first line and place."""
    slowest: float = 0.0

    @property
    def num_inputs(self) -> int:
        """Number of inputs that were opened."""
        return self.counts.total()


def make_seeds(folder: Path, targets: list[str]) -> None:
    """Write valid files of each target, in a process of its own: threads do not survive a fork."""
    process = _FORKED.Process(target=_make_seeds, args=(folder, targets))
    process.start()
    process.join()
    assert process.exitcode == 0, "the valid files cannot be made"


def _make_seeds(folder: Path, targets: list[str]) -> None:
    warnings.simplefilter("ignore")  # zarr's, of metadata that are not in the specification
    for target in targets:
        for name, make in SEEDS[target].items():
            place = folder / target / name
            place.mkdir(parents=True)
            make(place)


class Worker:
    """A process that opens inputs of one target."""

    def __init__(self, target: str, seeds: Path, root: Path) -> None:
        self._connection, theirs = _FORKED.Pipe()
        self._process = _FORKED.Process(target=serve, args=(theirs, target, seeds, root), daemon=True)
        self._process.start()
        theirs.close()
        ready = self._answer(10 * SECONDS)
        assert ready.kind == "ready", f"valid files of {target} cannot be opened: {ready.text}"

    def open(self, case: Case) -> Outcome:
        """Open an input and return its outcome; the process is over if that is a death or a hang."""
        started = time.monotonic()
        self._connection.send(case)
        found = self._answer(SECONDS)
        return Outcome(found.kind, found.text, time.monotonic() - started)

    def _answer(self, seconds: float) -> Outcome:
        try:
            if self._connection.poll(seconds):
                found = self._connection.recv()
                assert isinstance(found, Outcome)
                return found
        except (EOFError, ConnectionResetError):
            self._process.join()
            return Outcome("death", f"the process ended with {self._process.exitcode}")
        self._process.kill()
        return Outcome("hang", f"no answer within {seconds:.0f} s")

    def close(self) -> None:
        """End the process."""
        self._process.kill()
        self._process.join()
        self._connection.close()


def run(
    targets: list[str], seed: int, work: Path, *, seconds: float | None = None, inputs: int | None = None
) -> dict[str, Tally]:
    """Open inputs of each target in turn, until the time is over or each has had its number of inputs."""
    seeds = work / "seeds"
    make_seeds(seeds, targets)
    tallies = {target: Tally() for target in targets}
    ends = None if seconds is None else time.monotonic() + seconds
    at, batch = 0, inputs or 100
    while True:
        for target in targets:
            for case, found in _opened(target, seed, range(at, at + batch), seeds, work):
                _note(tallies[target], case, found)
                if ends is not None and time.monotonic() > ends:
                    return tallies
        at += batch
        if ends is None:
            return tallies


def _opened(
    target: str, seed: int, indices: range, seeds: Path, work: Path
) -> Iterator[tuple[Case, Outcome]]:
    worker = Worker(target, seeds, work)
    try:
        for index in indices:
            case = Case(target, seed, index)
            found = worker.open(case)
            if found.kind in ("death", "hang"):
                worker.close()
                worker = Worker(target, seeds, work)
            yield case, found
    finally:
        worker.close()


def _note(tally: Tally, case: Case, found: Outcome) -> None:
    tally.counts[found.kind] += 1
    tally.slowest = max(tally.slowest, found.seconds)
    if found.kind not in ("accepted", "refused"):
        place = found.text.rpartition("\n")[2] if found.kind == "fault" else found.text
        tally.faults.setdefault(f"{found.kind} {place}", (case, found.text))


def keep(tallies: dict[str, Tally], work: Path, out: Path) -> list[str]:
    """Write one input of each fault to a folder of its own, and return a line for each."""
    lines = []
    for tally in tallies.values():
        for kind, (case, text) in tally.faults.items():
            place = out / f"{case.target}-{case.seed}-{case.index}"
            shutil.rmtree(place, ignore_errors=True)
            (place / "input").mkdir(parents=True)
            done = make_case(case, work / "seeds", place / "input")
            (place / "fault.json").write_text(
                json.dumps({**asdict(case), "text": text, "changes": done}, indent=2)
            )
            lines.append(f"{place}: {kind.partition(' ')[0]}: {text} ({done})")
    return lines


def table(tallies: dict[str, Tally]) -> str:
    """Numbers of inputs by target and outcome."""
    kinds = ("accepted", "refused", "fault", "escape", "death", "hang")
    rows = [("target", "inputs", *kinds, "slowest")]
    for target, tally in tallies.items():
        counts = (str(tally.counts[kind]) for kind in kinds)
        rows.append((target, str(tally.num_inputs), *counts, f"{tally.slowest:.1f} s"))
    return "\n".join("".join(f"{cell:>12}" for cell in row) for row in rows)
