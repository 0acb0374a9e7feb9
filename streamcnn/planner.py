"""The planner: tile, stores, cuts and resident tail for one image shape under a budget.

Candidates are few and explicit: tile edges, and for each the fewest maps on disk that let it fit. Of the
candidates that fit, the one with the least projected time is taken. If none fits, the one that comes
closest is returned; it can be read, and running it is refused.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from streamcnn.cost_model import projected_seconds
from streamcnn.cuts import choose_cuts
from streamcnn.memory_model import TAIL_COPIES, plain_bytes, step_bytes, worst_moment
from streamcnn.plan import Home, MemoryTerm, Phase, Plan, Segment, StorePlan
from streamcnn.program import Kind, Program
from streamcnn.staging import Stage, Staging, divide
from streamcnn.tiling import cut, grid

TILE_EDGES = (2048, 1024, 768, 512, 384, 256, 192, 128, 96, 64, 48, 32)
"""Tile edges that the planner tries, in input pixels."""
DEFAULT_EDGE = 512
"""Tile edge where neither a budget nor a tile is given."""
HALO_SHARE = 0.25
"""A stretch without a barrier is cut when its halo exceeds this share of the tile's edge."""

Retrace = Callable[[str | None], Program]
"""The program with everything from the named captured call on resident; ``None`` for no tail."""


@dataclass(frozen=True, slots=True)
class PlanRequest:
    """What the planner is asked for."""

    image_shape: tuple[int, int, int, int]
    dtype: str
    leaves: frozenset[str]
    """States and image whose gradients are wanted; empty for inference."""
    budget: int | None = None
    """Bytes that ``reserved`` and the plan may take together; ``None`` for no ceiling."""
    tile: tuple[int, int] | None = None
    """Tile edges in input pixels; ``None`` leaves them to the planner."""
    spill_home: Home = Home.DISK
    """Where stored maps go that the budget has no room for."""
    reserved: int = 0
    """Bytes of the budget that the device holds already: what the plan does not allocate itself."""
    tail: bool = True
    """Whether what is left at the end may run whole once that takes no more than a tile does."""


def make_plan(
    retrace: Retrace, request: PlanRequest, differentiate: Callable[[Program], frozenset[str]]
) -> tuple[Program, Plan]:
    """The best plan found and the program it is for; check :attr:`Plan.fits` before running it."""
    program = retrace(None)
    plan = _best(program, request, differentiate(program), 0)
    if not request.tail:
        return program, plan
    start, length = _tail(program, plan)
    if start is None:
        return program, plan
    shorter = retrace(start)
    with_tail = _best(shorter, request, differentiate(shorter), length)
    if with_tail.fits or with_tail.projected_bytes <= plan.projected_bytes:
        return shorter, with_tail
    return program, plan


def _tail(program: Program, plan: Plan) -> tuple[str | None, int]:
    """The captured call from which on all maps together take no more than the largest step does.

    A tail lives when no tile does: after the last forward step and before the first backward one.
    """
    allowed = max((step_bytes(program, phase, plan.stores) for phase in plan.phases), default=0)
    total, start, length = 0, None, 0
    for node in reversed(tuple(program.nodes.values())):
        if node.kind is not Kind.LOCAL:
            continue
        total += TAIL_COPIES * node.nbytes
        if total > allowed:
            break
        start, length = node.name.partition(".")[0], length + 1
    return start, length


def _best(program: Program, request: PlanRequest, differentiated: frozenset[str], num_resident: int) -> Plan:
    """The fitting candidate with the least projected time, or the one that comes closest to fitting."""
    candidates = [
        plan
        for tile in _tiles(program, request)
        for plan in _fitted(program, request, differentiated, tile, num_resident)
    ]
    fitting = [plan for plan in candidates if plan.fits]
    if fitting:
        return min(fitting, key=lambda plan: projected_seconds(program, plan))
    return min(candidates, key=lambda plan: plan.projected_bytes)


def _tiles(program: Program, request: PlanRequest) -> Iterator[tuple[int, int]]:
    height, width = program.nodes[program.image].size
    if request.tile is not None:
        yield (min(request.tile[0], height), min(request.tile[1], width))
        return
    edges = TILE_EDGES if request.budget is not None else (DEFAULT_EDGE,)
    seen = set()
    for edge in edges:
        tile = (min(edge, height), min(edge, width))
        if tile not in seen:
            seen.add(tile)
            yield tile


def _fitted(
    program: Program,
    request: PlanRequest,
    differentiated: frozenset[str],
    tile: tuple[int, int],
    num_resident: int,
) -> Iterator[Plan]:
    """Plans for one tile, the heap reused or not, with the fewest stored maps spilled, largest first."""
    staging = divide(program, choose_cuts(program, HALO_SHARE * min(tile)))
    stages = staging.stages
    phases = tuple(cut(program, stage, grid(program, stage, tile), differentiated) for stage in stages)
    if request.tile is None:
        phases = _coarsened(program, staging, phases, differentiated)
    order = sorted(staging.stored, key=lambda name: (-program.nodes[name].nbytes, name))
    for reuses_heap in (True, False):
        frame = _Frame(program, request, staging, phases, differentiated, tile, num_resident, reuses_heap)
        spilled = _fewest(len(order), lambda count, f=frame: f.plan(frozenset(order[:count])).fits)  # type: ignore[misc]
        yield frame.plan(frozenset(order[:spilled]))


def _fewest(most: int, fits: Callable[[int], bool]) -> int:
    """The smallest count up to ``most`` that fits, given that more always fit better; else ``most``."""
    if fits(0):
        return 0
    low, high = 0, most
    while low + 1 < high:
        middle = (low + high) // 2
        low, high = (low, middle) if fits(middle) else (middle, high)
    return high


def _coarsened(
    program: Program, staging: Staging, phases: tuple[Phase, ...], differentiated: frozenset[str]
) -> tuple[Phase, ...]:
    """The same phases in as few tiles as take no more bytes than the largest step of them all.

    Deep maps are small: the tile that early phases need would cut them into crumbs.
    """
    allowed = max((step_bytes(program, phase, {}) for phase in phases), default=0)
    return tuple(
        _coarsest(program, stage, phase, differentiated, allowed)
        for stage, phase in zip(staging.stages, phases, strict=True)
    )


def _coarsest(
    program: Program, stage: Stage, phase: Phase, differentiated: frozenset[str], allowed: int
) -> Phase:
    rows, cols = len(phase.rows), len(phase.cols)
    for divisor in (16, 8, 6, 4, 3, 2):
        parts = (math.ceil(rows / divisor), math.ceil(cols / divisor))
        if parts != (rows, cols):
            coarse = cut(program, stage, parts, differentiated)
            if step_bytes(program, coarse, {}) <= allowed:
                return coarse
    return phase


@dataclass(frozen=True, slots=True)
class _Frame:
    """A candidate but for which stored maps are spilled."""

    program: Program
    request: PlanRequest
    staging: Staging
    phases: tuple[Phase, ...]
    differentiated: frozenset[str]
    tile: tuple[int, int]
    num_resident: int
    reuses_heap: bool

    def plan(self, spilled: frozenset[str]) -> Plan:
        """The plan with ``spilled`` maps and their gradients away from the device's memory."""
        program, request, staging = self.program, self.request, self.staging
        stores = _stores(program, staging, self.phases, request.spill_home, spilled)
        worst = worst_moment(
            program, staging, self.phases, stores, self.differentiated, reuses_heap=self.reuses_heap
        )
        return Plan(
            image_shape=request.image_shape,
            dtype=request.dtype,
            training=bool(request.leaves),
            tile=self.tile,
            phases=self.phases,
            segments=tuple(Segment(level, names) for level, names in staging.segments.items()),
            stores=stores,
            levels=dict(staging.levels),
            differentiated=self.differentiated,
            budget=request.budget,
            reuses_heap=self.reuses_heap,
            terms=(*_reserved(request), *worst.terms),
            worst=worst.name,
            plain_bytes=plain_bytes(program, self.differentiated),
            num_resident=self.num_resident,
            residents=tuple(f"{node.note} ({node.source})" for node in program.residents),
        )


def _reserved(request: PlanRequest) -> tuple[MemoryTerm, ...]:
    """The term of what is held already, if that counts."""
    if not request.reserved:
        return ()
    return (MemoryTerm("reserved (context, libraries, weights, optimiser)", request.reserved),)


def _stores(
    program: Program,
    staging: Staging,
    phases: tuple[Phase, ...],
    spill_home: Home,
    spilled: frozenset[str],
) -> dict[str, StorePlan]:
    last = {name: staging.levels[name] for name in staging.stored}
    kept: set[str] = set()
    for phase in phases:
        for name in phase.inputs:
            last[name] = max(last.get(name, 0), phase.level)
        if phase.differentiated:
            kept.update(phase.inputs, phase.stored)
    for node in program.nodes.values():
        if node.kind is Kind.GATHER:
            last[node.operands[0]] = max(last.get(node.operands[0], 0), staging.levels[node.name])
    grids = {name: phase for phase in phases for name in phase.stored}
    return {
        name: StorePlan(
            home=spill_home if name in spilled else Home.MEMORY,
            gradient_home=spill_home if name in spilled else Home.MEMORY,
            nbytes=program.nodes[name].nbytes,
            kept=name in kept,
            last_reader=last[name],
            tile=_share(program.nodes[name].size, grids[name]),
        )
        for name in program.nodes
        if name in staging.stored
    }


def _share(size: tuple[int, int], phase: Phase) -> tuple[int, int]:
    return (math.ceil(size[0] / len(phase.rows)), math.ceil(size[1] / len(phase.cols)))
