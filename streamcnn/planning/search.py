"""The search for the fastest plan of one program: tiles, stores and recomputation under a budget.

A solution is a staging (which maps are stored, where stretches are split), the sets of stored maps that are
offloaded and that are dropped between the two passes, and whether freed blocks are kept for reuse. Given
these, phases are independent of each other: each takes the tiles with the least projected time whose steps
fit into what the budget leaves at that point. The search is over solutions. It first offloads the maps that
are cheapest to offload: as few as make the plan fit, or a few more. If the disk has no room for them,
`within_disk` takes some off it. Then it keeps, offloads, drops or recomputes maps instead, one by one,
wherever that is faster, and last in pairs, where one map makes room for the other.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations, product

import numpy as np

from streamcnn.graph.program import Kind
from streamcnn.plan.hardware import HardwareProfile
from streamcnn.plan.level_bytes import Ints
from streamcnn.plan.storage import StorePlan, Tier
from streamcnn.plan.stored_bytes import StoredBytes
from streamcnn.planning.candidate_table import CandidateTable, StageRow
from streamcnn.planning.candidates import TilingCandidate, TilingCandidates
from streamcnn.planning.choice import Choice, choose
from streamcnn.planning.cost_model import Tiers
from streamcnn.planning.disk_room import beyond, within_disk
from streamcnn.planning.global_bytes import GlobalBytes, last_readers, with_gradient_maps
from streamcnn.planning.policies import Policies, Policy
from streamcnn.planning.spec import OffloadTier
from streamcnn.planning.staging import Stage, Staging, drop, gathered, is_differentiated, recompute
from streamcnn.planning.tiling import TiledStage
from streamcnn.support.recent import Recent

SPILL_STEPS = (1.0, 1.15, 1.4, 2.0)
"""Multiples of the fewest offloaded maps that are tried: more of them leave room for larger tiles."""
ROUNDS = 4
"""How often other policies are tried for all maps that may be stored."""
THOROUGH = 8
"""Up to this many stored maps, every number of offloaded maps and every pair of moves is tried."""
_LEAST_GAIN = 1e-3
"""Share of a pass's time that is worth looking for at one map."""
_LEAST_ROUND = 1e-2
"""Share of a pass's time that a round must save for another one to be worth its time."""
_RECOMPUTED_BACKWARD = 4
"""Passes over a map's operators that recomputing it adds at least, if its readers differentiate them too."""
_NO_LIMIT = 2**62
"""More reusable bytes than any step has."""
_SOLUTIONS = 256
"""Solutions of programs with few stored maps that are cached, as moves of pairs of maps meet them again."""
_ON_THE_DEVICE = (Policy.KEEP, Policy.DROP, Policy.RECOMPUTE)
"""Policies under which a map is not moved to another tier."""
_AWAY = (Policy.DROP, Policy.RECOMPUTE, Policy.OFFLOAD_VALUES)
"""Policies that free memory of the device."""
_TABLES = 16
"""Tables that are cached, as the search alternates between a staging and one with a stored map less."""


@dataclass(frozen=True, slots=True, eq=False)
class Solution:
    """A complete choice with its projected time and bytes."""

    base: Staging
    """The staging before ``policies`` changed which maps are stored."""
    policies: Policies
    """Policies for the maps that ``base`` stores."""
    table: CandidateTable
    """The candidates of the stages of ``staging``."""
    tiers: Mapping[str, Tiers]
    """The tiers of each stored map and of its gradient map."""
    tilings: tuple[TilingCandidate, ...]
    """How each stage is tiled, those that rematerialise maps last."""
    reuses_blocks: bool
    """Whether freed blocks are kept for reuse."""
    overlaps: bool
    """Whether tiles are moved to and from other tiers while others are computed."""
    seconds: float
    nbytes: int
    fits: bool
    """Whether the solution fits the budget."""
    on_disk: Ints
    """Bytes on disk during each phase of both passes; empty where the disk's room is unlimited."""
    excess: int
    """Bytes on disk beyond its room; see `beyond`."""
    choice: Choice
    """How the tilings were chosen."""

    @property
    def staging(self) -> Staging:
        """The staging after ``policies`` were applied."""
        return self.table.staging

    @property
    def stores(self) -> dict[str, StorePlan]:
        """The plan of each stored map."""
        return self.table.stores(self.tiers)

    @property
    def tiled(self) -> tuple[TiledStage, ...]:
        """The stages of both passes in tiles."""
        return tuple(tiling.tiled for tiling in self.tilings[: len(self.staging.stages)])

    @property
    def rematerialised(self) -> tuple[tuple[int, TiledStage], ...]:
        """Tiled stages that rematerialise maps, each with the level before whose backward phase it runs."""
        tilings = self.tilings[len(self.staging.stages) :]
        return tuple(
            (each.before, tiling.tiled)
            for each, tiling in zip(self.staging.rematerialised, tilings, strict=True)
        )

    @property
    def rank(self) -> tuple[bool, int, float, int]:
        """Sort key, smaller is better: solutions that fit by time, others by bytes."""
        return not self.fits, self.excess, self.seconds if self.fits else self.nbytes, self.nbytes


class Search:
    """Solutions of one program under a budget (bytes; ``None`` for no ceiling)."""

    def __init__(
        self, tilings: TilingCandidates, budget: int | None, offload_tiers: Sequence[OffloadTier]
    ) -> None:
        self.tilings = tilings
        self.budget = budget
        self.offload_tiers = offload_tiers
        self.program = tilings.program
        self.whole = gathered(self.program)
        """Maps that are read as a whole, and so must be stored."""
        self.room_on_disk = next((each.capacity for each in offload_tiers if each.tier is Tier.DISK), None)
        """Bytes that may be on disk at one time; None for any number."""
        self._ways = (False,) if tilings.backend.keeps_blocks else (True, False)
        """Values to try for whether freed blocks are kept for reuse."""
        self._policies = tuple(Policy) if budget is not None else _ON_THE_DEVICE
        """Policies to try for a map: where memory has room for every map, moving one saves no time."""
        kinds = (Kind.GATHER, Kind.RESULT)
        self._gathers = [node for node in self.program.nodes.values() if node.kind in kinds]
        self._results = frozenset(self.program.results.values())
        self._global_bytes: tuple[Mapping[str, int], Mapping[str, int], GlobalBytes] | None = None
        self._with_gradient_maps = with_gradient_maps(self.program, tilings.differentiated)
        self._rows: dict[Stage, StageRow] = {}
        self._stagings = Recent[tuple[Staging, frozenset[str], frozenset[str]], Staging](_TABLES)
        self._tables = Recent[Staging, CandidateTable](_TABLES)
        self._solutions = Recent[tuple[Staging, Policies, bool], Solution](_SOLUTIONS)

    def best(self, stagings: Iterable[Staging]) -> Solution:
        """The best of the solutions that only offload, over all stagings."""
        return min((c for staging in stagings for c in self._offloading(staging)), key=lambda c: c.rank)

    def improved(self, found: Solution) -> Solution:
        """Change the policies of maps in ``found``, for room on disk and for speed.

        The best policy for a map depends on those of the others. So pairs of maps are changed together too:
        all of them where few maps can be stored, and elsewhere those of which one makes room for the other.
        """
        if not found.fits:
            return found
        best = self._moved_in_turn(within_disk(self, found))
        return best if len(best.base.stored) <= THOROUGH else self._moved_in_pairs(best)

    def _moved_in_turn(self, found: Solution) -> Solution:
        """Give each map the fastest policy, from the last to the first, in rounds until nothing changes."""
        thorough = len(found.base.stored) <= THOROUGH
        # By move: the solution from which it was tried last. From the same one it finds nothing new.
        looked: dict[tuple[str, ...], Solution] = {}
        for _ in range(THOROUGH if thorough else ROUNDS):
            before = found
            names = sorted(found.base.stored, key=self.program.position, reverse=True)
            for moved in (*((name,) for name in names), *(combinations(names, 2) if thorough else ())):
                if looked.get(moved) is not found:
                    looked[moved] = found
                    changed = self.moved(found, moved, thorough=thorough, policies=self._policies)
                    found = min((found, *changed), key=lambda c: c.rank)
            gained = before.seconds - found.seconds
            if found is before or (not thorough and gained < _LEAST_ROUND * found.seconds):
                break
        return found

    def _moved_in_pairs(self, found: Solution) -> Solution:
        """Bring offloaded maps back, drop or recompute them, each with a second map that makes room for it.

        The second one need not lose more time than larger tiles with its bytes may save.
        """
        best = found
        names = sorted(found.base.stored, key=self.program.position, reverse=True)
        for first in (name for name in names if name in found.policies.offloaded):
            for alone in self.moved(best, (first,), thorough=True, policies=_ON_THE_DEVICE):
                best, lost = min((best, alone), key=lambda each: each.rank), alone.seconds - best.seconds
                for second in (name for name in names if name != first and alone.policies.keeps(name)):
                    if self._saved_without(alone, second) > lost:
                        both = self.moved(alone, (second,), thorough=False, policies=_AWAY)
                        best = min((best, *both), key=lambda each: each.rank)
        return best

    def moved(
        self,
        found: Solution,
        names: tuple[str, ...],
        *,
        thorough: bool,
        policies: Iterable[Policy] = Policy,
    ) -> Iterator[Solution]:
        """``found`` with each of the policies for ``names``; unless ``thorough``, only those that may pay."""
        for chosen in product(policies, repeat=len(names)):
            moves = dict(zip(names, chosen, strict=True))
            changed = found.policies.changed(moves)
            if changed == found.policies and not thorough:
                # This is ``found`` itself.
                continue
            if all(self._is_possible(found, n, policy, thorough=thorough) for n, policy in moves.items()):
                several = thorough and not changed.offloaded
                for reuses_blocks in self._ways if several else (found.reuses_blocks,):
                    yield self._known_or_new(found.base, changed, reuses_blocks)

    def _known_or_new(self, base: Staging, policies: Policies, reuses_blocks: bool) -> Solution:
        def make() -> Solution:
            return self.solution(base, policies, reuses_blocks=reuses_blocks)

        if len(base.stored) > THOROUGH:
            return make()
        return self._solutions.get((base, policies, reuses_blocks), make)

    def _is_possible(self, found: Solution, name: str, policy: Policy, *, thorough: bool) -> bool:
        """Whether a map may have a policy and, unless ``thorough``, whether that may save time."""
        match policy:
            case Policy.KEEP:
                return True
            case Policy.OFFLOAD_VALUES:
                is_moved = thorough or not found.policies.keeps(name)
                return is_moved or self._saved_without(found, name) > _LEAST_GAIN * found.seconds
            case Policy.OFFLOAD:
                return thorough
            case Policy.DROP:
                return name in self.tilings.differentiated and (
                    thorough or name in found.policies.recomputed or self._may_pay(found, name, once=True)
                )
            case Policy.RECOMPUTE:
                return name not in self.whole and (thorough or self._may_pay(found, name, once=False))

    def _may_pay(self, found: Solution, name: str, *, once: bool) -> bool:
        """Whether computing a map again, ``once`` or per reader, may save time, halos aside.

        It saves moving the map, unless it is kept and written once more, and what stages lose for want of the
        memory that a kept map takes.
        """
        nodes, hardware = self.program.nodes, self._hardware(found.tiers)
        pending, chain = [name], dict[str, None]()
        while pending:
            place = pending.pop()
            local = nodes[place].local
            if local is None or place in chain or (place in found.tiers and place != name):
                continue
            chain[place] = None
            pending.extend(local.accesses)
        recomputed = sum(self.tilings.works_on_tiles[each].seconds(hardware) for each in chain)
        is_offloaded, passes, readers = name in found.policies.offloaded, 1, 0
        saved = 0.0 if is_offloaded else self._saved_without(found, name)
        for tiling, row in zip(found.tilings, found.table.rows, strict=True):
            if is_offloaded or not once:
                for traffic in (tiling.moved.get(name), row.outputs.get(name)):
                    saved += 0.0 if traffic is None else traffic.seconds(hardware, found.tiers[name])
            readers += name in tiling.moved and name not in row.outputs
            if name in row.outputs and row.is_differentiated and tiling.tiled.stage.reductions and not once:
                # Its own phase stays for the reduction, and differentiates the map as its readers do.
                passes = _RECOMPUTED_BACKWARD
        if not once:
            # Each reader computes it in both passes, and its own phase no longer does so in the forward pass.
            passes = max(passes, 2 * readers - 1)
        return passes * recomputed < saved

    def _saved_without(self, found: Solution, name: str) -> float:
        """The most seconds that later stages may save if a map and its gradient map are not in memory."""
        if self.budget is None:
            return 0.0
        later = found.table.levels >= found.staging.levels[name]
        saved = found.choice.saved_with(self.budget + 2 * self.program.nodes[name].nbytes)
        return float(saved[later].sum())

    def _offloading(self, staging: Staging) -> Iterator[Solution]:
        """Solutions of a staging that offload maps in the order of their cost per byte."""
        if self.budget is None:
            # Memory has room for every map: moving one saves no time.
            yield from (self.solution(staging, Policies(), reuses_blocks=each) for each in self._ways)
            return
        order = self._offload_order(staging)
        yield self.solution(staging, Policies(), reuses_blocks=True)
        for gradients in (True, False):
            yield from self._offloaded(staging, order, gradients=gradients)

    def _offloaded(self, staging: Staging, order: Sequence[str], *, gradients: bool) -> Iterator[Solution]:
        """Solutions with fewer and with more maps offloaded, with or without their gradient maps."""

        def offload(count: int) -> Solution:
            offloaded = frozenset(order[:count])
            policies = Policies(offloaded, offloaded if gradients else frozenset())
            return self.solution(staging, policies, reuses_blocks=False)

        fewest = _fewest(len(order), lambda count: offload(count).fits)
        counts = {min(len(order), math.ceil(fewest * step)) for step in SPILL_STEPS}
        for count in range(len(order) + 1) if len(order) <= THOROUGH else sorted(counts):
            yield offload(count)

    def _offload_order(self, staging: Staging) -> list[str]:
        """Stored maps, ordered by the time that moving them takes per byte freed."""
        moved, tier = self.table(staging).traffic(), self.offload_tiers[-1].tier

        def price(name: str) -> tuple[float, int, str]:
            nbytes = self.program.nodes[name].nbytes
            seconds = moved[name].seconds(self.tilings.hardware, (tier, tier))
            # Rounded, so that among equally expensive maps the larger comes first; some have no channels.
            return float(f"{seconds / max(nbytes, 1):.3g}"), -nbytes, name

        return sorted(staging.stored, key=price)

    def solution(self, base: Staging, policies: Policies, *, reuses_blocks: bool) -> Solution:
        """The solution with the fastest tiles that fit, given the maps' policies.

        Parameters
        ----------
        policies
            Policies for the maps that ``base`` stores.
        reuses_blocks
            Whether freed blocks may be kept for reuse, if that is a choice. They never are if maps are
            offloaded.
        """
        reuses_blocks = reuses_blocks and reuses_blocks in self._ways and not policies.offloaded
        staging = self._staging(base, policies)
        table, global_bytes = self.table(staging), self.global_bytes(staging)
        tiers = self._tiers(staging, policies)
        hardware = self._hardware(tiers)
        # Moving tiles while others are computed is faster, and takes memory.
        ways = (True, False) if self.tilings.backend.overlaps and policies.offloaded else (False,)
        all_scores = [
            table.score(tiers, global_bytes, hardware, reuses_blocks=reuses_blocks, overlaps=overlaps)
            for overlaps in ways
        ]
        choices = (
            (overlaps, choose(scores, limit, self.budget))
            for overlaps, scores in zip(ways, all_scores, strict=True)
            for limit in (table.limits if reuses_blocks else (_NO_LIMIT,))
        )
        overlaps, choice = min(choices, key=lambda each: each[1].rank)
        on_disk = self._on_disk(table, tiers)
        return Solution(
            base=base,
            policies=policies,
            table=table,
            tiers=tiers,
            tilings=tuple(row.tilings[i] for row, i in zip(table.rows, choice.indices, strict=True)),
            reuses_blocks=reuses_blocks,
            overlaps=overlaps,
            seconds=choice.seconds,
            nbytes=choice.nbytes,
            fits=choice.fits,
            on_disk=on_disk,
            excess=0 if self.room_on_disk is None else beyond(on_disk, self.room_on_disk),
            choice=choice,
        )

    def _on_disk(self, table: CandidateTable, tiers: Mapping[str, Tiers]) -> Ints:
        """Bytes on disk during each phase of the forward pass, then of the backward pass, if that matters."""
        if self.room_on_disk is None:
            return np.zeros(0, np.int64)
        held = StoredBytes(table.stores(tiers), table.staging.levels, Tier.DISK).held
        return np.concatenate((held.forward.total, held.backward.total))

    def _staging(self, base: Staging, policies: Policies) -> Staging:
        recomputed, dropped = policies.recomputed, policies.dropped

        def make() -> Staging:
            staging = base
            for name in sorted(recomputed, key=self.program.position):
                staging = recompute(self.program, staging, name)
            if not dropped:
                return staging
            differentiated = self.tilings.differentiated
            return drop(
                self.program, staging, dropped, lambda stage: is_differentiated(stage, differentiated)
            )

        return self._stagings.get((base, recomputed, dropped), make)

    def table(self, staging: Staging) -> CandidateTable:
        """The candidates of a staging's stages; the latest tables are cached."""

        def make() -> CandidateTable:
            stages = (*staging.stages, *(each.stage for each in staging.rematerialised))
            return CandidateTable.of(staging, tuple(map(self._row, stages)), self._gathers)

        return self._tables.get(staging, make)

    def _row(self, stage: Stage) -> StageRow:
        row = self._rows.get(stage)
        if row is None:
            row = self._rows[stage] = StageRow.of(self.tilings, stage)
        return row

    def _tiers(self, staging: Staging, policies: Policies) -> dict[str, Tiers]:
        """The tiers of each stored map and its gradient map: offloaded maps go to the first tier with room,
        else to the last.

        Results stay on disk for the caller to read piece by piece, and take no memory.
        """
        tiers: dict[str, Tiers] = dict.fromkeys(staging.stored, (Tier.MEMORY, Tier.MEMORY))
        free = [each.capacity for each in self.offload_tiers]
        for name in sorted(policies.offloaded, key=self.program.position):
            has_gradient = name in policies.gradients
            nbytes = (1 + has_gradient) * self.program.nodes[name].nbytes
            index = next((i for i, n in enumerate(free) if n is None or n >= nbytes), len(free) - 1)
            left = free[index]
            free[index] = None if left is None else left - nbytes
            tier = self.offload_tiers[index].tier
            tiers[name] = tier, tier if has_gradient else Tier.MEMORY
        tiers.update(dict.fromkeys(staging.stored & self._results, (Tier.DISK, Tier.DISK)))
        return tiers

    def _hardware(self, tiers: Mapping[str, Tiers]) -> HardwareProfile:
        """The hardware's rates for these tiers, as RAM buffers part of what is written to files."""
        hardware = self.tilings.hardware
        nbytes = sum(each.count(Tier.DISK) * self.program.nodes[name].nbytes for name, each in tiers.items())
        buffered = min(nbytes, sum(each.buffered for each in self.offload_tiers))
        if not buffered:
            return hardware
        on_disk = hardware.write_bytes[Tier.DISK]
        seconds = buffered / hardware.buffered_write_bytes + (nbytes - buffered) / on_disk
        return replace(hardware, write_bytes={**hardware.write_bytes, Tier.DISK: nbytes / seconds})

    def global_bytes(self, staging: Staging) -> GlobalBytes:
        """Bytes of values that are not tiled, cached for a staging and those that recompute more of it."""
        # Recomputing a map changes stages, not levels or segments.
        readers = last_readers(self.program, staging, self._with_gradient_maps)
        known = self._global_bytes
        if known is None or known[0] is not staging.levels or known[1] != readers:
            tilings = self.tilings
            global_bytes = GlobalBytes(
                self.program, staging, tilings.differentiated, tilings.backend, tilings.reading
            )
            self._global_bytes = known = (staging.levels, readers, global_bytes)
        return known[2]


def _fewest(most: int, fits: Callable[[int], bool]) -> int:
    """The smallest count up to ``most`` that fits, else ``most``; larger counts are assumed to fit better."""
    if fits(0):
        return 0
    low, high = 0, most
    while low + 1 < high:
        middle = (low + high) // 2
        low, high = (low, middle) if fits(middle) else (middle, high)
    return high
