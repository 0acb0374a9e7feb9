"""Choose maps to compute again where neither memory nor the disk has room for them."""

from __future__ import annotations

import math
from bisect import insort
from collections.abc import Iterable, Iterator
from itertools import chain, product
from operator import itemgetter
from typing import TYPE_CHECKING

from streamcnn.plan.level_bytes import Ints
from streamcnn.plan.storage import Tier
from streamcnn.planning.policies import Policy

if TYPE_CHECKING:
    from streamcnn.planning.search import Search, Solution

_COMPUTED_AGAIN = (Policy.DROP, Policy.RECOMPUTE)
_AWAY_FROM_DISK = (*_COMPUTED_AGAIN, Policy.KEEP, Policy.OFFLOAD_VALUES)
_DEAR = 1.5
"""The ratio to its former time beyond which a pass is slow, so that another way is tried."""


def beyond(on_disk: Ints, room: int) -> int:
    """Bytes on disk beyond ``room``, summed over all phases.

    The maximum would say too little: if several phases have it, each must be reduced.
    """
    return int((on_disk - room).clip(0).sum())


def within_disk(search: Search, found: Solution) -> Solution:
    """Take maps off the disk until the rest have room there, or no more can go.

    At first maps are only computed again. If there is still too little room, or the pass becomes slow, maps
    may be kept in memory too; memory then may have no room for tiles that compute maps again from further
    back. If this fails too, both are tried as if the disk had no room at all, so that maps leave it in
    another order.
    """
    best, rooms = found, () if search.room_on_disk is None else (search.room_on_disk, 0)
    for room, policies in product(rooms, (_COMPUTED_AGAIN, _AWAY_FROM_DISK)):
        is_dear = policies is _AWAY_FROM_DISK and best.seconds > _DEAR * found.seconds
        if best.excess or (is_dear and room):
            best = min(best, _with_less_on_disk(search, found, room, policies), key=lambda each: each.rank)
    return best


def _with_less_on_disk(search: Search, found: Solution, room: int, policies: Iterable[Policy]) -> Solution:
    """Change the policies of some maps, first of those that free the most bytes for their time.

    The bytes that a map frees are computed again when its turn comes: mostly fewer once other maps are gone.
    """
    looked: dict[str, tuple[Solution, Solution | None]] = {}
    before = None
    while found.excess and found is not before:
        before = found
        waiting = [(-math.inf, name) for name in sorted(found.base.stored)]
        while found.excess and waiting:
            _, name = waiting.pop(0)
            seen, less = looked.get(name, (None, None))
            if seen is found and less is not None:
                found = less
            elif seen is not found:
                price, less = _cheapest(search, found, name, room, policies)
                looked[name] = found, less
                if less is not None:
                    insort(waiting, (price, name))
    return found


def _cheapest(
    search: Search, found: Solution, name: str, room: int, policies: Iterable[Policy]
) -> tuple[float, Solution | None]:
    """The cheapest policy for ``name`` that frees bytes: seconds per byte, and the solution with it."""

    def price(less: Solution) -> float:
        freed = beyond(found.on_disk, room) - beyond(less.on_disk, room)
        return (less.seconds - found.seconds) / freed if less.fits and freed > 0 else math.inf

    # A map that is kept in memory frees no bytes on disk by itself.
    is_kept = found.tiers.get(name) == (Tier.MEMORY, Tier.MEMORY)
    moved = () if is_kept else search.moved(found, (name,), thorough=True, policies=policies)
    ways = ((price(each), each) for each in chain(moved, _computed_from_further_back(search, found, name)))
    cost, best = min(ways, key=itemgetter(0), default=(math.inf, None))
    return cost, best if cost < math.inf else None


def _computed_from_further_back(search: Search, found: Solution, name: str) -> Iterator[Solution]:
    """``found`` with ``name`` recomputed, and the maps it is computed from recomputed too, or offloaded.

    Those maps are then needed for longer, and memory may have no room for them that long.
    """
    stage = next((each for each in found.staging.stages if name in each.stored), None)
    if stage is None or name in search.whole:
        return
    inputs = found.staging.stored.intersection(stage.inputs) - search.whole
    for policy in (Policy.RECOMPUTE, Policy.OFFLOAD):
        moves = {name: Policy.RECOMPUTE, **dict.fromkeys(inputs, policy)}
        policies = found.policies.changed(moves)
        yield search.solution(found.base, policies, reuses_blocks=found.reuses_blocks)
