"""Memory over the time of one update, with the parts that ran, as frozen data; and its thinning."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

GLOBAL_VALUES, TAIL, BETWEEN = "global values", "resident tail", "in between"
"""Parts of an update other than phases. The last is the loss, and stores that take long to be freed."""


class Sample(NamedTuple):
    """One reading of resident memory."""

    span: int
    """Index of the span in which the reading was taken."""
    seconds: float
    """Seconds since the update's first event."""
    nbytes: int
    """Largest resident bytes since the previous reading in this span."""


@dataclass(frozen=True, slots=True)
class Span:
    """A part that ran, from one moment to another, in seconds since the update's first event."""

    part: str
    """``"phase"``, ``"phase again"`` or one of the names above."""
    level: int
    direction: str
    """``"forward"``, ``"backward"``, or empty for what is in between."""
    start: float
    stop: float

    @property
    def label(self) -> str:
        """The span in words."""
        name = self.part if self.part in (TAIL, BETWEEN) else f"{self.part} {self.level}"
        if self.part == GLOBAL_VALUES:
            name = f"global values after phase {self.level}" if self.level else "global values at the start"
        return f"{name}, {self.direction}" if self.direction else name


@dataclass(frozen=True, slots=True)
class Timeline:
    """Memory above the baseline over one update. ``running``, ``seconds`` and ``nbytes`` are parallel."""

    spans: tuple[Span, ...]
    running: tuple[int, ...]
    """For each sample, the index of its span."""
    seconds: tuple[float, ...]
    nbytes: tuple[int, ...]

    @property
    def end(self) -> float:
        """Seconds at which the last span stops."""
        return max(span.stop for span in self.spans)

    @property
    def peak(self) -> int:
        """Index of the sample with the most bytes."""
        return max(range(len(self.nbytes)), key=self.nbytes.__getitem__)

    def to_columns(self) -> dict[str, list[Any]]:
        """The timeline as parallel lists, which are shorter as JSON than an object for each span."""
        return {
            "part": [span.part for span in self.spans],
            "level": [span.level for span in self.spans],
            "direction": [span.direction for span in self.spans],
            "start": [round(span.start, 4) for span in self.spans],
            "stop": [round(span.stop, 4) for span in self.spans],
            "running": list(self.running),
            "seconds": [round(moment, 4) for moment in self.seconds],
            "nbytes": list(self.nbytes),
        }

    @classmethod
    def from_columns(cls, columns: Mapping[str, Sequence[Any]]) -> Timeline:
        """The timeline that :meth:`to_columns` wrote."""
        names = ("part", "level", "direction", "start", "stop")
        spans = tuple(Span(*fields) for fields in zip(*(columns[name] for name in names), strict=True))
        return cls(spans, *(tuple(columns[name]) for name in ("running", "seconds", "nbytes")))


def thin(samples: Iterable[Sample], width: float) -> list[Sample]:
    """The largest sample of each interval of ``width`` seconds within each span, in order of time.

    Every span that had a sample keeps its peak.
    """
    kept: list[Sample] = []
    for sample in samples:
        last = kept[-1] if kept else None
        if last is None or last.span != sample.span or last.seconds // width != sample.seconds // width:
            kept.append(sample)
        elif sample.nbytes > last.nbytes:
            kept[-1] = sample
    return kept
