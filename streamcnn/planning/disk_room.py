"""What is computed again where the disk has no room for all maps that memory has no room for."""

from __future__ import annotations

import math
from bisect import insort
from collections.abc import Iterable, Iterator
from itertools import chain
from typing import TYPE_CHECKING

from streamcnn.plan.level_bytes import Ints
from streamcnn.planning.policies import Policy

if TYPE_CHECKING:
    from streamcnn.planning.search import Search, Solution

_COMPUTED_AGAIN = (Policy.DROP, Policy.RECOMPUTE)


def beyond(on_disk: Ints, room: int) -> int:
    """Bytes on disk beyond ``room``, added up over all phases.

    The most at one time says too little: of several phases with as much, each has to be dealt with.
    """
    return int((on_disk - room).clip(0).sum())


def within_disk(search: Search, found: Solution) -> Solution:
    """``found`` with fewer maps on disk, until those that are left have room there or none can go.

    What is kept in memory instead may be what tiles need when maps are computed again from further back, so
    that is tried without and with it. Where that does not end with room for all, it is tried as if there were
    none for any: so maps go in another order.
    """
    best, rooms = found, () if search.room_on_disk is None else (search.room_on_disk, 0)
    for room in rooms:
        if not best.excess:
            break
        ways = (_with_less_on_disk(search, found, room, policies) for policies in (_COMPUTED_AGAIN, Policy))
        best = min((best, *ways), key=lambda each: each.rank)
    return best


def _with_less_on_disk(search: Search, found: Solution, room: int, policies: Iterable[Policy]) -> Solution:
    """``found`` with policies for some maps, those first that free most bytes for the time that they take.

    What a map frees is looked at again when its turn comes: mostly it is less once others are gone.
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
    """``found`` with whichever policy for ``name`` frees bytes fastest, and seconds for each byte."""
    best: tuple[float, Solution | None] = math.inf, None
    moved = search.moved(found, (name,), thorough=True, policies=policies)
    for each in chain(moved, _computed_from_further_back(search, found, name)):
        freed = beyond(found.on_disk, room) - beyond(each.on_disk, room)
        if each.fits and freed > 0 and (price := (each.seconds - found.seconds) / freed) < best[0]:
            best = price, each
    return best


def _computed_from_further_back(search: Search, found: Solution, name: str) -> Iterator[Solution]:
    """``found`` with ``name`` recomputed, and what it is computed from recomputed as well, or offloaded.

    That is needed for longer then, and memory may have no room for it that long.
    """
    stage = next((each for each in found.staging.stages if name in each.stored), None)
    if stage is None or name in search.whole:
        return
    inputs = found.staging.stored.intersection(stage.inputs) - search.whole
    for policy in (Policy.RECOMPUTE, Policy.OFFLOAD):
        moves = {name: Policy.RECOMPUTE, **dict.fromkeys(inputs, policy)}
        policies = found.policies.changed(moves)
        yield search.solution(found.base, policies, reuses_blocks=found.reuses_blocks)
