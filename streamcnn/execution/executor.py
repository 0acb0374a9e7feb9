"""Carry out a plan: forward tile by tile, then backward phase by phase.

In the forward pass, each tile of a phase gives its own part of each checkpoint and partial results of the
reductions. The backward pass runs the phases in reverse. It computes each tile again with autograd on, and
differentiates it given the gradients of its own parts. The results are gradients of the tile's inputs, which
add up where halos overlap. A :class:`~streamcnn.execution.step.Step` says what a tile computes. Dropped
checkpoints are written again, as in the forward pass, before the first phase that needs them.

All decisions are in the plan, and nothing here changes the user's module.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property, lru_cache, partial
from itertools import pairwise, zip_longest

import torch
from torch import Tensor

from streamcnn.execution.build_step import Arrivals
from streamcnn.execution.combiner import Combiner
from streamcnn.execution.exchange import Exchange, Tile, fetch
from streamcnn.execution.global_graph import GlobalGraph, Results, SegmentRunner
from streamcnn.execution.maps import ImageReader, Maps, OpenStore
from streamcnn.execution.step import Compute, MakeCompute, Step
from streamcnn.execution.steps import Steps
from streamcnn.graph.autocast import autocast, autocast_state
from streamcnn.graph.ops.late_checks import checked_at_the_end
from streamcnn.graph.program import Kind, Node, Program
from streamcnn.plan.plan import PassPart, Phase, Plan, StepShape, TileKind
from streamcnn.plan.storage import Tier
from streamcnn.stores import Incoming, PlainTransfers, Store, Transfers

_STEPS = 64
"""Steps of a phase that are cached: there are more kinds of tiles only where each tile is its own kind."""

AGAIN = "phase again"
"""`PassEvent.part` of an event in which a phase rematerialises maps."""


@dataclass(frozen=True, slots=True)
class PassEvent:
    """The beginning or end of a part of a pass; parts do not overlap."""

    part: str
    """``"phase"``; `AGAIN`, if the backward pass runs a phase of the forward pass again for maps that were
    dropped; or ``"segment"``, the global values of a level, the resident tail among them."""
    level: int
    direction: str
    """``"forward"`` or ``"backward"``."""
    begins: bool


Observer = Callable[[PassEvent], None]
"""Called with every event, in the thread that runs the pass."""


@dataclass(frozen=True, slots=True)
class PhaseReport:
    """Tiles, seconds and bytes of one run of a phase."""

    level: int
    direction: str
    """``"forward"``, ``"backward"``, or ``"again"`` for a phase that rematerialises maps."""
    num_tiles: int
    seconds: float
    bytes_read: int
    bytes_written: int


def _nothing(of: PassPart | StepShape) -> None:
    """Do nothing: the default before a part and after a step."""


@dataclass(frozen=True, slots=True)
class PassHooks:
    """Functions to call in the course of a pass, in the thread that runs it."""

    before_part: Callable[[PassPart], None] = _nothing
    """Called before the tiles of a phase and before a segment, in each direction."""
    after_step: Callable[[StepShape], None] = _nothing
    """Called with the step's shape after each tile of a phase and after each segment. It may end the pass by
    raising."""
    observer: Observer | None = None
    """Called when parts of the pass begin and end."""


_NO_HOOKS = PassHooks()


class Execution:
    """One forward pass of a plan and, if the plan trains, the backward pass that belongs to it.

    Parameters
    ----------
    states
        Parameters, buffers and other tensors that the program reads, by node name.
    images
        The image, and maps that are read by regions beside it, by node name.
    open_store
        Opens the stores of the pass.
    transfers
        Moves tiles to and from these stores; nothing overlaps by default.
    steps
        The plan's steps, if an earlier pass has made some.
    make_compute
        Makes the function that computes a step.
    runner
        Carries out segments where it can; otherwise they run operator by operator.
    hooks
        Functions to call in the course of the pass.
    """

    def __init__(
        self,
        program: Program,
        plan: Plan,
        states: Mapping[str, Tensor],
        images: Mapping[str, ImageReader],
        open_store: OpenStore,
        *,
        transfers: Transfers | None = None,
        steps: Steps | None = None,
        make_compute: MakeCompute,
        runner: SegmentRunner | None = None,
        hooks: PassHooks = _NO_HOOKS,
    ) -> None:
        self.program = program
        self.plan = plan
        self._steps = steps or Steps(program, plan)
        self.global_graph = GlobalGraph(program, states, plan.differentiated, self._steps.last_uses, runner)
        self.reports: list[PhaseReport] = []
        self._make_compute = make_compute
        self._hooks = hooks
        self.device = images[program.image].device
        self._transfers = transfers or PlainTransfers(self.device)
        self.autocast = autocast_state(self.device)
        self._phases = {phase.level: phase for phase in plan.phases}
        self._segments = {segment.level: segment for segment in plan.segments}
        self._levels = sorted({0, *self._phases, *self._segments})
        self._maps = Maps(program, plan, images, self.global_graph.values, open_store)
        self._combiner = Combiner(program, self._maps, self.global_graph)
        self._exchange = Exchange(self._maps, self.global_graph, self._combiner)
        self._finished: dict[str, Results] = {}

    @cached_property
    def _following(self) -> dict[tuple[str, int], Phase]:
        """By direction and phase: the phase that is run next in the same pass."""
        return {
            (run, id(phase)): following
            for runs in (self._runs_forward(), self._runs_backward())
            for (run, phase), (_, following) in pairwise(runs)
        }

    def _runs_forward(self) -> Iterator[tuple[str, Phase]]:
        return (("forward", self._phases[level]) for level in self._levels if level in self._phases)

    def _runs_backward(self) -> Iterator[tuple[str, Phase]]:
        for level in reversed(self._levels):
            yield from (("again", phase) for phase in self.plan.rematerialised.get(level, ()))
            if level in self._phases and self._phases[level].differentiated:
                yield "backward", self._phases[level]

    # --- forward -------------------------------------------------------------------------------------

    def forward(self) -> dict[str, Tensor]:
        """Run every phase and segment; return the global values by name, the model's outputs among them."""
        try:
            for level in self._levels:
                if level in self._phases:
                    self._forward_phase(self._phases[level])
                if level in self._segments:
                    self._hooks.before_part(("segment forward", level))
                    with self._observed("segment", level, "forward"), autocast(self.device, self.autocast):
                        self.global_graph.run(self._segments[level], self._barrier, record=self.plan.training)
                        self._maps.settle_images()
                    self._hooks.after_step(("segment", "forward", level, 0, 0))
                self._maps.free_read(level)
            # Between the passes the stores may be collected with the pass: no copy may use them then.
            self._transfers.drain()
        except BaseException:
            self.close()
            raise
        return self.global_graph.values

    def _forward_phase(self, phase: Phase) -> None:
        with self._timed(phase, "forward"):
            self._write_checkpoints(phase, "forward")
            for name in phase.reductions:
                node = self.program.nodes[name]
                assert node.reduction is not None
                dtype = self.program.nodes[node.operands[0]].tensor.dtype
                self._finished[name] = node.reduction.finish(self._combiner.take_merged(name), dtype)

    def _write_checkpoints(self, phase: Phase, direction: str) -> None:
        for name in phase.stored:
            self._maps.open_checkpoint(name)
        self._run_tiles(phase, direction, partial(self._steps.forward, phase))

    def _barrier(self, node: Node) -> Results:
        """The results of a reduction, or the whole of a gathered map."""
        if node.kind is Kind.REDUCTION:
            return self._finished.pop(node.name)
        return (self._maps.read_whole(node.operands[0]),)

    # --- backward ------------------------------------------------------------------------------------

    def backward(self, gradients: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Run backward from the gradients of the outputs; return those of states and image by node name."""
        try:
            for name, gradient in gradients.items():
                self.global_graph.accumulate(name, gradient)
            for level in reversed(self._levels):
                if level in self._segments:
                    self._hooks.before_part(("segment backward", level))
                with self._observed("segment", level, "backward"):
                    self._backward_segment(level)
                self._hooks.after_step(("segment", "backward", level, 0, 0))
                for phase in self.plan.rematerialised.get(level, ()):
                    with self._timed(phase, "again"):
                        self._write_checkpoints(phase, "again")
                if level in self._phases:
                    self._backward_phase(self._phases[level])
            found = {
                n: self.global_graph.take(n) for n in self.program.states if n in self.global_graph.gradients
            }
            if self.program.image in self._maps.with_gradient:
                found[self.program.image] = self._maps.take_gradient(self.program.image)
            return found
        finally:
            self.close()

    def _backward_segment(self, level: int) -> None:
        for name in self._maps.with_gradient:
            node = self.program.nodes[name]
            if node.kind is Kind.PROMOTED and self.plan.levels[node.operands[0]] == level:
                self.global_graph.accumulate(node.operands[0], self._maps.take_gradient(name))
        with autocast(self.device, None):
            gathered = self.global_graph.backward(level)
        for name, gradient in gathered.items():
            self._maps.add_whole_gradient(self.program.nodes[name].operands[0], gradient)

    def _backward_phase(self, phase: Phase) -> None:
        if phase.differentiated:
            with self._timed(phase, "backward"):
                make_step = partial(self._steps.backward, phase, self._arrivals(phase))
                self._run_tiles(phase, "backward", make_step)
        # The phase was the last reader of the maps that it stored.
        self._maps.free(phase.stored)

    def _arrivals(self, phase: Phase) -> Arrivals:
        """The gradients that a phase has received, which are all, since all later phases are done."""
        with_gradient, terms = self._maps.with_gradient, self.global_graph.gradient_terms
        return Arrivals(
            maps=frozenset(name for name in phase.stored if name in with_gradient),
            num_terms={name: len(terms[name]) for name in phase.reductions if name in terms},
        )

    # --- stores -------------------------------------------------------------------------------------

    @property
    def results(self) -> dict[str, Store]:
        """The stores of results that stay stored after the forward pass, until the execution is closed."""
        return {name: self._maps.store(operand) for name, operand in self.program.results.items()}

    @property
    def held_bytes(self) -> int:
        """Bytes of memory that the stored maps take until the backward pass."""
        return self._maps.held_bytes

    def close(self) -> None:
        """Free every store. Closing again does nothing."""
        try:
            self._transfers.drop()
        finally:
            self._maps.close()

    # --- shared --------------------------------------------------------------------------------------

    def _run_tiles(self, phase: Phase, direction: str, make_step: Callable[[TileKind], Step]) -> None:
        """Gather, compute, scatter, for every tile of a phase."""

        @lru_cache(_STEPS)
        def prepared(kind: TileKind) -> tuple[Step, Compute]:
            step = make_step(kind)
            return step, self._make_compute(step)

        # A cached cast would keep the graph of the tile that made it alive.
        with torch.no_grad(), autocast(self.device, self.autocast, cache=direction != "backward"):
            tiles = [Tile(phase, row, col) for row, col in self._combiner.tiles(phase)]
            part = direction, phase.level
            overlaps, trails = part in self.plan.overlapped, part in self.plan.trailing
            next_phase = self._following.get((direction, id(phase))) if part in self.plan.leading else None
            ahead: list[Incoming] = []
            for tile, following in zip_longest(tiles, tiles[1:]):
                step, compute = prepared(tile.kind)
                inputs = self._exchange.gather(step, tile, ahead)
                ahead = []
                if overlaps and following is not None:
                    ahead = self._exchange.prepare(prepared(following.kind)[0], following)
                first: list[Incoming] = []
                if following is None and next_phase is not None:
                    first = self._exchange.prepare_first(next_phase, self._ready(next_phase, phase))
                self._transfers.overlaps = trails if following is None else overlaps
                self._exchange.scatter(step, tile, compute(inputs))
                # The host's part of moving other tiles, while a GPU computes this one. The next one's inputs
                # come first: they wait for no copy, and arrive while the host adds.
                fetch((*ahead, *first))
                self._transfers.advance()
                self._hooks.after_step(phase.shape(direction, tile.row, tile.col))
        # What segments send is not planned to stay: it may be a whole map.
        self._transfers.overlaps = False
        self._exchange.end_phase()

    def _ready(self, phase: Phase, last: Phase) -> list[str]:
        """The inputs of a phase that are complete in other tiers while ``last`` runs, the phase before it."""
        stores = self.plan.stores
        away = (name for name in phase.inputs if name in stores and stores[name].tier is not Tier.MEMORY)
        return [name for name in away if name not in last.stored]

    @contextmanager
    def _timed(self, phase: Phase, direction: str) -> Iterator[None]:
        self._hooks.before_part((direction, phase.level))
        names = {*phase.inputs, *phase.stored}
        before = self._maps.bytes_moved(names)
        start = time.perf_counter()
        part, during = (AGAIN, "backward") if direction == "again" else ("phase", direction)
        with self._observed(part, phase.level, during):
            yield
            # Once a phase: where the pixels are on a GPU, this waits for it.
            self._maps.settle_images()
        seconds = time.perf_counter() - start
        read, written = (now - then for now, then in zip(self._maps.bytes_moved(names), before, strict=True))
        self.reports.append(PhaseReport(phase.level, direction, phase.num_tiles, seconds, read, written))

    @contextmanager
    def _observed(self, part: str, level: int, direction: str) -> Iterator[None]:
        """Tell the observer when a part begins and when it ends or fails; run late checks at its end."""
        observer = self._hooks.observer
        if observer is None:
            with checked_at_the_end():
                yield
            return
        observer(PassEvent(part, level, direction, begins=True))
        try:
            with checked_at_the_end():
                yield
        finally:
            observer(PassEvent(part, level, direction, begins=False))
