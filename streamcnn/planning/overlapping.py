"""Which parts of a pass move tiles while others are computed: those that leave memory for it."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import replace

from streamcnn.plan.hardware import HardwareProfile
from streamcnn.plan.plan import PassPart
from streamcnn.plan.storage import MemoryTerm, StorePlan, Tier
from streamcnn.planning.backends import Backend
from streamcnn.planning.memory_model import PeakPoint
from streamcnn.planning.search import Solution
from streamcnn.planning.tiling import TiledStage

ON_THEIR_WAY = "tiles on their way"


def overlapped(
    points: Sequence[PeakPoint],
    tiled: Sequence[TiledStage],
    rematerialised: Sequence[tuple[int, TiledStage]],
    stores: Mapping[str, StorePlan],
    backend: Backend,
    room: int | None,
) -> tuple[list[PeakPoint], frozenset[PassPart]]:
    """The peak points of a pass with what moving tiles beside others takes, and the parts that do so.

    Parameters
    ----------
    tiled, rematerialised
        Its stages, as `peak_points` has them.
    room
        Bytes that any point may take; None if there is no ceiling.
    """
    moved = dict(_moved(tiled, rematerialised, stores)) if backend.overlaps else {}
    found, parts = [], set()
    for point in points:
        nbytes = moved.get(point.part, 0)
        nbytes += backend.returning.of_step(nbytes)
        if nbytes and (room is None or point.nbytes + nbytes <= room):
            parts.add(point.part)
            found.append(replace(point, terms=(*point.terms, MemoryTerm(ON_THEIR_WAY, nbytes))))
        else:
            found.append(point)
    return found, frozenset(parts)


def hidden_seconds(solution: Solution, overlapped: Collection[PassPart], hardware: HardwareProfile) -> float:
    """Projected time of moving tiles that falls into that of computing others.

    Of a stage whose every pass does so, whichever of the two takes less is hidden by the other.
    """
    hidden = 0.0
    for tiling, row in zip(solution.tilings, solution.table.rows, strict=True):
        stage = tiling.tiled.stage
        directions = (
            ("again",) if stage.rematerialises else ("forward", "backward")[: 1 + row.is_differentiated]
        )
        if all((direction, stage.level) in overlapped for direction in directions):
            moved = sum(
                traffic.seconds(hardware, solution.tiers[name])
                for traffics in (tiling.moved, row.outputs)
                for name, traffic in traffics.items()
                if solution.tiers[name] is not Tier.MEMORY
            )
            hidden += min(moved, tiling.time.seconds)
    return hidden


def _moved(
    tiled: Sequence[TiledStage],
    rematerialised: Sequence[tuple[int, TiledStage]],
    stores: Mapping[str, StorePlan],
) -> Iterator[tuple[PassPart, int]]:
    """For each part of several tiles, bytes of what its largest one has away from the device's memory."""
    away = {name for name, store in stores.items() if store.tier is not Tier.MEMORY}
    gradients_away = {name for name, store in stores.items() if store.gradient_tier is not Tier.MEMORY}
    for direction, stages in (("forward", tiled), ("again", [stage for _, stage in rematerialised])):
        for stage in stages:
            if stage.num_tiles > 1:
                named = away & {*stage.stage.inputs, *stage.stage.stored}
                yield (direction, stage.stage.level), sum(stage.largest_nbytes(name) for name in named)
    for stage in tiled:
        if stage.num_tiles > 1:
            yield ("backward", stage.stage.level), _moved_backward(stage, away, gradients_away)


def _moved_backward(stage: TiledStage, away: set[str], gradients_away: set[str]) -> int:
    """Inputs and what came to outputs are read; for each operator that reads an input there is a gradient."""
    nbytes = 0
    for name in stage.stage.inputs:
        readers = sum(name in operands for operands in stage.outline.map_operands.values())
        nbytes += ((name in away) + readers * (name in gradients_away)) * stage.largest_nbytes(name)
    for name in stage.stage.stored:
        nbytes += ((name in away) + (name in gradients_away)) * stage.largest_nbytes(name)
    return nbytes
