"""Projected bytes: what carrying out a plan takes, as sums of named terms.

All figures are bytes above the baseline of a loaded model. A stage's step is projected for its largest
tile; what lives across steps (stored maps, gradients, global values) is added per phase, and the plan's
projection is that of its worst moment.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from types import MappingProxyType

import numpy as np

from streamcnn.graph.costs import CallBytes
from streamcnn.graph.program import Kind
from streamcnn.plan.level_bytes import HeldBytes, Ints, LevelBytes
from streamcnn.plan.plan import PassPart
from streamcnn.plan.reading import NO_READING, READING, BatchCost
from streamcnn.plan.storage import MemoryTerm
from streamcnn.plan.stored_bytes import StoredBytes
from streamcnn.planning.backends import Backend
from streamcnn.planning.backends.base import Bytes
from streamcnn.planning.global_bytes import GlobalBytes
from streamcnn.planning.resident_bytes import StepBytes, total_bytes
from streamcnn.planning.staging import Stage
from streamcnn.planning.tiling import Outline, TiledStage

NO_STEP = StepBytes((), "", 0)
"""Where no operator runs."""
ON_THE_WAY = "tiles on the way"
"""The name of the term for tiles that are moved while another one is computed."""
REDUCTION_COPIES = 2
"""Temporary copies of a tile's own part while a reduction or its gradient is worked out, at least."""


@dataclass(frozen=True, slots=True)
class PeakPoint:
    """Projected bytes at one point of a pass."""

    name: str
    part: PassPart
    operator: str
    """The operator at which most is held."""
    terms: tuple[MemoryTerm, ...]
    reading: int
    """Bytes that reading a region of an image takes beside tensors, then or at another moment of the step."""

    @property
    def nbytes(self) -> int:
        """The sum of the terms."""
        return total_bytes(self.terms)

    def beside_tensors(self, names: Collection[str]) -> int:
        """The most bytes of the terms of these ``names`` at any moment of the step, and of what is read."""
        others = total_bytes(term for term in self.terms if term.name in names and term.name != READING)
        return others + self.reading


@dataclass(frozen=True, slots=True, eq=False)
class PassBytes:
    """Projected bytes at any point of a pass: in numbers for the search, and with their terms for the plan.

    Either is what is held beside a step at its level, the step itself, and what the allocator loses.
    """

    backend: Backend
    held: HeldBytes
    holes: int | None
    """What is lost at every point where freed blocks are kept for reuse; None where they are given back."""

    @classmethod
    def of(
        cls,
        global_bytes: GlobalBytes,
        others: HeldBytes,
        num_kernels: Ints,
        num_stages: int,
        reusable: int | None,
    ) -> PassBytes:
        """A pass in so many stages.

        Parameters
        ----------
        others
            What is held beside steps but for what the backend keeps.
        num_kernels
            By level: different convolutions of its phase.
        reusable
            The most bytes of a step in blocks that are kept for reuse; None where they are given back.
        """
        backend = global_bytes.backend
        holes = (
            None if reusable is None else backend.keeping.of_pass(reusable, global_bytes.reusable, num_stages)
        )
        return cls(backend, global_bytes.kept(num_kernels) + others, holes)

    def lost(self, nbytes: Bytes) -> Bytes | int:
        """What the allocator loses while a step of ``nbytes`` runs."""
        return self.backend.returning.of_step(nbytes) if self.holes is None else self.holes

    def at(self, held: LevelBytes, levels: Ints | int, steps: Bytes) -> Ints:
        """The sums at points of ``levels`` with steps of so many bytes; broadcast against each other."""
        sums: Ints = held.total[levels] + steps + self.lost(steps)
        return sums

    def point(self, name: str, part: PassPart, held: LevelBytes, level: int, step: StepBytes) -> PeakPoint:
        """One point with its terms, whose sum is :meth:`at`."""
        waste = MemoryTerm(self.backend.fragmentation, self.lost(step.nbytes))
        return PeakPoint(name, part, step.operator, (*held.at(level), *step.terms, waste), step.reading)

    def segment_point(
        self, global_bytes: GlobalBytes, level: int, direction: str, held: LevelBytes
    ) -> PeakPoint:
        """The point of the global values of a level, with the larger of their steps."""
        name = "the resident tail" if level == global_bytes.last else f"global values of level {level}"
        part = (f"segment {direction}", level)
        return self.point(f"{name}, {direction}", part, held, level, global_bytes.steps[level])


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

    They are the first read of images that are decoded whole, every phase and the global values of every level
    forward, of which the last are the resident tail, and the same backward, where a phase is differentiated,
    with the stages that are ``rematerialised`` before it, which come with its level. ``moving`` has the parts
    in which tiles are moved while others are computed, with what that takes.
    """

    def point(name: str, part: PassPart, held: LevelBytes, level: int, step: StepBytes) -> PeakPoint:
        if part in moving:
            step = replace(step, terms=(*step.terms, MemoryTerm(ON_THE_WAY, moving[part])))
        return found.point(name, part, held, level, step)

    pairs = [
        steps(
            stage,
            global_bytes.backend,
            global_bytes.reading,
            backward=is_differentiated(stage.stage, global_bytes.differentiated),
        )
        for stage in tiled
    ]
    again: dict[int, list[tuple[int, StepBytes]]] = {}
    for before, stage in rematerialised:
        step, _ = steps(stage, global_bytes.backend, global_bytes.reading, backward=False)
        again.setdefault(before, []).append((stage.stage.level, step))
    num_kernels = np.zeros_like(global_bytes.num_kernels)
    for stage in (*tiled, *(stage for _, stage in rematerialised)):
        num_kernels[stage.stage.level] += stage.num_kernels
    every = (*chain(*pairs), *(step for each in again.values() for _, step in each))
    reusable = max((step.reusable for step in every if step is not None), default=0)
    found = PassBytes.of(
        global_bytes,
        global_bytes.held + stored.held,
        num_kernels,
        len(tiled) + len(rematerialised),
        reusable if reuses_blocks else None,
    )
    held = found.held
    points = []
    if global_bytes.reading.opening:
        points.append(found.point("the first read", ("read", 0), global_bytes.opening, 0, NO_STEP))
    by_level = {stage.stage.level: each for stage, each in zip(tiled, pairs, strict=True)}
    levels = sorted(by_level.keys() | global_bytes.steps)
    for level in levels:
        if level in by_level:
            step, _ = by_level[level]
            points.append(point(f"phase {level}, forward", ("forward", level), held.forward, level, step))
        if level in global_bytes.steps:
            points.append(found.segment_point(global_bytes, level, "forward", held.forward))
    for level in reversed(levels):
        if level in global_bytes.steps and global_bytes.differentiated:
            points.append(found.segment_point(global_bytes, level, "backward", held.segments))
        _, after = by_level.get(level, (None, None))
        if after is not None:
            for dropped, step in again.get(level, ()):
                name = f"phase {dropped} again, before phase {level}, backward"
                points.append(point(name, ("again", dropped), held.backward, level, step))
            points.append(point(f"phase {level}, backward", ("backward", level), held.backward, level, after))
    return points


def is_differentiated(stage: Stage, differentiated: Collection[str]) -> bool:
    """Whether the backward pass differentiates the stage."""
    given = (*stage.stored, *stage.reductions)
    return not stage.rematerialises and any(name in differentiated for name in given)


def steps(
    tiled: TiledStage, backend: Backend, reading: BatchCost = NO_READING, *, backward: bool
) -> tuple[StepBytes, StepBytes | None]:
    """The largest tile of a stage forward and, if wanted, backward."""
    tile = _LargestTile(tiled, backend, reading)
    return _forward_step(tile), _backward_step(tile) if backward else None


def overhead_terms(outline: Outline, backend: Backend, *, backward: bool) -> tuple[MemoryTerm, ...]:
    """What the backend takes for a tile whatever its size, for its values and, backward, their gradients."""
    # The products of gradients mostly find buffers of their sizes there.
    return backend.step_terms((3 if backward else 1) * outline.num_convolutions, outline.num_products)


def _forward_step(tile: _LargestTile) -> StepBytes:
    """One tile without autograd: values live from their operator to their last use."""
    tiled, owned = tile.tiled, set(tile.tiled.outline.owned)
    most = _PeakTracker()
    live = beside_reading = 0
    for name in tiled.stage.nodes:
        if tile.reads_image(name):
            beside_reading = max(beside_reading, live)
        live += tile.made(name)
        most.offer(name, live + tile.padded(name), tile.workspaces[name])
        if name in owned:
            most.offer(name, live, tile.observed(name))
        live -= sum(tile.made(dead) for dead in tiled.outline.releases.get(name, ()))
    regions = MemoryTerm("input regions", tile.reads())
    terms = (
        regions,
        MemoryTerm("live activations", most.held),
        MemoryTerm("operator workspace", most.workspace),
        MemoryTerm("parameters that autocast casts", tiled.outline.cast_bytes),
    )
    step = tile.step(terms, most.operator, backward=False)
    return tile.or_reading(step, (regions, MemoryTerm("live activations", beside_reading)), backward=False)


def _backward_step(tile: _LargestTile) -> StepBytes:
    """One tile with autograd: values are kept, gradients flow back operator by operator."""
    tiled = tile.tiled
    skipped = frozenset(tiled.outline.skipped)
    most = _PeakTracker()
    values = 0
    for name in tiled.stage.nodes:
        values += tile.padded(name)
        if name not in skipped:
            values += tile.made(name) + tile.saved_beside(name)
            most.offer(name, 0, tile.workspaces[name])
        most.offer(name, tile.nbytes[name] + tile.operands[name], tile.backward_workspaces[name])
    own = [tile.own(name) for name in tiled.outline.owned]
    # What arrives at the tile is worked out before anything flows back.
    most.offer(most.operator, 0, max(map(tile.observed, tiled.outline.owned), default=0))
    before = (
        MemoryTerm("input regions and their gradients", 2 * tile.reads()),
        MemoryTerm("autograd graph of a tile", values),
    )
    terms = (
        *before,
        MemoryTerm("arriving gradients", sum(own)),
        MemoryTerm("gradients of activations", most.held),
        MemoryTerm("operator workspace", most.workspace),
        # The tile's own, and its copies in the layouts that convolutions work in.
        MemoryTerm("a tile's parameter gradients", 3 * tiled.outline.parameter_bytes),
    )
    return tile.or_reading(tile.step(terms, most.operator, backward=True), before, backward=True)


@dataclass(slots=True)
class _PeakTracker:
    """The operator at which most is held so far."""

    operator: str = ""
    held: int = 0
    workspace: int = 0

    def offer(self, operator: str, held: int, workspace: int) -> None:
        """Take an operator if it holds more."""
        if held + workspace > self.held + self.workspace:
            self.operator, self.held, self.workspace = operator, held, workspace


class _LargestTile:
    """Bytes of maps on the largest tile of a stage."""

    def __init__(self, tiled: TiledStage, backend: Backend, reading: BatchCost) -> None:
        self.backend = backend
        self.reading = reading
        self.program = tiled.program
        self.tiled = tiled
        self.images = [name for name in tiled.program.images if name in tiled.stage.inputs]
        """The images of which the stage reads regions."""
        outline, rows, cols = tiled.outline, tiled.rows.largest, tiled.cols.largest
        self.nbytes = {name: each * rows[name] * cols[name] for name, each in outline.position_bytes.items()}
        """Bytes of what a tile needs of each map."""
        self.operands = {
            name: sum([self.nbytes[operand] for operand in operands])
            for name, operands in outline.map_operands.items()
        }
        """Bytes of the map operands of each operator."""
        calls = {
            name: CallBytes(
                self.operands[name],
                self.nbytes[name],
                outline.weights[name],
                tiled.program.nodes[name].tensor.dtype.itemsize,
            )
            for name in outline.costs
        }
        self.workspaces = {name: backend.workspace(cost, calls[name]) for name, cost in outline.costs.items()}
        """Bytes that each operator takes besides operands, parameters and result."""
        self.backward_workspaces = {
            name: backend.backward_workspace(cost, calls[name]) for name, cost in outline.costs.items()
        }
        """The same of its backward pass."""

    def made(self, name: str) -> int:
        """Bytes that an operator's value adds: none if it overwrites its operand."""
        return 0 if name in self.tiled.in_place else self.nbytes[name]

    def own(self, name: str) -> int:
        """Bytes of a tile's own part of an output."""
        return self.tiled.outline.position_bytes[name] * math.prod(self.tiled.largest_own(name))

    def observed(self, name: str) -> int:
        """Bytes taken while an output's own part is reduced, or its gradient is put together."""
        own, itemsize = self.own(name), self.program.nodes[name].tensor.dtype.itemsize
        fed = [rule.workspace(own // itemsize, itemsize) for rule in self.tiled.outline.fed.get(name, ())]
        return max((REDUCTION_COPIES * own, *fed))

    def saved_beside(self, name: str) -> int:
        """Bytes of what autograd saves of an operator that is neither operand nor result."""
        rows, cols = self.tiled.largest(name)
        return self.tiled.outline.beside_bytes[name] * rows * cols

    def padded(self, name: str) -> int:
        """Bytes of the padded copies that an operator reads at the border of the map."""
        local = self.program.nodes[name].local
        assert local is not None
        return 0 if local.pointwise or local.fill is None else self.operands[name]

    def reads(self) -> int:
        """Bytes of the input regions: stored ones are read or made contiguous, others converted too."""
        nodes = self.program.nodes
        return sum(
            self.nbytes[name] * (1 if nodes[name].kind is Kind.LOCAL else 2)
            for name in self.tiled.stage.inputs
        )

    def reads_image(self, name: str) -> bool:
        """Whether an operator reads a region of the image, or of a map beside it."""
        local = self.program.nodes[name].local
        assert local is not None
        return any(image in local.accesses for image in self.images)

    def or_reading(self, step: StepBytes, beside: tuple[MemoryTerm, ...], *, backward: bool) -> StepBytes:
        """The step with what is read of images, at the moment of reading if that takes more.

        Parameters
        ----------
        beside
            What is held then.
        """
        found = {n: self.reading.of_map(n, self.tiled.largest(n)).transient for n in self.images}
        image = max(found, key=found.__getitem__, default="")
        nbytes = found.get(image, 0)
        if not nbytes:
            return step
        overhead = overhead_terms(self.tiled.outline, self.backend, backward=backward)
        read = StepBytes((*beside, MemoryTerm(READING, nbytes), *overhead), image, step.reusable)
        return replace(read if read.nbytes > step.nbytes else step, reading=nbytes)

    def step(self, terms: tuple[MemoryTerm, ...], operator: str, *, backward: bool) -> StepBytes:
        """A step of these terms and of what it takes beside tensors."""
        overhead = overhead_terms(self.tiled.outline, self.backend, backward=backward)
        return StepBytes((*terms, *overhead), operator, int(self._reusable_share() * total_bytes(terms)))

    def _reusable_share(self) -> float:
        """The share of the tile's bytes that is in blocks which may be kept when they are freed."""
        sizes = self.nbytes.values()
        total, largest = sum(sizes), self.backend.reusable_bytes
        return sum([size for size in sizes if size < largest]) / total if total else 0.0
