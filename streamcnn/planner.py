"""The planner: a frozen plan for one image shape under a budget.

For each of a few places where the resident tail may begin, the program is staged with more and with fewer
cuts, and the search picks tiles, stores and what to compute again. Of the plans that fit, the one with the
least projected time is taken. If none fits, the one that comes closest is returned; it can be read, and
running it is refused.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

from streamcnn.cost_model import plain_time, resident_time
from streamcnn.cuts import choose_cuts
from streamcnn.libraries import Libraries
from streamcnn.memory_model import is_differentiated, library_terms, moments
from streamcnn.options import Options
from streamcnn.plan import Home, MemoryTerm, Plan, Segment, StorePlan
from streamcnn.program import Kind, Program, on_whole_maps
from streamcnn.rates import NOMINAL, Rates
from streamcnn.reading import NO_READING, BatchCost
from streamcnn.search import Candidate, Search, SpillPlace
from streamcnn.small_bytes import plain_bytes, total_bytes
from streamcnn.staging import Staging, divide
from streamcnn.stored_bytes import StoredBytes
from streamcnn.tiling import share

DEFAULT_EDGE = 512
"""Tile edge where neither a budget nor a tile is given."""
HALO_LIMITS = (16, 64, 128, 256, 512)
"""Input pixels of halo at which a stretch without a barrier is cut, the values that are tried."""
HALO_SHARE = 0.25
"""The same as a share of the tile's edge, where that is given."""
TAIL_COPIES = 2
"""Bytes of a tail that is tried, in copies of its maps: the value and its gradient."""

Retrace = Callable[[str | None], Program]
"""The program with everything from the named captured call on resident; ``None`` for no tail."""


@dataclass(frozen=True, slots=True)
class PlanRequest:
    """What the planner is asked for."""

    image_shape: tuple[int, int, int, int]
    dtype: str
    leaves: frozenset[str]
    """States and image whose gradients are wanted; empty for inference."""
    libraries: Libraries
    """What they take beside tensors."""
    budget: int | None = None
    """Bytes that ``reserved`` and the plan may take together; ``None`` for no ceiling."""
    reserved: int = 0
    """Bytes of the budget that the device holds already: what the plan does not allocate itself."""
    target: int | None = None
    """Bytes to plan for, where that is less than the budget."""
    tile: tuple[int, int] | None = None
    """Tile edges in input pixels; ``None`` leaves them to the planner."""
    places: tuple[SpillPlace, ...] = (SpillPlace(Home.DISK),)
    """Where stored maps go that the budget has no room for, the fastest place first."""
    rates: Rates = NOMINAL["cpu"]
    """How fast the machine computes and moves bytes."""
    reading: BatchCost = NO_READING
    """What reading the batch takes in the memory that the budget is of."""
    tail: bool = True
    """Whether what is left at the end may run whole."""

    @property
    def room(self) -> int | None:
        """Bytes that the plan may take beside what is reserved."""
        allowed = self.budget if self.target is None else self.target
        return None if allowed is None else allowed - self.reserved


def make_plan(
    retrace: Retrace, request: PlanRequest, differentiate: Callable[[Program], frozenset[str]]
) -> tuple[Program, Plan]:
    """The best plan found and the program it is for; check :attr:`Plan.fits` before running it."""
    whole = _Attempt.of(retrace(None), request, differentiate, None)
    attempts = [whole]
    if request.tail:
        attempts += [
            _Attempt.of(retrace(tail.start), request, differentiate, tail, whole.search.options)
            for tail in _tails(whole, request)
        ]
    best = min(attempts, key=lambda attempt: attempt.rank)
    best = replace(best, candidate=best.search.improved(best.candidate))
    return best.search.program, best.plan(request, whole)


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
    candidate: Candidate
    tail: _Tail | None

    @classmethod
    def of(
        cls,
        program: Program,
        request: PlanRequest,
        differentiate: Callable[[Program], frozenset[str]],
        tail: _Tail | None,
        known: Options | None = None,
    ) -> _Attempt:
        """The best candidate that only spills."""
        tile = request.tile
        if tile is None and request.room is None:
            tile = (DEFAULT_EDGE, DEFAULT_EDGE)
        options = Options(
            program,
            differentiate(program),
            request.rates,
            tile,
            request.libraries,
            known,
            reading=request.reading,
        )
        search = Search(options, request.room, request.places)
        return cls(search, search.best(_stagings(program, tile)), tail)

    @property
    def seconds(self) -> float:
        """Projected time, the tail's included; what runs on whole maps in any case is left out."""
        return self.candidate.seconds + (self.tail.seconds if self.tail else 0.0)

    @property
    def rank(self) -> tuple[bool, float]:
        """Smaller is better."""
        fits = self.candidate.fits
        return not fits, self.seconds if fits else self.candidate.nbytes

    def plan(self, request: PlanRequest, whole: _Attempt) -> Plan:
        """The frozen plan; ``whole`` is the attempt without a tail, whose program has every operator."""
        candidate, options = self.candidate, self.search.options
        program, staging, differentiated = options.program, candidate.staging, options.differentiated
        stores = _with_tiles(candidate)
        tiled = tuple(option.tiled for option in candidate.options)
        worst = max(
            moments(
                tiled,
                self.search.small_bytes(staging),
                StoredBytes(stores, staging.levels),
                reuses_heap=candidate.reuses_heap,
            ),
            key=lambda moment: moment.nbytes,
        )
        assert worst.nbytes == candidate.nbytes, (worst, candidate.nbytes)
        everything, training = whole.search.options, bool(request.leaves)
        resident = resident_time(everything.program, everything.differentiated, request.rates)
        plain = plain_time(everything.works, request.rates, backward=training) + resident
        flops = sum(option.time.flops for option in candidate.options) + resident.flops
        flops += self.tail.flops if self.tail else 0
        return Plan(
            image_shape=request.image_shape,
            dtype=request.dtype,
            training=training,
            tile=_tile(program, request, candidate),
            phases=tuple(
                each.phase(differentiated=is_differentiated(each.stage, differentiated)) for each in tiled
            ),
            segments=tuple(Segment(level, names) for level, names in staging.segments.items()),
            stores=stores,
            levels=dict(staging.levels),
            differentiated=differentiated,
            budget=request.budget,
            reuses_heap=candidate.reuses_heap,
            terms=(*_reserved(request), *worst.terms),
            worst=worst.name,
            worst_operator=_named(program, worst.operator),
            plain_bytes=plain_bytes(everything.program, everything.differentiated),
            projected_seconds=self.seconds + resident.seconds,
            plain_seconds=plain.seconds,
            recomputation=flops / plain.flops if plain.flops else 1.0,
            num_resident=_num_last(program, staging),
            # In the tail nothing streams, so only the program without one has the reasons.
            image_held_bytes=request.reading.held,
            image_read_bytes=max(
                (
                    request.reading.of(each.largest(program.image)).transient
                    for each in tiled
                    if program.image in each.stage.inputs
                ),
                default=0,
            ),
            residents=tuple(f"{node.note} ({node.source})" for node in everything.program.residents),
        )


def _num_last(program: Program, staging: Staging) -> int:
    """Operators on whole maps that run after the last tile: the resident tail."""
    last = max(staging.levels.values(), default=0)
    return sum(staging.levels[node.name] == last for node in on_whole_maps(program))


def _reserved(request: PlanRequest) -> tuple[MemoryTerm, ...]:
    """The term of what is held already, if that counts."""
    if not request.reserved:
        return ()
    return (MemoryTerm("reserved (context, libraries, weights, optimiser)", request.reserved),)


def _stagings(program: Program, tile: tuple[int, int] | None) -> Iterator[Staging]:
    """The program staged with fewer and more cuts, each way once."""
    limits = HALO_LIMITS if tile is None else (HALO_SHARE * min(tile),)
    for cuts in dict.fromkeys(choose_cuts(program, limit) for limit in limits):
        yield divide(program, cuts)


def _tails(whole: _Attempt, request: PlanRequest) -> Iterator[_Tail]:
    """Tails to try: one that takes no more than the largest step does, and one that fills the budget.

    A tail lives when no tile does: after the last forward step and before the first backward one.
    """
    # Without what libraries take for a step: a tail has its own.
    backward = bool(request.leaves)
    steps = [
        option.nbytes - total_bytes(library_terms(option.tiled.outline, request.libraries, backward=backward))
        for option in whole.candidate.options
    ]
    largest = max(steps, default=0)
    allowed = [largest]
    if request.room is not None and request.tile is None and whole.candidate.fits:
        allowed.append(largest + request.room - whole.candidate.nbytes)
    tails = {tail.start: tail for nbytes in allowed if (tail := _tail(whole, nbytes)) is not None}
    return iter(tails.values())


def _tail(whole: _Attempt, allowed: int) -> _Tail | None:
    """The longest tail whose maps together take no more than ``allowed`` bytes."""
    options = whole.search.options
    nodes = [node for node in options.program.nodes.values() if node.kind is Kind.LOCAL]
    total, length = 0, 0
    for node in reversed(nodes):
        total += TAIL_COPIES * node.nbytes
        if total > allowed:
            break
        length += 1
    if not length:
        return None
    works = {node.name: options.works[node.name] for node in nodes[-length:]}
    time = plain_time(works, options.rates, backward=bool(options.differentiated))
    return _Tail(nodes[-length].name.partition(".")[0], time.seconds, time.flops)


def _with_tiles(candidate: Candidate) -> dict[str, StorePlan]:
    """The candidate's stores with the extents of the tiles that write them."""
    return {
        name: replace(candidate.stores[name], tile=option.tiled.largest_own(name))
        for option in candidate.options
        for name in option.tiled.stage.stored
    }


def _tile(program: Program, request: PlanRequest, candidate: Candidate) -> tuple[int, int]:
    """Largest edge (h, w) of a tile in input pixels: as asked for, or as the first phase has it."""
    height, width = program.nodes[program.image].size
    if request.tile is not None:
        return min(request.tile[0], height), min(request.tile[1], width)
    if not candidate.options:
        return height, width
    first = candidate.options[0].tiled
    return share(height, first.rows.num_parts), share(width, first.cols.num_parts)


def _named(program: Program, operator: str) -> str:
    """An operator with where it comes from."""
    if not operator:
        return "the model"
    source = program.nodes[operator].source
    return f"{operator} ({source})" if source else operator
