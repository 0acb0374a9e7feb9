"""The search for the fastest plan of one program: tiles, stores and recomputation under a budget.

A candidate is a staging (which maps are stored, where stretches are cut), the set of stored maps that are
spilled, and whether the C library reuses freed blocks. Given these, phases are independent of each other:
each takes the tiles with the least projected time among those whose steps fit into what the budget leaves
at that moment. What remains is a search over candidates: the spilled maps are first the cheapest ones to
spill, as few as let a plan fit or some more; then, one by one, a spilled map is brought back or computed
again instead, wherever that is faster.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from enum import Enum
from itertools import combinations, product

import numpy as np

from streamcnn.memory_model import reuse_waste
from streamcnn.options import Option, Options
from streamcnn.plan import Home, StorePlan
from streamcnn.small_bytes import SmallBytes
from streamcnn.staging import Stage, Staging, gathered, recompute
from streamcnn.table import Ints, StageRow, Table, Weighed

SPILL_STEPS = (1.0, 1.15, 1.4, 2.0)
"""How many times the fewest spilled maps are tried: more of them leave room for larger tiles."""
ROUNDS = 2
"""How often all spilled maps are looked at once more."""
THOROUGH = 8
"""Up to so many stored maps, every count of spilled ones and every pair of moves is tried."""
_AGAIN_BACKWARD = 4
"""Passes over a map's operators that are added where its readers differentiate them too, at least."""
CHOICE_ROUNDS = 16
"""How often options are chosen anew where they do not fit, at most."""
KERNEL_ROUNDS = 4
"""How often options are chosen anew for what the last ones hold of kernels, at most."""
_ANY = 2**62
_TABLES = 16
"""Tables kept; the search goes to and fro between a staging and one with a map less."""


class _Fate(Enum):
    """What becomes of a map that could be stored."""

    IN_MEMORY = "in memory"
    SPILLED = "spilled"
    AGAIN = "computed again"


@dataclass(frozen=True, slots=True)
class SpillPlace:
    """Where maps go that the budget has no room for."""

    home: Home
    capacity: int | None = None
    """Bytes that it takes; ``None`` for any number."""


@dataclass(frozen=True, slots=True, eq=False)
class Candidate:
    """A complete choice with its projected time and bytes."""

    base: Staging
    """The staging before maps were taken out of it."""
    again: frozenset[str]
    """Maps that it stores and that are computed again instead."""
    staging: Staging
    stores: Mapping[str, StorePlan]
    options: tuple[Option, ...]
    """How each stage is cut."""
    reuses_heap: bool
    seconds: float
    nbytes: int
    fits: bool

    @property
    def spilled(self) -> frozenset[str]:
        """Stored maps that are not in the device's memory."""
        return frozenset(name for name, store in self.stores.items() if store.home is not Home.MEMORY)

    @property
    def rank(self) -> tuple[bool, float, int]:
        """Smaller is better: what fits by time, what does not by bytes."""
        return not self.fits, self.seconds if self.fits else self.nbytes, self.nbytes


class Search:
    """Candidates of one program under a budget (bytes; ``None`` for no ceiling)."""

    def __init__(self, options: Options, budget: int | None, places: Sequence[SpillPlace]) -> None:
        self.options = options
        self.budget = budget
        self.places = places
        self.program = options.program
        self._whole = gathered(self.program)
        self._small: tuple[Mapping[str, int], SmallBytes] | None = None
        self._rows: dict[Stage, StageRow] = {}
        self._stagings: dict[tuple[Staging, frozenset[str]], Staging] = {}
        self._tables: dict[Staging, Table] = {}

    def best(self, stagings: Iterable[Staging]) -> Candidate:
        """The best of the candidates that only spill, over all stagings."""
        return min((c for staging in stagings for c in self._spilling(staging)), key=lambda c: c.rank)

    def improved(self, found: Candidate) -> Candidate:
        """``found`` with maps kept elsewhere, or computed again, wherever that is faster.

        Where few maps can be stored, pairs of them are moved together too.
        """
        if not found.fits:
            return found
        thorough = len(found.base.stored) <= THOROUGH
        for _ in range(THOROUGH if thorough else ROUNDS):
            before = found
            names = sorted(
                found.base.stored if thorough else found.spilled,
                key=lambda n: (-self.program.nodes[n].nbytes, n),
            )
            for moved in (*((name,) for name in names), *(combinations(names, 2) if thorough else ())):
                found = min((found, *self._moved(found, moved, thorough)), key=lambda c: c.rank)
            if found is before:
                break
        return found

    def _moved(self, found: Candidate, names: tuple[str, ...], thorough: bool) -> Iterator[Candidate]:
        """``found`` with each of ``names`` in memory, spilled or computed again, as far as that may pay."""
        for fates in product(_Fate, repeat=len(names)):
            by_fate = {fate: {n for n, f in zip(names, fates, strict=True) if f is fate} for fate in _Fate}
            again = by_fate[_Fate.AGAIN]
            if not again.isdisjoint(self._whole):
                continue
            if not thorough and (
                by_fate[_Fate.SPILLED] or not all(self._may_pay(found, name) for name in again)
            ):
                continue
            for reuses_heap in (True, False) if thorough else (found.reuses_heap,):
                yield self.candidate(
                    found.base,
                    (found.again - set(names)) | again,
                    (found.spilled - set(names)) | by_fate[_Fate.SPILLED],
                    reuses_heap=reuses_heap,
                )

    def _may_pay(self, found: Candidate, name: str) -> bool:
        """Whether computing a map again can be faster than moving it, halos left out."""
        nodes, rates = self.program.nodes, self.options.rates
        pending, chain = [name], dict[str, None]()
        while pending:
            place = pending.pop()
            local = nodes[place].local
            if local is None or place in chain or (place in found.stores and place != name):
                continue
            chain[place] = None
            pending.extend(local.links)
        again = sum(self.options.works[each].seconds(rates) for each in chain)
        moved, passes = 0.0, 1
        for option, row in zip(found.options, self._table(found.staging).rows, strict=True):
            for traffic in (option.moved.get(name), row.outputs.get(name)):
                moved += 0.0 if traffic is None else traffic.seconds(rates, found.stores[name].home)
            if name in row.outputs and row.is_differentiated and option.tiled.stage.reductions:
                # Its own phase stays, and differentiates it for the reduction as its readers do for theirs.
                passes = _AGAIN_BACKWARD
        return passes * again < moved

    def _spilling(self, staging: Staging) -> Iterator[Candidate]:
        """Candidates of a staging with maps spilled in the order of what that costs per byte."""
        order = self._spill_order(staging)

        def spill(count: int) -> Candidate:
            return self.candidate(staging, frozenset(), frozenset(order[:count]), reuses_heap=False)

        yield self.candidate(staging, frozenset(), frozenset(), reuses_heap=True)
        fewest = _fewest(len(order), lambda count: spill(count).fits)
        counts = {min(len(order), math.ceil(fewest * step)) for step in SPILL_STEPS}
        for count in range(len(order) + 1) if len(order) <= THOROUGH else sorted(counts):
            yield spill(count)

    def _spill_order(self, staging: Staging) -> list[str]:
        """Stored maps, those first that free most bytes for the time that moving them takes."""
        moved, home = self._table(staging).moved(), self.places[-1].home

        def price(name: str) -> tuple[float, int, str]:
            nbytes = self.program.nodes[name].nbytes
            seconds = moved[name].seconds(self.options.rates, home)
            # Rounded, so that of equally dear ones the larger comes first.
            return float(f"{seconds / nbytes:.3g}"), -nbytes, name

        return sorted(staging.stored, key=price)

    def candidate(
        self, base: Staging, again: frozenset[str], spilled: frozenset[str], *, reuses_heap: bool
    ) -> Candidate:
        """The fastest tiles that fit, given what is stored where.

        Parameters
        ----------
        again
            Maps that ``base`` stores and that are computed again instead.
        spilled
            Maps that are stored outside the device's memory.
        reuses_heap
            Whether the C library may keep freed blocks. Where maps are spilled it may not: memory is short
            then, and what such a heap loses is known too roughly.
        """
        reuses_heap = reuses_heap and not spilled
        staging = self._staging(base, again)
        table, small = self._table(staging), self.small_bytes(staging)
        stores = table.stores(self._homes(staging, spilled))
        weighed = table.weigh(stores, small, self.options.rates, reuses_heap=reuses_heap)
        choices = (
            _choose(weighed, small.tail_step.heap, heap, self.budget, reuses_heap=reuses_heap)
            for heap in (table.heaps if reuses_heap else (_ANY,))
        )
        choice = min(choices, key=lambda choice: choice.rank)
        return Candidate(
            base=base,
            again=again,
            staging=staging,
            stores=stores,
            options=tuple(row.options[i] for row, i in zip(table.rows, choice.indices, strict=True)),
            reuses_heap=reuses_heap,
            seconds=choice.seconds,
            nbytes=choice.nbytes,
            fits=choice.fits,
        )

    def _staging(self, base: Staging, again: frozenset[str]) -> Staging:
        key = (base, again)
        if key not in self._stagings:
            if len(self._stagings) >= _TABLES:
                self._stagings.pop(next(iter(self._stagings)))
            staging = base
            for name in sorted(again, key=self.program.position):
                staging = recompute(self.program, staging, name)
            self._stagings[key] = staging
        return self._stagings[key]

    def _table(self, staging: Staging) -> Table:
        if staging not in self._tables:
            if len(self._tables) >= _TABLES:
                self._tables.pop(next(iter(self._tables)))
            rows = tuple(self._row(stage) for stage in staging.stages)
            self._tables[staging] = Table.of(self.program, staging, rows)
        return self._tables[staging]

    def _row(self, stage: Stage) -> StageRow:
        if stage not in self._rows:
            self._rows[stage] = StageRow.of(self.options, stage)
        return self._rows[stage]

    def _homes(self, staging: Staging, spilled: frozenset[str]) -> dict[str, Home]:
        """Where each stored map lives: spilled ones in the first place that has room, else in the last."""
        homes = dict.fromkeys(staging.stored, Home.MEMORY)
        free = [place.capacity for place in self.places]
        for name in sorted(spilled, key=self.program.position):
            # A map and its gradient map.
            nbytes = 2 * self.program.nodes[name].nbytes
            index = next((i for i, n in enumerate(free) if n is None or n >= nbytes), len(free) - 1)
            left = free[index]
            free[index] = None if left is None else left - nbytes
            homes[name] = self.places[index].home
        return homes

    def small_bytes(self, staging: Staging) -> SmallBytes:
        """What is not cut into tiles, worked out once for a staging and all that compute more of it again."""
        # Computing a map again changes stages, not levels or segments.
        if self._small is None or self._small[0] is not staging.levels:
            options = self.options
            small = SmallBytes(
                self.program, staging, options.differentiated, options.libraries, options.reading
            )
            self._small = (staging.levels, small)
        return self._small[1]


@dataclass(frozen=True, slots=True)
class _Choice:
    """Which option each stage takes, and what comes of it."""

    indices: tuple[int, ...]
    seconds: float
    nbytes: int
    fits: bool

    @property
    def rank(self) -> tuple[bool, float]:
        """Smaller is better."""
        return not self.fits, self.seconds if self.fits else self.nbytes


def _choose(weighed: Weighed, tail_heap: int, heap: int, budget: int | None, *, reuses_heap: bool) -> _Choice:
    """For each stage the fastest option that fits, where steps hold no more than ``heap`` reusable bytes.

    If not all fit, what takes less is looked for until nothing is found.
    """
    allowed = math.inf if budget is None else budget
    room = allowed
    best: _Choice | None = None
    for _ in range(CHOICE_ROUNDS):
        choice = _choose_once(weighed, tail_heap, heap, room, reuses_heap=reuses_heap)
        if best is not None and choice.nbytes >= best.nbytes:
            break
        best = choice
        if best.nbytes <= allowed:
            break
        room = best.nbytes - 1
    assert best is not None
    return replace(best, fits=best.nbytes <= allowed)


def _choose_once(
    weighed: Weighed, tail_heap: int, heap: int, allowed: float, *, reuses_heap: bool
) -> _Choice:
    """For each stage the fastest option that fits; what is held of kernels depends on all of them."""
    num_stages = len(weighed.seconds)
    room = allowed - (reuse_waste(heap, tail_heap, num_stages) if reuses_heap else 0)
    kernels, choice = weighed.kernels(None), None
    for _ in range(KERNEL_ROUNDS):
        before, choice = choice, _fastest(weighed, weighed.peaks(kernels), heap, room)
        if before is not None and np.array_equal(before, choice):
            break
        kernels = weighed.kernels(choice)
    assert choice is not None
    rows = np.arange(len(choice))
    phases = int(weighed.peaks(kernels)[rows, choice].max(initial=0))
    nbytes = max(phases, weighed.tail_peak(kernels), weighed.opening)
    if reuses_heap:
        nbytes += reuse_waste(int(weighed.heap[rows, choice].max(initial=0)), tail_heap, num_stages)
    return _Choice(
        indices=tuple(choice.tolist()),
        seconds=float(weighed.seconds[rows, choice].sum()) + weighed.outputs,
        nbytes=nbytes,
        fits=nbytes <= allowed,
    )


def _fastest(weighed: Weighed, peaks: Ints, heap: int, room: float) -> Ints:
    """By stage: the fastest option that fits; where none does, the smallest."""
    fitting = (peaks <= room) & (weighed.heap <= heap)
    seconds = np.where(fitting, weighed.seconds, np.inf)
    choice: Ints = np.where(fitting.any(axis=1), seconds.argmin(axis=1), peaks.argmin(axis=1))
    return choice


def _fewest(most: int, fits: Callable[[int], bool]) -> int:
    """The smallest count up to ``most`` that fits, given that more always fit better; else ``most``."""
    if fits(0):
        return 0
    low, high = 0, most
    while low + 1 < high:
        middle = (low + high) // 2
        low, high = (low, middle) if fits(middle) else (middle, high)
    return high
