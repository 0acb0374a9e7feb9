"""The planner: a frozen plan for one image shape under a budget.

For each of a few places where the resident tail may begin, the program is staged with more and with fewer
split points, and the search picks tiles, stores and what to recompute. Of the plans that fit, the one with
the least projected time is taken. If none fits, the one that comes closest is returned; it can be read, and
running it is refused. No plan takes more than plain PyTorch, which is all of the program as a tail, unless
tiles are asked for.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import takewhile

from streamcnn.graph.program import Kind, Node, Program, on_whole_maps
from streamcnn.plan.plan import PassPart, Plan, Segment
from streamcnn.plan.reading import OF_IMAGES
from streamcnn.plan.storage import MemoryTerm, StorePlan
from streamcnn.plan.stored_bytes import StoredBytes
from streamcnn.planning.candidates import TilingCandidates
from streamcnn.planning.cost_model import plain_time, resident_time
from streamcnn.planning.global_bytes import RUN_TIME
from streamcnn.planning.memory_model import PeakPoint, is_differentiated, overhead_terms, peak_points
from streamcnn.planning.overlapping import moved_beside, overlapped
from streamcnn.planning.resident_bytes import total_bytes
from streamcnn.planning.search import Search, Solution
from streamcnn.planning.spec import Machine, PassSpec
from streamcnn.planning.split_points import choose_split_points
from streamcnn.planning.staging import Staging, divide
from streamcnn.planning.tiling import largest_part

DEFAULT_EDGE = 512
"""Tile edge where neither a budget nor a tile is given."""
HALO_LIMITS = (16, 64, 128, 256, 512)
"""Input pixels of halo at which a stretch without a barrier is split, the values that are tried."""
HALO_SHARE = 0.25
"""The same as a share of the tile's edge, where that is given."""
TAIL_COPIES = 2
"""Bytes of a tail that is tried, in copies of its maps: the value and its gradient."""

Retrace = Callable[[str | None], Program]
"""The program with everything from the named captured call on resident; ``None`` for no tail."""


def make_plan(
    retrace: Retrace, spec: PassSpec, machine: Machine, differentiate: Callable[[Program], frozenset[str]]
) -> tuple[Program, Plan]:
    """The best plan found and the program it is for; check :attr:`Plan.fits` before running it."""
    trial = _Trial(retrace, spec, machine, differentiate)
    tilings = trial.tilings(None)
    plain = trial.attempt(_tail(tilings, sys.maxsize, len(_local(tilings))), tilings)
    # Where a tile is asked for, there are tiles.
    may_be_plain = spec.tail and spec.tile is None
    most = plain.solution.nbytes if may_be_plain else None
    whole = trial.attempt(None, tilings, most)
    attempts = [whole]
    if spec.tail:
        attempts += [trial.attempt(tail, tilings, most) for tail in _tails(whole, spec, machine)]
    if most is not None:
        attempts = [each for each in attempts if each.solution.nbytes <= most]
        if not attempts or _longest(tilings) == len(_local(tilings)):
            attempts.insert(0, plain)
    best = min(attempts, key=lambda attempt: attempt.rank)
    best = replace(best, solution=best.search.improved(best.solution))
    return best.search.program, best.plan(spec, machine, tilings, plain)


@dataclass(frozen=True, slots=True)
class _Tail:
    """Operators at the end that run on whole maps."""

    start: str
    """The captured call from which on."""
    seconds: float
    """Projected time, forward and backward."""
    flops: int


@dataclass(frozen=True, slots=True, eq=False)
class _Attempt:
    """The search over one program and what it found."""

    search: Search
    solution: Solution
    tail: _Tail | None

    @property
    def seconds(self) -> float:
        """Projected time, the tail's included; what runs on whole maps in any case is left out."""
        return self.solution.seconds + (self.tail.seconds if self.tail else 0.0)

    @property
    def rank(self) -> tuple[bool, float]:
        """Smaller is better."""
        fits = self.solution.fits
        return not fits, self.seconds if fits else self.solution.nbytes

    def plan(self, spec: PassSpec, machine: Machine, everything: TilingCandidates, plain: _Attempt) -> Plan:
        """The frozen plan.

        Parameters
        ----------
        everything
            Of the program without a tail.
        plain
            The attempt with all of it in the tail.
        """
        solution, tilings = self.solution, self.search.tilings
        program, staging, differentiated = tilings.program, solution.staging, tilings.differentiated
        stores = _with_tiles(solution)
        tiled, again = solution.tiled, solution.rematerialised
        points_with = partial(
            peak_points,
            tiled,
            self.search.global_bytes(staging),
            StoredBytes(stores, staging.levels),
            rematerialised=again,
            reuses_blocks=solution.reuses_blocks,
        )
        moved = moved_beside(tiled, again, stores)
        parts = overlapped(points_with(), moved, machine.backend, spec.room(machine.reserved))
        points = points_with(moving={part: moved[part] for part in parts})
        worst = max(points, key=lambda point: point.nbytes)
        training = bool(spec.leaves)
        on = machine.hardware, machine.backend
        resident_of = partial(resident_time, everything.program, everything.differentiated, *on)
        resident = resident_of(keeps_blocks=machine.backend.keeps_blocks)
        at_once = plain_time(everything.works, *on, backward=training, keeps_blocks=False)
        at_once += resident_of(keeps_blocks=False)
        flops = sum(tiling.time.flops for tiling in solution.tilings) + resident.flops
        flops += self.tail.flops if self.tail else 0
        return Plan(
            image_shape=spec.image_shape,
            dtype=str(spec.dtype).removeprefix("torch."),
            training=training,
            tile=_tile(program, spec, machine, solution),
            phases=tuple(
                each.phase(differentiated=is_differentiated(each.stage, differentiated)) for each in tiled
            ),
            rematerialised={
                level: tuple(each.phase(differentiated=False) for before, each in again if before == level)
                for level in dict.fromkeys(before for before, _ in again)
            },
            segments=tuple(Segment(level, names) for level, names in staging.segments.items()),
            stores=stores,
            levels=dict(staging.levels),
            differentiated=differentiated,
            budget=spec.budget,
            reuses_blocks=solution.reuses_blocks if machine.backend.has_choice else None,
            kept_bytes=_kept_bytes(spec, machine, points) if machine.backend.keeps_blocks else None,
            terms=(*_reserved(spec, machine), *worst.terms),
            worst=worst.name,
            worst_operator=_named(program, worst.operator),
            plain_bytes=machine.reserved + plain.solution.nbytes,
            projected_seconds=self.seconds + resident.seconds,
            plain_seconds=at_once.seconds,
            recomputation=flops / at_once.flops if at_once.flops else 1.0,
            num_resident=_num_last(program, staging),
            overlapped=parts,
            image_held_bytes=spec.reading.held,
            image_read_bytes=max(
                (
                    spec.reading.of(each.largest(program.image)).transient
                    for each in (*tiled, *(each for _, each in again))
                    if program.image in each.stage.inputs
                ),
                default=0,
            ),
            # In the tail nothing streams, so only the program without one has the reasons.
            residents=tuple(f"{node.note} ({node.source})" for node in everything.program.residents),
        )


@dataclass(frozen=True, slots=True)
class _Trial:
    """Attempts at the plan of one pass."""

    retrace: Retrace
    spec: PassSpec
    machine: Machine
    differentiate: Callable[[Program], frozenset[str]]

    def tilings(self, tail: _Tail | None, known: TilingCandidates | None = None) -> TilingCandidates:
        """The ways to tile the program with such a tail; ``known`` are those of another one."""
        program = self.retrace(tail.start if tail else None)
        return TilingCandidates(
            program,
            self.differentiate(program),
            self.machine.hardware,
            self._tile,
            self.machine.backend,
            known,
            reading=self.spec.reading,
        )

    def attempt(self, tail: _Tail | None, whole: TilingCandidates, most: int | None = None) -> _Attempt:
        """The best solution that only offloads.

        Parameters
        ----------
        whole
            Of the program without a tail.
        most
            Bytes that it may take, where there is a ceiling and that is higher.
        """
        tilings = self.tilings(tail, whole) if tail else whole
        room = self.spec.room(self.machine.reserved)
        if room is not None and most is not None:
            room = min(room, most)
        search = Search(tilings, room, self.machine.offload_tiers)
        return _Attempt(search, search.best(_stagings(tilings.program, self._tile)), tail)

    @property
    def _tile(self) -> tuple[int, int] | None:
        if self.spec.tile is None and self.spec.room(self.machine.reserved) is None:
            return DEFAULT_EDGE, DEFAULT_EDGE
        return self.spec.tile


def _kept_bytes(spec: PassSpec, machine: Machine, points: Sequence[PeakPoint]) -> dict[PassPart, int]:
    """Bytes that tensors and free blocks may take together: all but what is no large tensor in that part."""
    backend = machine.backend
    others = backend.beside_tensors | OF_IMAGES | {RUN_TIME, backend.fragmentation}
    room = spec.budget
    if room is None:
        room = max(point.nbytes for point in points) * 5 // 4
    return {point.part: max(0, room - machine.reserved - point.beside_tensors(others)) for point in points}


def _num_last(program: Program, staging: Staging) -> int:
    """Operators on whole maps that run after the last tile: the resident tail."""
    last = max(staging.levels.values(), default=0)
    return sum(staging.levels[node.name] == last for node in on_whole_maps(program))


def _reserved(spec: PassSpec, machine: Machine) -> tuple[MemoryTerm, ...]:
    """The term of what is held already, if that counts."""
    if not machine.reserved:
        return ()
    return (MemoryTerm("reserved (context, libraries, weights, optimiser)", machine.reserved),)


def _stagings(program: Program, tile: tuple[int, int] | None) -> Iterator[Staging]:
    """The program staged with fewer and more split points, each way once."""
    limits = HALO_LIMITS if tile is None else (HALO_SHARE * min(tile),)
    for split_points in dict.fromkeys(choose_split_points(program, limit) for limit in limits):
        yield divide(program, split_points)


def _tails(whole: _Attempt, spec: PassSpec, machine: Machine) -> Iterator[_Tail]:
    """Tails to try: one that takes no more than the largest step does, and one that fills the budget.

    A tail lives when no tile does: after the last forward step and before the first backward one.
    """
    # Without what the backend takes for a step: a tail has its own.
    backward = bool(spec.leaves)
    steps = [
        tiling.nbytes - total_bytes(overhead_terms(tiling.tiled.outline, machine.backend, backward=backward))
        for tiling in whole.solution.tilings
    ]
    largest = max(steps, default=0)
    allowed = [largest]
    room = spec.room(machine.reserved)
    if room is not None and spec.tile is None and whole.solution.fits:
        allowed.append(largest + room - whole.solution.nbytes)
    tilings = whole.search.tilings
    longest = _longest(tilings)
    tails = {tail.start: tail for nbytes in allowed if (tail := _tail(tilings, nbytes, longest)) is not None}
    return iter(tails.values())


def _local(tilings: TilingCandidates) -> list[Node]:
    """The operators that may be in a tail, in order."""
    return [node for node in tilings.program.nodes.values() if node.kind is Kind.LOCAL]


def _longest(tilings: TilingCandidates) -> int:
    """How many of the last operators have maps that the backend's kernels are made for."""
    most, nodes = tilings.backend.most_elements, tilings.program.nodes

    def is_suited(node: Node) -> bool:
        maps = (node, *(nodes[name] for name in node.operands if nodes[name].is_map))
        return all(each.tensor.numel <= most for each in maps)

    return sum(1 for _ in takewhile(is_suited, reversed(_local(tilings))))


def _tail(tilings: TilingCandidates, allowed: int, longest: int) -> _Tail | None:
    """The longest tail, of that many operators at most, whose maps take no more than ``allowed`` bytes."""
    nodes = _local(tilings)
    total, length = 0, 0
    for node in reversed(nodes[len(nodes) - longest :]):
        total += TAIL_COPIES * node.nbytes
        if total > allowed:
            break
        length += 1
    if not length:
        return None
    works = {node.name: tilings.works[node.name] for node in nodes[-length:]}
    backend = tilings.backend
    backward = bool(tilings.differentiated)
    time = plain_time(works, tilings.hardware, backend, backward=backward, keeps_blocks=backend.keeps_blocks)
    return _Tail(nodes[-length].name.partition(".")[0], time.seconds, time.flops)


def _with_tiles(solution: Solution) -> dict[str, StorePlan]:
    """The solution's stores with the fewest rows and columns by which a phase writes or reads each."""
    tiles: dict[str, list[tuple[int, int]]] = {name: [] for name in solution.stores}
    for tiled in (*solution.tiled, *(each for _, each in solution.rematerialised)):
        for name in tiled.stage.stored:
            tiles[name].append(tiled.largest_own(name))
        for name in tiles.keys() & set(tiled.stage.inputs):
            tiles[name].append(tiled.largest(name))
    return {
        name: replace(store, tile=(min(h for h, _ in tiles[name]), min(w for _, w in tiles[name])))
        for name, store in solution.stores.items()
    }


def _tile(program: Program, spec: PassSpec, machine: Machine, solution: Solution) -> tuple[int, int]:
    """Largest edge (h, w) of a tile in input pixels: as asked for, or as the first phase has it."""
    height, width = program.nodes[program.image].size
    if spec.tile is not None:
        return min(spec.tile[0], height), min(spec.tile[1], width)
    if not solution.tilings:
        return height, width
    first = solution.tilings[0].tiled
    return largest_part(height, first.rows.num_parts), largest_part(width, first.cols.num_parts)


def _named(program: Program, operator: str) -> str:
    """An operator with where it comes from."""
    if not operator:
        return "the model"
    if operator == program.image:
        return "the image"
    source = program.nodes[operator].source
    return f"{operator} ({source})" if source else operator
