"""Bytes of tiles that are moved while others are computed: the next tile's inputs, the last one's results.

They are counted for a stage's largest tile, by map. A map is *away* if it lives outside the device's memory;
the caller knows which maps are.
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
    """Read or written in the forward pass if the map is away; not counted in the step itself."""
    backward: int = 0
    """Read in the backward pass if the map is away."""
    gradient: int = 0
    """Read from or added to the gradient map if that is away."""


def on_the_way(tiled: TiledStage) -> dict[str, OnTheWay]:
    """Bytes on the way of each map that the stage reads or stores; empty if there is a single tile."""
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
        # A result before the tile's last operator is held until that has run, beside the previous tile's.
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
        Stages of the pass, as for `peak_points`.
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
        The peak points of the pass without tiles on the way.
    room
        Bytes that any point may take; None if there is no ceiling.
    """
    if not backend.overlaps:
        return frozenset()
    # The allocator's loss is rounded down for each step.
    taken = {part: nbytes + backend.returning.of_step(nbytes) + 1 for part, nbytes in moved.items()}
    parts = [point.part for point in points if point.part in moved]
    crowded = {
        point.part for point in points if room is not None and point.nbytes + taken.get(point.part, 0) > room
    }
    return frozenset(parts) - crowded
