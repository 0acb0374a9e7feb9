"""Turn the best attempt into the frozen plan: its phases, its stores, and its projections."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import NamedTuple

from streamcnn.graph.program import Program, on_whole_maps
from streamcnn.plan.plan import PassPart, Phase, Plan, Segment
from streamcnn.plan.reading import OF_IMAGES
from streamcnn.plan.storage import MemoryTerm, StorePlan
from streamcnn.plan.stored_bytes import StoredBytes
from streamcnn.planning.attempts import Attempt
from streamcnn.planning.candidates import TilingCandidates
from streamcnn.planning.cost_model import StageTime, plain_time, resident_time
from streamcnn.planning.global_bytes import RUN_TIME
from streamcnn.planning.memory_model import PeakPoint, peak_points
from streamcnn.planning.overlapping import MovedTiles, PhaseEnds, overlapped
from streamcnn.planning.search import Solution
from streamcnn.planning.spec import Machine, PassSpec
from streamcnn.planning.staging import Staging, is_differentiated
from streamcnn.planning.tiling import TiledStage, largest_part


def frozen_plan(
    best: Attempt, untailed: TilingCandidates, plain_bytes: int, spec: PassSpec, machine: Machine
) -> Plan:
    """The plan that carries the best attempt out.

    Parameters
    ----------
    untailed
        The ways to tile the program without a tail.
    plain_bytes
        Bytes that the whole program takes on whole maps.
    """
    solution, program = best.solution, best.search.program
    staging, stores = solution.staging, _with_tiles(solution)
    points, moves = _peak_points(best, stores, spec, machine)
    worst = max(points, key=lambda point: point.nbytes)
    at_once, resident = _times_on_whole_maps(untailed, training=bool(spec.leaves))
    flops = sum(tiling.time.flops for tiling in solution.tilings) + resident.flops
    flops += best.tail.flops if best.tail else 0
    return Plan(
        image_shape=spec.image_shape,
        dtype=str(spec.dtype).removeprefix("torch."),
        training=bool(spec.leaves),
        tile=_tile(program, spec, solution),
        phases=_phases(best),
        rematerialised=_rematerialised(solution),
        segments=tuple(Segment(level, names) for level, names in staging.segments.items()),
        stores=stores,
        levels=dict(staging.levels),
        differentiated=best.search.tilings.differentiated,
        budget=spec.budget,
        reuses_blocks=solution.reuses_blocks if machine.backend.has_choice else None,
        kept_bytes=_kept_bytes(spec, machine, points) if machine.backend.keeps_blocks else None,
        terms=(*_reserved(machine), *worst.terms),
        worst=worst.name,
        worst_operator=_named(program, worst.operator),
        plain_bytes=machine.reserved + plain_bytes,
        projected_seconds=best.seconds + resident.seconds,
        plain_seconds=at_once.seconds,
        recomputation=flops / at_once.flops if at_once.flops else 1.0,
        num_resident=_num_last(program, staging),
        overlapped=moves.overlapped,
        trailing=moves.trailing,
        leading=moves.leading,
        image_held_bytes=spec.reading.held,
        image_read_bytes=_image_read_bytes(program, spec, solution),
        # Nothing streams in the tail, so only the program without a tail has the reasons.
        residents=tuple(f"{node.note} ({node.source})" for node in untailed.program.residents),
    )


# --- phases and stores -------------------------------------------------------------------------------


def _phases(best: Attempt) -> tuple[Phase, ...]:
    differentiated = best.search.tilings.differentiated
    return tuple(
        tiled.phase(differentiated=is_differentiated(tiled.stage, differentiated))
        for tiled in best.solution.tiled
    )


def _rematerialised(solution: Solution) -> dict[int, tuple[Phase, ...]]:
    """By level: the phases that are run again before its backward phase."""
    found: dict[int, tuple[Phase, ...]] = {}
    for before, tiled in solution.rematerialised:
        found[before] = (*found.get(before, ()), tiled.phase(differentiated=False))
    return found


def _all_tiled(solution: Solution) -> tuple[TiledStage, ...]:
    """The stages of both passes, those that rematerialise maps last."""
    return (*solution.tiled, *(tiled for _, tiled in solution.rematerialised))


def _with_tiles(solution: Solution) -> dict[str, StorePlan]:
    """The solution's stores, each with the fewest rows and columns that a phase writes or reads at once."""
    tiles: dict[str, list[tuple[int, int]]] = {name: [] for name in solution.stores}
    for tiled in _all_tiled(solution):
        for name in tiled.stage.stored:
            tiles[name].append(tiled.largest_own(name))
        for name in tiles.keys() & set(tiled.stage.inputs):
            tiles[name].append(tiled.largest(name))
    return {
        name: replace(store, tile=(min(h for h, _ in tiles[name]), min(w for _, w in tiles[name])))
        for name, store in solution.stores.items()
    }


def _tile(program: Program, spec: PassSpec, solution: Solution) -> tuple[int, int]:
    """Largest extents (h, w) of a tile in input pixels: those asked for, or else the first phase's."""
    height, width = program.nodes[program.image].size
    if spec.tile is not None:
        return min(spec.tile[0], height), min(spec.tile[1], width)
    if not solution.tilings:
        return height, width
    first = solution.tilings[0].tiled
    return largest_part(height, first.rows.num_parts), largest_part(width, first.cols.num_parts)


def _num_last(program: Program, staging: Staging) -> int:
    """Number of operators in the resident tail, which run on whole maps after the last tile."""
    last = max(staging.levels.values(), default=0)
    return sum(staging.levels[node.name] == last for node in on_whole_maps(program))


# --- projections -------------------------------------------------------------------------------------


class _Moves(NamedTuple):
    """The parts of a pass that move tiles beside what they compute, as in :class:`Plan`."""

    overlapped: frozenset[PassPart]
    trailing: frozenset[PassPart]
    leading: frozenset[PassPart]


def _peak_points(
    best: Attempt, stores: dict[str, StorePlan], spec: PassSpec, machine: Machine
) -> tuple[list[PeakPoint], _Moves]:
    """All peak points, with the tiles that are moved."""
    solution = best.solution
    moved = MovedTiles(solution.tiled, solution.rematerialised, stores)
    backend, room = machine.backend, spec.room(machine.reserved)
    beside = Counter[PassPart]()

    def points() -> list[PeakPoint]:
        return peak_points(
            solution.tiled,
            best.search.global_bytes(solution.staging),
            StoredBytes(stores, solution.staging.levels),
            rematerialised=solution.rematerialised,
            moving=beside,
            reuses_blocks=solution.reuses_blocks,
        )

    within = moved.beside
    parts = overlapped(points(), within, backend, room)
    beside.update({part: within[part] for part in parts})
    ends = PhaseEnds(parts, backend, room)
    last = ends.trailing(points(), moved.sent)
    beside.update(last.beside)
    first = ends.leading(points(), moved.brought)
    beside.update(first.beside)
    return points(), _Moves(parts, last.parts, first.parts)


def _times_on_whole_maps(untailed: TilingCandidates, *, training: bool) -> tuple[StageTime, StageTime]:
    """Times of plain PyTorch on the whole image, and of the operators on whole maps in any plan."""
    on = untailed.hardware, untailed.backend
    resident = partial(resident_time, untailed.program, untailed.differentiated, *on)
    plain = plain_time(untailed.works, *on, backward=training, keeps_blocks=False)
    return plain + resident(keeps_blocks=False), resident(keeps_blocks=untailed.backend.keeps_blocks)


def _kept_bytes(spec: PassSpec, machine: Machine, points: Sequence[PeakPoint]) -> dict[PassPart, int]:
    """By part: the budget less bytes beside large tensors, which these and free blocks may take together."""
    backend = machine.backend
    others = backend.beside_tensors | OF_IMAGES | {RUN_TIME, backend.fragmentation}
    room = spec.budget
    if room is None:
        room = max(point.nbytes for point in points) * 5 // 4
    return {point.part: max(0, room - machine.reserved - point.beside_tensors(others)) for point in points}


def _reserved(machine: Machine) -> tuple[MemoryTerm, ...]:
    """The term of bytes that the device holds already, if these count."""
    if not machine.reserved:
        return ()
    return (MemoryTerm("reserved (context, libraries, weights, optimiser)", machine.reserved),)


def _image_read_bytes(program: Program, spec: PassSpec, solution: Solution) -> int:
    """Bytes that reading the largest region of the image takes; 0 if no phase reads it."""
    regions = (
        tiled.largest(program.image) for tiled in _all_tiled(solution) if program.image in tiled.stage.inputs
    )
    return max((spec.reading.of(region).transient for region in regions), default=0)


def _named(program: Program, operator: str) -> str:
    """An operator with its place in the user's model."""
    if not operator:
        return "the model"
    if operator == program.image:
        return "the image"
    source = program.nodes[operator].source
    return f"{operator} ({source})" if source else operator
