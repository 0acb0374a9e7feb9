"""Bytes of tiles that are moved while others are computed: the next tile's inputs, the last one's results.

The next tile of a phase's last one is the first of the next phase. Bytes are counted for a stage's largest
tile, by map. A map is *away* if it lives outside the device's memory; the caller knows which maps are.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby, zip_longest

from streamcnn.plan.plan import PassPart
from streamcnn.plan.storage import StorePlan, Tier
from streamcnn.planning.backends import Backend
from streamcnn.planning.memory_model import PeakPoint
from streamcnn.planning.tiling import TiledStage

_PHASES = ("forward", "backward", "again")
"""What runs of phases are called in :data:`PassPart`."""


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
        found[name] = OnTheWay(nbytes, nbytes, _gradient(tiled, name))
    for name in tiled.stage.stored:
        nbytes = tiled.largest_nbytes(name)
        # A result before the tile's last operator is held until that has run, beside the previous tile's.
        times = 1 if name == tiled.stage.nodes[-1] else 2
        found[name] = OnTheWay(times * nbytes, nbytes, nbytes)
    return found


def _gradient(tiled: TiledStage, name: str) -> int:
    """Bytes that the largest tile adds to a gradient map: each operator that reads the map gives its own."""
    readers = sum(name in operands for operands in tiled.outline.map_operands.values())
    return readers * tiled.largest_nbytes(name)


class MovedTiles:
    """Bytes of tiles that a pass moves to and from other tiers, by part of the pass.

    Parameters
    ----------
    tiled, rematerialised
        Stages of the pass, as for `peak_points`.
    stores
        The plan of each stored map.
    """

    def __init__(
        self,
        tiled: Sequence[TiledStage],
        rematerialised: Sequence[tuple[int, TiledStage]],
        stores: Mapping[str, StorePlan],
    ) -> None:
        self._tiled = tiled
        self._rematerialised = rematerialised
        self._away = {name for name, store in stores.items() if store.tier is not Tier.MEMORY}
        self._gradients_away = {
            name for name, store in stores.items() if store.gradient_tier is not Tier.MEMORY
        }

    @property
    def beside(self) -> dict[PassPart, int]:
        """What is on the way while a tile is computed, in phases of several tiles."""

        def forward(stage: TiledStage) -> int:
            return sum(each.forward for name, each in on_the_way(stage).items() if name in self._away)

        def backward(stage: TiledStage) -> int:
            return sum(
                (name in self._away) * each.backward + (name in self._gradients_away) * each.gradient
                for name, each in on_the_way(stage).items()
            )

        return self._by_part(forward, backward)

    @property
    def sent(self) -> dict[PassPart, int]:
        """What the largest tile sends: values of maps that it stores, gradients of maps that it reads."""

        def forward(stage: TiledStage) -> int:
            return sum(map(stage.largest_nbytes, self._away.intersection(stage.stage.stored)))

        def backward(stage: TiledStage) -> int:
            return sum(
                _gradient(stage, name) for name in self._gradients_away.intersection(stage.stage.inputs)
            )

        return self._by_part(forward, backward)

    @property
    def brought(self) -> dict[PassPart, int]:
        """What the largest tile has to be brought of the maps that it reads."""

        def read(stage: TiledStage) -> int:
            return sum(map(stage.largest_nbytes, self._away.intersection(stage.stage.inputs)))

        return self._by_part(read, read)

    def _by_part(
        self, forward: Callable[[TiledStage], int], backward: Callable[[TiledStage], int]
    ) -> dict[PassPart, int]:
        """The parts of which a function is not 0, given one for each direction."""
        found: dict[PassPart, int] = {}
        for stage in self._tiled:
            level = stage.stage.level
            found |= {("forward", level): forward(stage), ("backward", level): backward(stage)}
        for _, stage in self._rematerialised:
            part = "again", stage.stage.level
            found[part] = max(found.get(part, 0), forward(stage))
        return {part: nbytes for part, nbytes in found.items() if nbytes}


@dataclass(frozen=True, slots=True)
class Crossing:
    """Phases at whose end tiles are moved beside what is computed."""

    parts: frozenset[PassPart]
    beside: Mapping[PassPart, int]
    """By part, segments among them: bytes of such tiles beside those that `MovedTiles.beside` counts."""


_Beside = list[tuple[PeakPoint, int]]
"""Points of a pass, each with bytes of tiles that are moved while it lasts."""


@dataclass(frozen=True, slots=True)
class PhaseEnds:
    """Finds the phases at whose end there is room for tiles that are moved.

    All methods take the peak points of the pass, in order, with the tiles that are known to be on the way.
    """

    overlapped: Collection[PassPart]
    """Parts that move tiles while they compute others."""
    backend: Backend
    room: int | None
    """Bytes that any point may take; None if there is no ceiling."""

    def trailing(self, points: Sequence[PeakPoint], sent: Mapping[PassPart, int]) -> Crossing:
        """The phases whose last tile may leave while what comes next runs, up to the next phase's first tile.

        Parameters
        ----------
        sent
            As from :attr:`MovedTiles.sent`.
        """
        found: list[tuple[PassPart, _Beside]] = []
        for point, between, following in _ends(points):
            if nbytes := sent.get(point.part, 0):
                beside = [(each, nbytes) for each in between]
                if following is not None:
                    # What its own tiles send has room already, and none does before the first.
                    beside.append((following, nbytes - self._own(sent, following)))
                found.append((point.part, beside))
        return self._with_room(found)

    def leading(self, points: Sequence[PeakPoint], brought: Mapping[PassPart, int]) -> Crossing:
        """The phases during whose last tile the inputs of the next phase's first tile may come.

        Parameters
        ----------
        brought
            As from :attr:`MovedTiles.brought`.
        """
        found: list[tuple[PassPart, _Beside]] = []
        for point, between, following in _ends(points):
            if following is not None and (nbytes := brought.get(following.part, 0)):
                # The inputs of a tile of its own have room already, and none comes after the last.
                own = (point, nbytes - self._own(brought, point))
                found.append((point.part, [own, *((each, nbytes) for each in between)]))
        return self._with_room(found)

    def _own(self, moved: Mapping[PassPart, int], point: PeakPoint) -> int:
        return moved.get(point.part, 0) if point.part in self.overlapped else 0

    def _with_room(self, found: Sequence[tuple[PassPart, _Beside]]) -> Crossing:
        """Those phases for which each given point has room for the bytes given with it."""
        if not self.backend.overlaps:
            return Crossing(frozenset(), {})
        crowded = {
            part
            for part, beside in found
            for point, nbytes in beside
            if self.room is not None
            and nbytes > 0
            and point.nbytes + _taken(nbytes, self.backend) > self.room
        }
        most: dict[PassPart, int] = {}
        for part, beside in found:
            for point, nbytes in beside:
                if part not in crowded and nbytes > 0:
                    most[point.part] = max(most.get(point.part, 0), nbytes)
        return Crossing(frozenset(part for part, _ in found) - crowded, most)


def _ends(points: Sequence[PeakPoint]) -> Iterator[tuple[PeakPoint, list[PeakPoint], PeakPoint | None]]:
    """Each phase, the segments after it, and the next phase in the same direction, if there is one."""
    # Between the passes all tiles arrive.
    for _, each in groupby(points, lambda point: point.part[0] in ("forward", "segment forward")):
        run = list(each)
        phases = [place for place, point in enumerate(run) if point.part[0] in _PHASES]
        for place, following in zip_longest(phases, phases[1:]):
            yield run[place], run[place + 1 : following], None if following is None else run[following]


def _taken(nbytes: int, backend: Backend) -> int:
    """Bytes with the allocator's loss, which is rounded down for each step."""
    return nbytes + backend.returning.of_step(nbytes) + 1


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
    taken = {part: _taken(nbytes, backend) for part, nbytes in moved.items()}
    parts = [point.part for point in points if point.part in moved]
    crowded = {
        point.part for point in points if room is not None and point.nbytes + taken.get(point.part, 0) > room
    }
    return frozenset(parts) - crowded
