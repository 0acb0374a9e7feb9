"""All tiling candidates of a staging as arrays, so that a choice of stores is scored in one go."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from streamcnn.graph.program import Kind, Node
from streamcnn.plan.hardware import HardwareProfile
from streamcnn.plan.level_bytes import Ints
from streamcnn.plan.storage import StorePlan, Tier
from streamcnn.plan.stored_bytes import Flags, Lifetimes
from streamcnn.planning.candidate_scores import CandidateScores, Floats
from streamcnn.planning.candidates import TilingCandidate, TilingCandidates
from streamcnn.planning.cost_model import MapTraffic, Tiers, Traffic, output_traffic
from streamcnn.planning.global_bytes import GlobalBytes
from streamcnn.planning.overlapping import OnTheWay
from streamcnn.planning.staging import Stage, Staging, is_differentiated

_TIERS = {tier: place for place, tier in enumerate(Tier)}
"""Place of each tier in arrays of rates."""
_FEWEST_LIMITS, _LIMIT_TRIALS = 6, 96
"""Numbers of limits on reusable blocks that are tried: fewer for more stages."""
_NEVER = 2**62
"""Bytes of a candidate that a stage does not have."""


@dataclass(frozen=True, slots=True, eq=False)
class StageRow:
    """The candidates of one stage as arrays."""

    tilings: tuple[TilingCandidate, ...]
    numbers: Ints
    """(5, candidates): ``forward``, ``backward``, ``reusable`` and ``num_kernels`` as in
    :class:`CandidateScores`, and the number of tiles."""
    seconds: Floats
    """(2, candidates): time where freed blocks are given back, and where they are kept for reuse."""
    touched: tuple[str, ...]
    """Maps whose stores the stage's tiles read or write: its stored inputs and the maps that it stores."""
    moved: Ints
    """(6, touched x candidates): bytes read, bytes written and transfers of each, and of its gradient."""
    on_the_way: Ints
    """(3, touched x candidates): bytes on the way during a tile: forward, backward and of gradients."""
    outputs: Mapping[str, MapTraffic]
    is_differentiated: bool

    @classmethod
    def of(cls, tilings: TilingCandidates, stage: Stage) -> StageRow:
        """The row of a stage."""
        found = tilings.of(stage)
        touched = tuple(found[0].moved)
        moved = [tiling.moved[name] for name in touched for tiling in found]
        moving = [tiling.on_the_way.get(name, OnTheWay()) for name in touched for tiling in found]
        times = [tiling.time for tiling in found]
        backward = is_differentiated(stage, tilings.differentiated)
        steps = [(tiling.forward, tiling.backward) for tiling in found]
        if stage.rematerialises:
            steps = [(0, forward) for forward, _ in steps]
            moving = [OnTheWay(0, each.forward) for each in moving]
        return cls(
            tilings=found,
            numbers=np.array(
                [
                    (*step, tiling.reusable, tiling.tiled.num_kernels, tiling.tiled.num_tiles)
                    for step, tiling in zip(steps, found, strict=True)
                ],
                np.int64,
            ).T,
            seconds=np.array([(time.seconds + time.fresh_seconds, time.seconds) for time in times]).T,
            touched=touched,
            moved=np.array([(*_numbers(each.values), *_numbers(each.gradient)) for each in moved], np.int64)
            .reshape(-1, 6)
            .T,
            on_the_way=np.array([(each.forward, each.backward, each.gradient) for each in moving], np.int64)
            .reshape(-1, 3)
            .T,
            outputs=output_traffic(tilings.program, stage, backward=backward),
            is_differentiated=backward,
        )


@dataclass(frozen=True, slots=True, eq=False)
class CandidateTable:
    """The candidates of every stage of a staging; arrays are (stages, candidates), padded at the right.

    Stages that rematerialise maps come last.
    """

    staging: Staging
    rows: tuple[StageRow, ...]
    levels: Ints
    """(stages,), as ``peak_levels``; both as in :class:`CandidateScores`."""
    peak_levels: Ints
    forward: Ints
    backward: Ints
    reusable: Ints
    num_kernels: Ints
    num_tiles: Ints
    """(stages, candidates)."""
    seconds: Floats
    """(2, stages, candidates): time where freed blocks are given back, and where they are kept for reuse."""
    touched: Ints
    """(touched,): the map that is read or written, as its place in ``maps``."""
    toucher: Ints
    """(touched,): the stage that reads or writes it."""
    moved: Ints
    """(6, touched, candidates): bytes read, bytes written and transfers, then those of gradient maps."""
    on_the_way: Ints
    """(3, touched, candidates): bytes while a tile is computed, forward, backward and of gradients."""
    maps: tuple[str, ...]
    """Stored maps."""
    lifetimes: Lifetimes
    """Sizes and lifetimes of the stored maps."""
    outputs: Ints
    """(outputs,): the map that is stored, as its place in ``maps``."""
    output_bytes: Ints
    """(outputs, 2, 2): for the map and its gradient map, bytes read and written, whatever the tiles."""
    storer: Ints
    """(outputs,): the stage that stores it."""

    @classmethod
    def of(cls, staging: Staging, rows: tuple[StageRow, ...], gathers: Collection[Node]) -> CandidateTable:
        """Build the table of a staging from the rows of its stages; ``gathers`` read maps as a whole."""
        again = staging.rematerialised
        levels = [stage.level for stage in (*staging.stages, *(each.stage for each in again))]
        maps = tuple(name for stage in staging.stages for name in stage.stored)
        places = {name: place for place, name in enumerate(maps)}
        lengths = np.array([len(row.tilings) for row in rows], np.int64)
        is_filled = np.arange(lengths.max(initial=1)) < lengths[:, None]
        toucher = np.repeat(np.arange(len(rows)), [len(row.touched) for row in rows])
        forward, backward, reusable, num_kernels, num_tiles = _padded(
            [row.numbers for row in rows], is_filled, (_NEVER, 0, 0, 0, 1)
        )
        outputs = [each for row in rows for each in row.outputs.values()]
        return cls(
            staging=staging,
            rows=rows,
            levels=np.array(levels, np.int64),
            peak_levels=np.array(
                [*levels[: len(staging.stages)], *(each.before for each in again)], np.int64
            ),
            forward=forward,
            backward=backward,
            reusable=reusable,
            num_kernels=num_kernels,
            num_tiles=num_tiles,
            seconds=_padded([row.seconds for row in rows], is_filled, (np.inf, np.inf)),
            touched=np.array([places[name] for row in rows for name in row.touched], np.int64),
            toucher=toucher,
            moved=_padded([row.moved for row in rows], is_filled[toucher], (0,) * 6),
            on_the_way=_padded([row.on_the_way for row in rows], is_filled[toucher], (0,) * 3),
            maps=maps,
            lifetimes=_lifetimes(staging, rows, maps, gathers),
            outputs=np.array([places[name] for row in rows for name in row.outputs], np.int64),
            output_bytes=np.array(
                [(*_numbers(each.values)[:2], *_numbers(each.gradient)[:2]) for each in outputs], np.int64
            ).reshape(-1, 2, 2),
            storer=np.repeat(np.arange(len(rows)), np.array([len(row.outputs) for row in rows], np.int64)),
        )

    @property
    def limits(self) -> tuple[int, ...]:
        """Values to try for the most bytes of reusable blocks that a step may hold, ascending."""
        return _spread(np.unique(self.reusable), len(self.rows))

    def stores(self, tiers: Mapping[str, Tiers]) -> dict[str, StorePlan]:
        """The plan of each stored map, given where it lives; its ``tile`` is still to be filled in."""
        lifetimes = self.lifetimes
        arrays = (lifetimes.nbytes, lifetimes.kept, lifetimes.last_reader, lifetimes.rematerialised)
        return {
            name: StorePlan(
                tier=tiers[name][0],
                gradient_tier=tiers[name][1],
                nbytes=nbytes,
                kept=kept,
                last_reader=last_reader,
                rematerialised=rematerialised or None,
                tile=(0, 0),
            )
            for name, nbytes, kept, last_reader, rematerialised in zip(
                self.maps, *(each.tolist() for each in arrays), strict=True
            )
        }

    def traffic(self) -> dict[str, MapTraffic]:
        """Traffic of each stored map in a pass with the coarsest tiles in every stage."""
        moved = dict.fromkeys(self.staging.stored, MapTraffic())
        for row in self.rows:
            for name, traffic in (*row.outputs.items(), *row.tilings[0].moved.items()):
                moved[name] += traffic
        return moved

    def score(
        self,
        tiers: Mapping[str, Tiers],
        global_bytes: GlobalBytes,
        hardware: HardwareProfile,
        *,
        reuses_blocks: bool,
        overlaps: bool = False,
    ) -> CandidateScores:
        """Bytes and seconds of every candidate, given where each map and its gradient map live.

        With ``overlaps`` tiles are moved to and from other tiers while others are computed.
        """
        places = np.array([[_TIERS[tier] for tier in tiers[name]] for name in self.maps], np.int64)
        places = places.reshape(-1, 2)
        rates = np.array([(hardware.read_bytes[tier], hardware.write_bytes[tier]) for tier in _TIERS])[places]
        waits = np.array([[hardware.transfer_seconds[tier]] for tier in _TIERS])[places]
        in_memory = places == _TIERS[Tier.MEMORY]
        stored = self.lifetimes.held(len(global_bytes.num_kernels), in_memory[:, 0], in_memory[:, 1])
        slowness = np.concatenate((1 / rates, waits), axis=2)
        forward, backward = self.forward, self.backward
        seconds = self.seconds[int(reuses_blocks)]
        if overlaps:
            more_forward, more_backward = self._on_the_way(~in_memory)
            forward = forward + more_forward * (forward > 0)
            backward = backward + more_backward * (backward > 0)
            computing = seconds + self._store_seconds(slowness * in_memory[..., None])
            beside, asked = (
                self._store_seconds(each * ~in_memory[..., None])
                for each in (slowness, _asked(hardware, waits))
            )
            # Where tiles follow each other, the longer time hides the shorter.
            hidden = np.maximum(computing + asked, beside)
            seconds = np.where(self.num_tiles > 1, hidden, computing + beside)
        else:
            seconds = seconds + self._store_seconds(slowness)
        return CandidateScores(
            forward=forward,
            backward=backward,
            num_kernels=self.num_kernels,
            reusable=self.reusable,
            seconds=seconds,
            levels=self.levels,
            peak_levels=self.peak_levels,
            global_bytes=global_bytes,
            held=global_bytes.held + stored,
            reuses_blocks=reuses_blocks,
        )

    def _store_seconds(self, slowness: Floats) -> Floats:
        """(stages, candidates): projected time spent on stores.

        Parameters
        ----------
        slowness
            (maps, 2, 3): of maps and gradient maps, seconds for a byte read, a byte written and a transfer.
        """
        summed: Floats = np.zeros_like(self.seconds[0])
        flat = slowness.reshape(-1, 6)[self.touched]
        np.add.at(summed, self.toucher, np.einsum("ktc,tk->tc", self.moved, flat))
        outputs = (self.output_bytes * slowness[self.outputs, :, :2]).sum(axis=(1, 2))
        np.add.at(summed, self.storer, outputs[:, None])
        return summed

    def _on_the_way(self, away: Flags) -> tuple[Ints, Ints]:
        """(stages, candidates): bytes on the way while a tile is computed, forward and backward.

        Parameters
        ----------
        away
            (maps, 2): whether maps and gradient maps are away from the device's memory.
        """
        values, gradients = away[self.touched].T[..., None]
        forward, backward = np.zeros_like(self.forward), np.zeros_like(self.backward)
        np.add.at(forward, self.toucher, self.on_the_way[0] * values)
        np.add.at(backward, self.toucher, self.on_the_way[1] * values + self.on_the_way[2] * gradients)
        return forward, backward


def _asked(hardware: HardwareProfile, waits: Floats) -> Floats:
    """(maps, 2, 3): seconds for a byte read, a byte written and a transfer that overlapping cannot hide.

    A tile that is moved while others are computed is still written or read in the device's memory, and the
    thread that requests this also gives the device its work. So moving a map never takes less time than
    reading it in the device's memory.
    """
    read, written = (rates[Tier.MEMORY] for rates in (hardware.read_bytes, hardware.write_bytes))
    copied = np.broadcast_to((1 / read, 1 / written), (*waits.shape[:2], 2))
    return np.concatenate((copied, np.maximum(waits, hardware.transfer_seconds[Tier.MEMORY])), axis=2)


def _numbers(traffic: Traffic) -> tuple[int, int, int]:
    return traffic.read, traffic.written, traffic.transfers


def _spread(values: Ints, num_stages: int) -> tuple[int, ...]:
    """Ascending values, thinned to as many as are tried: evenly spread, with the first and the last."""
    count = min(len(values), max(_FEWEST_LIMITS, _LIMIT_TRIALS // max(num_stages, 1)))
    places = np.linspace(0, len(values) - 1, count).astype(np.int64)
    return tuple(values[places].tolist()) or (0,)


def _lifetimes(
    staging: Staging, rows: Sequence[StageRow], maps: Sequence[str], gathers: Collection[Node]
) -> Lifetimes:
    made = {name: stage.level for stage in staging.stages for name in stage.stored}
    nbytes, last, needed = dict[str, int](), dict(made), set[str]()
    # Levels of stages ascend, and stages that rematerialise maps come after these.
    for stage, row in zip(staging.stages, rows, strict=False):
        nbytes.update((name, traffic.values.written) for name, traffic in row.outputs.items())
        last.update(dict.fromkeys(row.touched, stage.level))
        if row.is_differentiated:
            needed.update(row.touched)
    needed.update(node.operands[0] for node in gathers if node.kind is Kind.RESULT)
    for node in gathers:
        if node.operands[0] in last:
            last[node.operands[0]] = max(last[node.operands[0]], staging.levels[node.name])
    again = {name: each.before for each in staging.rematerialised for name in each.stage.stored}
    return Lifetimes(
        nbytes=np.array([nbytes[name] for name in maps], np.int64),
        made=np.array([made[name] for name in maps], np.int64),
        last_reader=np.array([last[name] for name in maps], np.int64),
        kept=np.array([name in needed and name not in again for name in maps], np.bool_),
        rematerialised=np.array([again.get(name, 0) for name in maps], np.int64),
    )


def _padded(blocks: Sequence[NDArray[Any]], is_filled: Flags, fills: Sequence[float]) -> NDArray[Any]:
    """Join blocks (fields, values), and lay their values out in an array (fields, rows, columns).

    Parameters
    ----------
    is_filled
        (rows, columns): where the values go, row by row.
    fills
        Value of each field elsewhere.
    """
    kind = np.result_type(*fills)
    padded = np.empty((len(fills), *is_filled.shape), kind)
    joined = np.concatenate((np.empty((len(fills), 0), kind), *blocks), axis=1)
    for each, values, fill in zip(padded, joined, fills, strict=True):
        each.fill(fill)
        each[is_filled] = values
    return padded
