"""What moving tiles while others are computed takes: the next one's inputs, and the last one's results.

Bytes are those of a stage's largest tile, by map. The caller knows which maps are away from the device's
memory.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

from streamcnn.plan.plan import PassPart
from streamcnn.plan.storage import StorePlan, Tier
from streamcnn.planning.backends import Backend
from streamcnn.planning.memory_model import PeakPoint
from streamcnn.planning.tiling import TiledStage


@dataclass(frozen=True, slots=True)
class OnTheWay:
    """Bytes of one map that are moved for a tile."""

    forward: int = 0
    """In the forward pass, if the map is away: read or written, and not counted in the step itself."""
    backward: int = 0
    """In the backward pass, if the map is away: read."""
    gradient: int = 0
    """Of its gradient map, if that is away: read or added."""


def on_the_way(tiled: TiledStage) -> dict[str, OnTheWay]:
    """For each map that the stage reads or stores; nothing if there is a single tile."""
    if tiled.num_tiles == 1:
        return {}
    found = {}
    for name in tiled.stage.inputs:
        nbytes = tiled.largest_nbytes(name)
        # Each operator that reads it gives a gradient of its own.
        readers = sum(name in operands for operands in tiled.outline.map_operands.values())
        found[name] = OnTheWay(nbytes, nbytes, readers * nbytes)
    for name in tiled.stage.stored:
        nbytes = tiled.largest_nbytes(name)
        # What a tile gives before its last operator is held until that is computed, the last one's beside it.
        times = 1 if name == tiled.stage.nodes[-1] else 2
        found[name] = OnTheWay(times * nbytes, nbytes, nbytes)
    return found


def moved_beside(
    tiled: Iterable[TiledStage],
    rematerialised: Iterable[tuple[int, TiledStage]],
    stores: Mapping[str, StorePlan],
) -> dict[PassPart, int]:
    """By part of a pass: bytes that are on the way while a tile is computed.

    Parameters
    ----------
    tiled, rematerialised
        Its stages, as `peak_points` has them.
    """
    away = {name for name, store in stores.items() if store.tier is not Tier.MEMORY}
    gradients = {name for name, store in stores.items() if store.gradient_tier is not Tier.MEMORY}
    found: dict[PassPart, int] = {}
    for stage in tiled:
        moved = on_the_way(stage)
        found["forward", stage.stage.level] = _forward(moved, away)
        found["backward", stage.stage.level] = sum(
            (name in away) * each.backward + (name in gradients) * each.gradient
            for name, each in moved.items()
        )
    for _, stage in rematerialised:
        part = "again", stage.stage.level
        found[part] = max(found.get(part, 0), _forward(on_the_way(stage), away))
    return {part: nbytes for part, nbytes in found.items() if nbytes}


def _forward(moved: Mapping[str, OnTheWay], away: Collection[str]) -> int:
    return sum(each.forward for name, each in moved.items() if name in away)


def overlapped(
    points: Sequence[PeakPoint], moved: Mapping[PassPart, int], backend: Backend, room: int | None
) -> frozenset[PassPart]:
    """The parts of a pass that leave room for tiles on the way.

    Parameters
    ----------
    points
        The peak points of the pass without that.
    room
        Bytes that any point may take; None if there is no ceiling.
    """
    if not backend.overlaps:
        return frozenset()
    # What the allocator loses is rounded down for each step.
    taken = {part: nbytes + backend.returning.of_step(nbytes) + 1 for part, nbytes in moved.items()}
    parts = [point.part for point in points if point.part in moved]
    crowded = {
        point.part for point in points if room is not None and point.nbytes + taken.get(point.part, 0) > room
    }
    return frozenset(parts) - crowded
