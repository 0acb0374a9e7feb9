"""What was measured, and what it says: medians, spreads, and ratios to plain PyTorch at its best."""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from benchmarks import record as records

NAME = "speed"
"""Of the file of results."""


@dataclass(slots=True)
class Row:
    """The passes of one kind."""

    kind: str
    label: str
    budget: str | None = None
    """Of a streamed pass, as it was asked for."""
    outcome: str = "finished"
    """Or ``refused``, where memory was, or ``failed``."""
    reason: str = ""
    rests: bool = False
    """Whether its process gave memory back between passes and filled it again by one that is not measured."""
    first_seconds: float | None = None
    """Of the very first pass, capture, planning and compiling included."""
    passes: list[dict[str, Any]] = field(default_factory=list)
    """What each measured pass took, in order; sizes in bytes."""
    plan: dict[str, Any] | None = None

    @property
    def is_finished(self) -> bool:
        """Whether all its passes were made."""
        return self.outcome == "finished"

    def values(self, name: str) -> list[float]:
        """One quantity of every pass, where it is known."""
        return [each[name] for each in self.passes if each.get(name) is not None]

    def median(self, name: str) -> float:
        """The median of one quantity over the passes of a finished row."""
        return statistics.median(self.values(name))

    def most(self, name: str) -> int | None:
        """The most bytes of any pass; None if unknown."""
        return max(map(int, self.values(name)), default=None)


@dataclass(frozen=True, slots=True)
class Yardstick:
    """Which kinds the others are compared with; each is plain PyTorch at its best."""

    seconds: str
    memory: str
    memory_field: str
    """Which bytes of a pass are compared."""


YARDSTICKS = {
    # With its heap kept it is fastest, and as it comes it keeps nothing.
    "cpu": Yardstick("plain-kept", "plain", "resident_bytes"),
    "cuda": Yardstick("plain-last", "plain-last", "measured_bytes"),
}


@dataclass(frozen=True, slots=True)
class Result:
    """The rows of a case on a device."""

    case: str
    device_kind: str
    """``cpu`` or ``cuda``."""
    device: str
    rows: tuple[Row, ...]

    @property
    def yardstick(self) -> Yardstick:
        """What its ratios are to."""
        return YARDSTICKS[self.device_kind]

    @property
    def finished(self) -> list[Row]:
        """Those that made all their passes."""
        return [row for row in self.rows if row.is_finished]

    def seconds(self, row: Row) -> float:
        """The median of a finished row."""
        return row.median("seconds")

    def memory(self, row: Row) -> int | None:
        """The most bytes that a row held, by the reading that all rows have; None if unknown."""
        return row.most(self.yardstick.memory_field)

    def seconds_ratio(self, row: Row) -> float | None:
        """A finished row's median over the yardstick's; None if that was not measured."""
        plain = self._finished(self.yardstick.seconds)
        return None if plain is None else self.seconds(row) / self.seconds(plain)

    def memory_ratio(self, row: Row) -> float | None:
        """A row's memory over the yardstick's; None if either was not measured."""
        plain = self._finished(self.yardstick.memory)
        mine, plains = self.memory(row), None if plain is None else self.memory(plain)
        return None if mine is None or not plains else mine / plains

    def _finished(self, kind: str) -> Row | None:
        return next((row for row in self.finished if row.kind == kind), None)


def record(result: Result, command: str, **fields: Any) -> str:
    """Append a result to the file of results; the line."""
    return records.append(
        NAME,
        command,
        case=result.case,
        device=result.device,
        device_kind=result.device_kind,
        **fields,
        yardstick=asdict(result.yardstick),
        ratios={row.label: _ratios(result, row) for row in result.finished},
        rows=[asdict(row) for row in result.rows],
    )


def newest() -> list[Result]:
    """The last recorded result of each case on each device."""
    path = records.RESULTS / f"{NAME}.jsonl"
    lines: Sequence[str] = path.read_text().splitlines() if path.exists() else ()
    found = {}
    for line in map(json.loads, lines):
        rows = tuple(Row(**row) for row in line["rows"])
        result = Result(line["case"], line["device_kind"], line["device"], rows)
        found[result.case, result.device] = result
    return list(found.values())


def _ratios(result: Result, row: Row) -> dict[str, float | None]:
    ratios = {"seconds": result.seconds_ratio(row), "memory": result.memory_ratio(row)}
    return {name: None if ratio is None else round(ratio, 3) for name, ratio in ratios.items()}
