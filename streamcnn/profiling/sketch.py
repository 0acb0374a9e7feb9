"""A sketch of a plan: the data of its drawing, small enough for a line of JSON."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from streamcnn.plan.plan import Phase, Plan
from streamcnn.plan.tiles import AxisStep

Kinds = tuple[tuple[str, int], ...]
"""Kinds of operators and the number of each, in order of first appearance."""

Shares = tuple[tuple[float, float], tuple[float, float]]
"""Start and stop of rows and of columns, as shares of a map."""

_NUMBER = re.compile(r"_*(?:_\d+)?(?:\.\d+)?$")


@dataclass(frozen=True, slots=True)
class StoredMap:
    """A stored map (checkpoint)."""

    name: str
    nbytes: int
    tier: str
    """``"memory"``, ``"host"`` or ``"disk"``."""


@dataclass(frozen=True, slots=True)
class PhaseSketch:
    """One phase. A tile in the middle represents all; its place is given as shares of the map, 0 to 1."""

    level: int
    operators: Kinds
    inputs: tuple[str, ...]
    """Names of the maps it reads."""
    stored: tuple[StoredMap, ...]
    reductions: Kinds
    """Kinds of its reductions, for the barrier after it."""
    grid: tuple[int, int]
    """Tiles along height and width."""
    extent: tuple[int, int]
    """Positions of its largest input."""
    halo: tuple[int, int]
    """Largest numbers of rows and columns of an input that a tile needs beyond its even share."""
    own: Shares
    """The tile's own share of the output."""
    needed: Shares
    """The region of the largest input that the tile reads."""


@dataclass(frozen=True, slots=True)
class PlanSketch:
    """The sketch of a plan."""

    image: str
    """Name of the image among the phases' inputs."""
    image_shape: tuple[int, int, int, int]
    phases: tuple[PhaseSketch, ...]
    tail: Kinds
    """Operators of the resident tail."""

    @classmethod
    def from_fields(cls, fields: Mapping[str, Any]) -> PlanSketch:
        """The sketch from its fields, as loaded from JSON."""
        phases = tuple(_phase_from_fields(phase) for phase in fields["phases"])
        return cls(fields["image"], tuple(fields["image_shape"]), phases, _tuples(fields["tail"]))


def sketch_plan(plan: Plan) -> PlanSketch:
    """The sketch of a plan."""
    stored = {name for phase in plan.phases for name in phase.stored}
    image = next((n for phase in plan.phases for n in phase.inputs if plan.levels.get(n) == 0), "")
    assert image not in stored
    return PlanSketch(
        image=image,
        image_shape=plan.image_shape,
        phases=tuple(_sketch_phase(plan, phase) for phase in plan.phases),
        tail=_tail(plan),
    )


def count_kinds(names: Iterable[str]) -> Kinds:
    """Count kinds of operators by the names of their nodes: ``conv2d_3`` is a ``conv2d``."""
    return tuple(Counter(_NUMBER.sub("", name) for name in names).items())


def _sketch_phase(plan: Plan, phase: Phase) -> PhaseSketch:
    extents = {name: (_extent(phase.rows, name), _extent(phase.cols, name)) for name in phase.inputs}
    largest = max(extents, key=lambda name: extents[name][0] * extents[name][1])
    row, col = (phase.rows[len(phase.rows) // 2], phase.cols[len(phase.cols) // 2])
    return PhaseSketch(
        level=phase.level,
        operators=count_kinds(phase.nodes),
        inputs=phase.inputs,
        stored=tuple(
            StoredMap(name, plan.stores[name].nbytes, plan.stores[name].tier.value) for name in phase.stored
        ),
        reductions=count_kinds(phase.reductions),
        grid=(len(phase.rows), len(phase.cols)),
        extent=extents[largest],
        halo=phase.halo,
        own=(_own(phase.rows, row), _own(phase.cols, col)),
        needed=(_needed(phase.rows, row, largest), _needed(phase.cols, col, largest)),
    )


def _tail(plan: Plan) -> Kinds:
    """Operators in the last segment, without the parts into which a batch norm was split."""
    if not plan.num_resident:
        return ()
    last = max(plan.segments, key=lambda segment: segment.level)
    return count_kinds(name for name in last.nodes if "." not in name and not name.startswith("whole_"))


def _extent(steps: Sequence[AxisStep], name: str) -> int:
    return max(step.needed[name].stop for step in steps)


def _own(steps: Sequence[AxisStep], step: AxisStep) -> tuple[float, float]:
    name = next(iter(step.own))
    whole = max(other.own[name].stop for other in steps)
    return _share(step.own[name].start, whole), _share(step.own[name].stop, whole)


def _needed(steps: Sequence[AxisStep], step: AxisStep, name: str) -> tuple[float, float]:
    whole = _extent(steps, name)
    return _share(step.needed[name].start, whole), _share(step.needed[name].stop, whole)


def _share(position: int, whole: int) -> float:
    return round(position / whole, 4)


def _phase_from_fields(fields: Mapping[str, Any]) -> PhaseSketch:
    stored = tuple(StoredMap(**store) for store in fields["stored"])
    rest = {name: _tuples(value) for name, value in fields.items() if name != "stored"}
    return PhaseSketch(**rest, stored=stored)


def _tuples(value: Any) -> Any:
    """Lists as tuples, inside too."""
    return tuple(map(_tuples, value)) if isinstance(value, list) else value
