"""Carry out a plan: forward tile by tile, then backward phase by phase.

Forward, per phase and tile: read the inputs' regions, run the operators without autograd, write the
tile's own part of each checkpoint, add to the reductions' partial results. Backward, phases in reverse:
recompute the tile with autograd on, differentiate it given the gradients of its own parts, and add the
results to the gradient maps of its inputs, where overlapping halos add up.

Everything that is decided is in the plan; nothing of the user's module is changed here.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from streamcnn.execution.backward_tile import BackwardTile
from streamcnn.execution.global_graph import GlobalGraph, Results
from streamcnn.execution.interpreter import TileRun
from streamcnn.geometry.regions import Region
from streamcnn.geometry.windows import crop
from streamcnn.graph.autocast import autocast, autocast_state
from streamcnn.graph.ops.reduction_types import Partials, Reduction
from streamcnn.graph.program import Axes, Kind, Node, Program
from streamcnn.plan.plan import Phase, Plan, StepShape
from streamcnn.plan.storage import Tier
from streamcnn.stores import Store, StoreSpec


class ImageReader(Protocol):
    """Hands out regions of the batch of images, ready for the model."""

    device: torch.device
    """Where the pixels are delivered."""

    def read(self, region: Region) -> Tensor:
        """The pixels of ``region``, (N, C, h, w) in the model's dtype on the compute device."""


@dataclass(frozen=True, slots=True)
class PassEvent:
    """A part of a pass begins or ends; parts do not overlap."""

    part: str
    """``"phase"``, or ``"segment"``: the global values of a level, the resident tail among them."""
    level: int
    direction: str
    """``"forward"`` or ``"backward"``."""
    begins: bool


Observer = Callable[[PassEvent], None]
"""Told of every event, in the thread that runs the pass."""

OpenStore = Callable[[StoreSpec, Tier, tuple[int, int]], Store]
"""Opens an empty store, given a tile's extents as a hint for chunking."""


@dataclass(frozen=True, slots=True)
class PhaseReport:
    """What one pass over one phase took."""

    level: int
    direction: str
    num_tiles: int
    seconds: float
    bytes_read: int
    bytes_written: int


def _nothing(shape: StepShape) -> None:
    """What is done after a step where nobody wants to know."""


class Execution:
    """One forward pass of a plan and, if it records, the backward pass that belongs to it.

    ``after_step`` is called with the step's shape after each tile of a phase and after each segment, and ends
    the pass by raising.
    """

    def __init__(
        self,
        program: Program,
        plan: Plan,
        states: Mapping[str, Tensor],
        image: ImageReader,
        open_store: OpenStore,
        *,
        after_step: Callable[[StepShape], None] = _nothing,
        observer: Observer | None = None,
    ) -> None:
        self.program = program
        self.plan = plan
        self.image = image
        self.global_graph = GlobalGraph(program, states, plan.differentiated, plan.levels)
        self.reports: list[PhaseReport] = []
        self._open_store = open_store
        self._after_step = after_step
        self._observer = observer
        self.device = image.device
        self.autocast = autocast_state(image.device)
        self._phases = {phase.level: phase for phase in plan.phases}
        self._segments = {segment.level: segment for segment in plan.segments}
        self._levels = sorted({0, *self._phases, *self._segments})
        self._checkpoints: dict[str, Store] = {}
        self._gradients: dict[str, Store] = {}
        self._finished: dict[str, Results] = {}
        self._reduction_gradients: dict[str, tuple[Tensor | None, ...]] = {}

    # --- forward -------------------------------------------------------------------------------------

    def forward(self) -> dict[str, Tensor]:
        """Run every phase and segment; the global values by name, the model's outputs among them."""
        try:
            for level in self._levels:
                if level in self._phases:
                    with self._timed(self._phases[level], "forward"):
                        self._forward_phase(self._phases[level])
                if level in self._segments:
                    with self._observed("segment", level, "forward"), autocast(self.device, self.autocast):
                        self.global_graph.run(self._segments[level], self._barrier, record=self.plan.training)
                    self._after_step(("segment", "forward", level, 0, 0))
                self._free_checkpoints(level)
        except BaseException:
            self.close()
            raise
        return self.global_graph.values

    def _forward_phase(self, phase: Phase) -> None:
        for name in phase.stored:
            self._checkpoints[name] = self._open(name, self.plan.stores[name].tier)
        feeds = _feeds(self.program, phase)
        parts: dict[str, Partials] = {}
        with torch.no_grad(), autocast(self.device, self.autocast):
            for row in range(len(phase.rows)):
                for col in range(len(phase.cols)):
                    self._forward_tile(TileRun(self.program, phase, row, col), feeds, parts)
                    self._after_step(phase.shape("forward", row, col))
        for name in phase.reductions:
            node = self.program.nodes[name]
            assert node.reduction is not None
            dtype = self.program.nodes[node.operands[0]].tensor.dtype
            self._finished[name] = node.reduction.finish(parts[name], dtype)

    def _forward_tile(
        self, tile: TileRun, feeds: Mapping[str, tuple[str, ...]], parts: dict[str, Partials]
    ) -> None:
        phase = tile.phase

        def observe(name: str, value: Tensor) -> Tensor:
            if name in phase.stored or name in feeds:
                own = phase.own(tile.row, tile.col, name)
                share = crop(value, self.axes(name), phase.needed(tile.row, tile.col, name), own)
                if name in phase.stored:
                    self._checkpoints[name].write(own, share)
                for reduction in feeds.get(name, ()):
                    self._add_partial(reduction, share, own, parts)
            return value

        for name in feeds:
            if name in phase.inputs:
                observe(name, self.fetch(name, phase.needed(tile.row, tile.col, name)))
        tile.run(self.fetch, self.global_graph.values, observe)

    def _add_partial(self, name: str, share: Tensor, own: Region, parts: dict[str, Partials]) -> None:
        reduction = self._reduction(name)
        partial = reduction.partial(share, own)
        parts[name] = reduction.merge(parts[name], partial) if name in parts else partial

    def _barrier(self, node: Node) -> Results:
        """The results of a reduction, or the whole of a gathered map."""
        if node.kind is Kind.REDUCTION:
            return self._finished.pop(node.name)
        source = self.program.nodes[node.operands[0]]
        return (self.fetch(source.name, Region.whole(source.size)),)

    def _free_checkpoints(self, level: int) -> None:
        for name in [n for n in self._checkpoints if self.plan.stores[n].last_reader <= level]:
            if not self.plan.stores[name].kept:
                self._checkpoints.pop(name).close()

    # --- backward ------------------------------------------------------------------------------------

    def backward(self, gradients: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Gradients of the states and of the image by node name, given those of the model's outputs."""
        try:
            for name, gradient in gradients.items():
                self.global_graph.accumulate(name, gradient)
            for level in reversed(self._levels):
                with self._observed("segment", level, "backward"):
                    self._backward_segment(level)
                self._after_step(("segment", "backward", level, 0, 0))
                if level in self._phases and self._phases[level].differentiated:
                    with self._timed(self._phases[level], "backward"):
                        self._backward_phase(self._phases[level])
                self._free_level(level)
            found = {
                n: self.global_graph.take(n) for n in self.program.states if n in self.global_graph.gradients
            }
            if self.program.image in self._gradients:
                found[self.program.image] = self._whole_gradient(self.program.image)
            return found
        finally:
            self.close()

    def _backward_segment(self, level: int) -> None:
        for name in [n for n in self._gradients if self.program.nodes[n].kind is Kind.PROMOTED]:
            source = self.program.nodes[name].operands[0]
            if self.plan.levels[source] == level:
                self.global_graph.accumulate(source, self._whole_gradient(name))
        with autocast(self.device, None):
            barriers = self.global_graph.backward(level)
        for name, grads in barriers.items():
            node = self.program.nodes[name]
            if node.kind is Kind.REDUCTION:
                self._reduction_gradients[name] = grads
            elif grads[0] is not None:
                source = node.operands[0]
                whole = Region.whole(self.program.nodes[source].size)
                self._gradient_store(source).add(whole, grads[0])

    def _backward_phase(self, phase: Phase) -> None:
        leaves = self.global_graph.leaves(_global_operands(self.program, phase))
        feeds = _feeds(self.program, phase)
        for row in range(len(phase.rows)):
            for col in range(len(phase.cols)):
                tile = TileRun(self.program, phase, row, col, frozenset(phase.skipped))
                BackwardTile(self, tile, feeds, leaves).run()
                self._after_step(phase.shape("backward", row, col))

    def share_gradient(
        self, phase: Phase, own: Region, name: str, reductions: tuple[str, ...], share: Tensor
    ) -> Tensor | None:
        """What arrives at a tile's own part of ``name``: its gradient map's and its reductions'."""
        total: Tensor | None = None
        if name in phase.stored and name in self._gradients:
            total = self._gradients[name].read(own)
        for reduction in reductions:
            grads = self._reduction_gradients.get(reduction)
            if grads is None:
                continue
            values = self._checkpoints[name].read(own) if name in phase.stored else share.detach()
            part = self._reduction(reduction).gradient(
                values, own, self.global_graph.results[reduction], grads
            )
            if total is None:
                total = part.expand_as(share)
            else:
                # A formula's result as large as the tile is its own; one that broadcasts is not.
                total = part.add_(total) if part.shape == share.shape else total + part
        return total

    def add_gradient(self, name: str, part: Region, gradient: Tensor) -> None:
        """Add to the gradient map of an input."""
        self._gradient_store(name).add(part, gradient)

    def _gradient_store(self, name: str) -> Store:
        if name not in self._gradients:
            planned = self.plan.stores.get(name)
            self._gradients[name] = self._open(name, planned.gradient_tier if planned else Tier.MEMORY)
        return self._gradients[name]

    def _whole_gradient(self, name: str) -> Tensor:
        store = self._gradients.pop(name)
        gradient = store.read(Region.whole(self.program.nodes[name].size)).clone()
        store.close()
        return gradient

    def _free_level(self, level: int) -> None:
        """Drop the checkpoints of a level and their gradients: its phase was their last reader."""
        phase = self._phases.get(level)
        for name in phase.stored if phase is not None else ():
            for stores in (self._checkpoints, self._gradients):
                if name in stores:
                    stores.pop(name).close()

    @property
    def held_bytes(self) -> int:
        """Bytes of memory that the stored maps take until the backward pass."""
        tiers = {name: self.plan.stores[name].tier for name in self._checkpoints}
        return sum(self._checkpoints[n].spec.nbytes for n, tier in tiers.items() if tier is not Tier.DISK)

    # --- shared --------------------------------------------------------------------------------------

    def close(self) -> None:
        """Free every store. Closing again does nothing."""
        for stores in (self._checkpoints, self._gradients):
            while stores:
                stores.popitem()[1].close()

    def fetch(self, name: str, part: Region) -> Tensor:
        """A region of one of a phase's inputs; not to be written to."""
        node = self.program.nodes[name]
        if node.kind is Kind.IMAGE:
            return self.image.read(part)
        if node.kind is Kind.PROMOTED:
            value: Tensor = self.global_graph.values[node.operands[0]]
            return crop(value, self.axes(name), Region.whole(node.size), part)
        return self._checkpoints[name].read(part)

    def _open(self, name: str, tier: Tier) -> Store:
        node = self.program.nodes[name]
        spec = StoreSpec(node.tensor.shape, node.tensor.dtype, self.axes(name))
        planned = self.plan.stores.get(name)
        return self._open_store(spec, tier, planned.tile if planned else node.size)

    def axes(self, name: str) -> Axes:
        """Spatial axes of a map."""
        axes = self.program.nodes[name].axes
        assert axes is not None
        return axes

    def _reduction(self, name: str) -> Reduction:
        reduction = self.program.nodes[name].reduction
        assert reduction is not None
        return reduction

    @contextmanager
    def _timed(self, phase: Phase, direction: str) -> Iterator[None]:
        before = self._bytes_moved()
        start = time.perf_counter()
        with self._observed("phase", phase.level, direction):
            yield
        seconds = time.perf_counter() - start
        read, written = (now - then for now, then in zip(self._bytes_moved(), before, strict=True))
        self.reports.append(PhaseReport(phase.level, direction, phase.num_tiles, seconds, read, written))

    @contextmanager
    def _observed(self, part: str, level: int, direction: str) -> Iterator[None]:
        """Tell the observer when a part begins, and when it ends or fails."""
        if self._observer is None:
            yield
            return
        self._observer(PassEvent(part, level, direction, begins=True))
        try:
            yield
        finally:
            self._observer(PassEvent(part, level, direction, begins=False))

    def _bytes_moved(self) -> tuple[int, int]:
        stores = [*self._checkpoints.values(), *self._gradients.values()]
        return sum(s.bytes_read for s in stores), sum(s.bytes_written for s in stores)


def _feeds(program: Program, phase: Phase) -> dict[str, tuple[str, ...]]:
    """The reductions fed by each map of the phase."""
    feeds: dict[str, list[str]] = {}
    for name in phase.reductions:
        feeds.setdefault(program.nodes[name].operands[0], []).append(name)
    return {name: tuple(reductions) for name, reductions in feeds.items()}


def _global_operands(program: Program, phase: Phase) -> tuple[str, ...]:
    names: dict[str, None] = {}
    for name in phase.nodes:
        node = program.nodes[name]
        assert node.local is not None
        names.update(dict.fromkeys(n for n in node.operands if n not in node.local.accesses))
    return tuple(names)
