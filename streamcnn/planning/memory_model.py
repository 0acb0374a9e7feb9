"""Projected bytes at every point of a pass, as sums of named terms.

All figures are bytes above the baseline of a loaded model. At each point, the bytes that live across steps
(stored maps, gradients, global values) are added to those of the step, which is projected for the stage's
largest tile. A plan's projection is that of its worst point.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import MappingProxyType

import numpy as np

from streamcnn.plan.level_bytes import HeldBytes, Ints, LevelBytes
from streamcnn.plan.plan import PassPart
from streamcnn.plan.reading import READING
from streamcnn.plan.storage import MemoryTerm
from streamcnn.plan.stored_bytes import StoredBytes
from streamcnn.planning.backends import Backend
from streamcnn.planning.backends.base import Bytes
from streamcnn.planning.global_bytes import GlobalBytes
from streamcnn.planning.staging import is_differentiated
from streamcnn.planning.step_bytes import StepBytes, steps, total_bytes
from streamcnn.planning.tiling import TiledStage

NO_STEP = StepBytes((), "", 0)
"""The step of a point at which no operator runs."""
ON_THE_WAY = "tiles on the way"
"""The name of the term for tiles that are moved while another one is computed."""


@dataclass(frozen=True, slots=True)
class PeakPoint:
    """Projected bytes at one point of a pass."""

    name: str
    part: PassPart
    operator: str
    """The operator at which most memory is held."""
    terms: tuple[MemoryTerm, ...]
    reading: int
    """Bytes that reading a region of an image takes beside tensors, at this or another moment of the step."""

    @property
    def nbytes(self) -> int:
        """The sum of the terms."""
        return total_bytes(self.terms)

    def beside_tensors(self, names: Collection[str]) -> int:
        """The most bytes of the terms ``names``, and of reading images, at any moment of the step."""
        others = total_bytes(term for term in self.terms if term.name in names and term.name != READING)
        return others + self.reading


@dataclass(frozen=True, slots=True, eq=False)
class PassBytes:
    """Projected bytes at any point of a pass: as numbers for the search, and term by term for the plan.

    Both add the bytes held beside steps at the point's level, the step's, and those that the allocator loses.
    """

    backend: Backend
    held: HeldBytes
    holes: int | None
    """Bytes lost at every point if freed blocks are kept for reuse; None if they are given back."""

    @classmethod
    def of(
        cls,
        global_bytes: GlobalBytes,
        others: HeldBytes,
        num_kernels: Ints,
        num_stages: int,
        reusable: int | None,
    ) -> PassBytes:
        """The bytes of a pass of ``num_stages`` stages.

        Parameters
        ----------
        others
            Bytes held beside steps, without those that the backend keeps.
        num_kernels
            By level: number of different convolutions of its phase.
        reusable
            The most bytes of a step in blocks that are kept for reuse; None if they are given back.
        """
        backend = global_bytes.backend
        holes = (
            None if reusable is None else backend.keeping.of_pass(reusable, global_bytes.reusable, num_stages)
        )
        return cls(backend, global_bytes.kept(num_kernels) + others, holes)

    def lost(self, nbytes: Bytes) -> Bytes | int:
        """Bytes that the allocator loses while a step of ``nbytes`` runs."""
        return self.backend.returning.of_step(nbytes) if self.holes is None else self.holes

    def at(self, held: LevelBytes, levels: Ints | int, steps: Bytes) -> Ints:
        """The sums at ``levels`` with steps of ``steps`` bytes; both arguments are broadcast."""
        sums: Ints = held.total[levels] + steps + self.lost(steps)
        return sums

    def point(self, name: str, part: PassPart, held: LevelBytes, level: int, step: StepBytes) -> PeakPoint:
        """One point with its terms, whose sum is :meth:`at`."""
        waste = MemoryTerm(self.backend.fragmentation, self.lost(step.nbytes))
        return PeakPoint(name, part, step.operator, (*held.at(level), *step.terms, waste), step.reading)


def peak_points(
    tiled: Sequence[TiledStage],
    global_bytes: GlobalBytes,
    stored: StoredBytes,
    *,
    rematerialised: Sequence[tuple[int, TiledStage]] = (),
    moving: Mapping[PassPart, int] = MappingProxyType({}),
    reuses_blocks: bool,
) -> list[PeakPoint]:
    """All peak points of a pass, in order.

    These are the first read of images that are decoded whole; then, forward, every phase and the global
    values of every level, the last of which are the resident tail; then the same backward, for differentiated
    phases and values.

    Parameters
    ----------
    rematerialised
        Stages that are run again, each with the level before whose backward phase.
    moving
        The parts during which tiles are moved, with the bytes of these tiles.
    """
    phases = _PhaseSteps.of(tiled, rematerialised, global_bytes)
    num_kernels = np.zeros_like(global_bytes.num_kernels)
    for stage in (*tiled, *(stage for _, stage in rematerialised)):
        num_kernels[stage.stage.level] += stage.num_kernels
    found = PassBytes.of(
        global_bytes,
        global_bytes.held + stored.held,
        num_kernels,
        len(tiled) + len(rematerialised),
        phases.reusable if reuses_blocks else None,
    )
    points = _Points(found, global_bytes, phases, moving)
    return [*points.first_read(), *points.forward(), *points.backward()]


@dataclass(frozen=True, slots=True)
class _PhaseSteps:
    """The largest step of every phase, by level."""

    forward: dict[int, StepBytes] = field(default_factory=dict)
    backward: dict[int, StepBytes] = field(default_factory=dict)
    """Only of phases that are differentiated."""
    again: dict[int, list[tuple[int, StepBytes]]] = field(default_factory=lambda: defaultdict(list))
    """By level: steps of the stages that run again before its backward phase, each with its own level."""

    @classmethod
    def of(
        cls,
        tiled: Sequence[TiledStage],
        rematerialised: Sequence[tuple[int, TiledStage]],
        global_bytes: GlobalBytes,
    ) -> _PhaseSteps:
        """The steps of a pass; the parameters are those of `peak_points`."""
        found, given = cls(), (global_bytes.backend, global_bytes.reading)
        for stage in tiled:
            backward = is_differentiated(stage.stage, global_bytes.differentiated)
            before, after = steps(stage, *given, backward=backward)
            found.forward[stage.stage.level] = before
            if after is not None:
                found.backward[stage.stage.level] = after
        for level, stage in rematerialised:
            step, _ = steps(stage, *given, backward=False)
            found.again[level].append((stage.stage.level, step))
        return found

    @property
    def reusable(self) -> int:
        """The most bytes of any step in blocks that may be kept for reuse."""
        again = (step for each in self.again.values() for _, step in each)
        every = (*self.forward.values(), *self.backward.values(), *again)
        return max((step.reusable for step in every), default=0)


@dataclass(frozen=True, slots=True)
class _Points:
    """Makes the peak points of one pass, in the order in which they come."""

    found: PassBytes
    global_bytes: GlobalBytes
    phases: _PhaseSteps
    moving: Mapping[PassPart, int]

    @property
    def _levels(self) -> list[int]:
        return sorted(self.phases.forward.keys() | self.global_bytes.steps)

    def first_read(self) -> Iterator[PeakPoint]:
        """The first read of images that are decoded whole, if there are any."""
        if self.global_bytes.reading.opening:
            opening = self.global_bytes.opening
            yield self.found.point("the first read", ("read", 0), opening, 0, NO_STEP)

    def forward(self) -> Iterator[PeakPoint]:
        """Phases and global values, level by level."""
        held = self.found.held
        for level in self._levels:
            if level in self.phases.forward:
                step = self.phases.forward[level]
                yield self._point(f"phase {level}, forward", ("forward", level), held.forward, level, step)
            if level in self.global_bytes.steps:
                yield self._segment(level, "forward", held.forward)

    def backward(self) -> Iterator[PeakPoint]:
        """Global values and phases in reverse, each phase after the stages that rematerialise maps for it."""
        held = self.found.held
        for level in reversed(self._levels):
            if level in self.global_bytes.steps and self.global_bytes.differentiated:
                yield self._segment(level, "backward", held.segments)
            if level not in self.phases.backward:
                continue
            for dropped, step in self.phases.again.get(level, ()):
                name = f"phase {dropped} again, before phase {level}, backward"
                yield self._point(name, ("again", dropped), held.backward, level, step)
            step = self.phases.backward[level]
            yield self._point(f"phase {level}, backward", ("backward", level), held.backward, level, step)

    def _segment(self, level: int, direction: str, held: LevelBytes) -> PeakPoint:
        """The point of the global values of a level, with their step in the worse direction."""
        of = self.global_bytes
        name = "the resident tail" if level == of.last else f"global values of level {level}"
        part = (f"segment {direction}", level)
        return self._point(f"{name}, {direction}", part, held, level, of.steps[level])

    def _point(self, name: str, part: PassPart, held: LevelBytes, level: int, step: StepBytes) -> PeakPoint:
        """The point of one step, with the tiles that are moved during it."""
        if part in self.moving:
            step = replace(step, terms=(*step.terms, MemoryTerm(ON_THE_WAY, self.moving[part])))
        return self.found.point(name, part, held, level, step)
