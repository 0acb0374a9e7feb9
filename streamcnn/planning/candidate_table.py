"""All ways to tile all stages of a staging as arrays, so that a choice of stores is scored in one go."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from streamcnn.graph.program import Kind, Node
from streamcnn.plan.hardware import HardwareProfile
from streamcnn.plan.level_bytes import HeldBytes, Ints
from streamcnn.plan.storage import StorePlan, Tier
from streamcnn.plan.stored_bytes import Flags, Lives
from streamcnn.planning.candidates import TilingCandidate, TilingCandidates
from streamcnn.planning.cost_model import Traffic, output_traffic
from streamcnn.planning.global_bytes import GlobalBytes
from streamcnn.planning.memory_model import PassBytes, is_differentiated
from streamcnn.planning.staging import Stage, Staging

Floats = NDArray[np.float64]

_TIERS = {tier: place for place, tier in enumerate(Tier)}
"""Place of each tier in arrays of rates."""
_FEWEST_LIMITS, _LIMIT_TRIALS = 6, 96
"""How many limits on reusable blocks are tried: fewer where there are many stages to choose for."""
_NEVER = 2**62
"""Bytes of a candidate that a stage does not have."""


@dataclass(frozen=True, slots=True, eq=False)
class CandidateScores:
    """Projected bytes and seconds of every candidate, given where maps are stored."""

    forward: Ints
    """(stages, candidates): bytes of a step of the forward pass; 0 if there is none."""
    backward: Ints
    """The same of the backward pass."""
    num_kernels: Ints
    """(stages, candidates): different convolutions of the stage's forward pass."""
    reusable: Ints
    """(stages, candidates): bytes of it in blocks that may be kept for reuse when they are freed."""
    seconds: Floats
    """(stages, candidates): time of the stage, its inputs' stores included."""
    outputs: float
    """Seconds of what stages move however they are tiled."""
    levels: Ints
    """By stage."""
    peak_levels: Ints
    """By stage: the level at which its step is carried out, that of a later one if it rematerialises maps."""
    global_bytes: GlobalBytes
    held: HeldBytes
    """What is held beside steps but for what the backend keeps."""
    reuses_blocks: bool
    """Whether freed blocks are kept for reuse."""

    def pass_bytes(self, choice: Ints | None, reusable: int) -> PassBytes:
        """What a pass takes where stages take the candidates of ``choice``, at first of none.

        Parameters
        ----------
        reusable
            The most bytes of a step in blocks that may be kept for reuse.
        """
        num_kernels = np.zeros_like(self.global_bytes.num_kernels)
        if choice is not None:
            chosen = self.num_kernels[np.arange(len(choice)), choice]
            num_kernels = np.bincount(self.levels, chosen, len(num_kernels)).astype(np.int64)
        return PassBytes.of(
            self.global_bytes,
            self.held,
            num_kernels,
            len(self.levels),
            reusable if self.reuses_blocks else None,
        )

    def peaks(self, found: PassBytes) -> Ints:
        """(stages, candidates): bytes at the worse peak point of the stage."""
        levels = self.peak_levels[:, None]
        forward = found.at(found.held.forward, levels, self.forward)
        backward = found.at(found.held.backward, levels, self.backward)
        peaks: Ints = np.maximum(
            np.where(self.forward > 0, forward, 0), np.where(self.backward > 0, backward, 0)
        )
        return peaks

    def other_peak(self, found: PassBytes) -> int:
        """Bytes at the worst peak point of those that belong to no stage."""
        whole = self.global_bytes
        peaks = [int(found.at(found.held.segments, whole.step_levels, whole.step_bytes).max(initial=0))]
        if whole.reading.opening:
            peaks.append(int(found.at(whole.opening, 0, 0)))
        return max(peaks)


@dataclass(frozen=True, slots=True, eq=False)
class StageRow:
    """The candidates of one stage as arrays."""

    tilings: tuple[TilingCandidate, ...]
    numbers: Ints
    """(4, candidates): what :class:`CandidateScores` has as ``forward``, ``backward``, ``reusable`` and
    ``num_kernels``."""
    seconds: Floats
    """(2, candidates): where freed blocks are given back, and where they are kept for reuse."""
    touched: tuple[str, ...]
    """Maps whose stores its tiles read or write: its stored inputs and what it stores."""
    moved: Ints
    """(3, touched x candidates): bytes read, bytes written and transfers of each."""
    outputs: Mapping[str, Traffic]
    is_differentiated: bool

    @classmethod
    def of(cls, tilings: TilingCandidates, stage: Stage) -> StageRow:
        """The row of a stage."""
        found = tilings.of(stage)
        touched = tuple(found[0].moved)
        moved = [tiling.moved[name] for name in touched for tiling in found]
        times = [tiling.time for tiling in found]
        backward = is_differentiated(stage, tilings.differentiated)
        steps = [(tiling.forward, tiling.backward) for tiling in found]
        if stage.rematerialises:
            steps = [(0, forward) for forward, _ in steps]
        return cls(
            tilings=found,
            numbers=np.array(
                [
                    (*step, tiling.reusable, tiling.tiled.num_kernels)
                    for step, tiling in zip(steps, found, strict=True)
                ],
                np.int64,
            ).T,
            seconds=np.array([(time.seconds + time.fresh_seconds, time.seconds) for time in times]).T,
            touched=touched,
            moved=np.array([(each.read, each.written, each.transfers) for each in moved], np.int64)
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
    """By stage; so is the next, which is what :class:`CandidateScores` has."""
    peak_levels: Ints
    forward: Ints
    backward: Ints
    reusable: Ints
    num_kernels: Ints
    seconds: Floats
    """(2, stages, candidates): where freed blocks are given back, and where they are kept for reuse."""
    touched: Ints
    """Which map is read or written, as its place in ``maps``, by row of the array ``moved``."""
    toucher: Ints
    """Which stage does so."""
    moved: Ints
    """(3, touched, candidates): bytes read, bytes written and transfers."""
    maps: tuple[str, ...]
    """Stored maps."""
    lives: Lives
    """Of each stored map."""
    outputs: Ints
    """Which map is stored, by stage; the next are bytes (outputs, 2), read and written."""
    output_bytes: Ints

    @classmethod
    def of(cls, staging: Staging, rows: tuple[StageRow, ...], gathers: Collection[Node]) -> CandidateTable:
        """The table of a staging with the rows of its stages; ``gathers`` take maps whole, or keep them."""
        again = staging.rematerialised
        levels = [stage.level for stage in (*staging.stages, *(each.stage for each in again))]
        maps = tuple(name for stage in staging.stages for name in stage.stored)
        places = {name: place for place, name in enumerate(maps)}
        lengths = np.array([len(row.tilings) for row in rows], np.int64)
        is_filled = np.arange(lengths.max(initial=1)) < lengths[:, None]
        toucher = np.repeat(np.arange(len(rows)), [len(row.touched) for row in rows])
        forward, backward, reusable, num_kernels = _padded(
            [row.numbers for row in rows], is_filled, (_NEVER, 0, 0, 0)
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
            seconds=_padded([row.seconds for row in rows], is_filled, (np.inf, np.inf)),
            touched=np.array([places[name] for row in rows for name in row.touched], np.int64),
            toucher=toucher,
            moved=_padded([row.moved for row in rows], is_filled[toucher], (0, 0, 0)),
            maps=maps,
            lives=_lives(staging, rows, maps, gathers),
            outputs=np.array([places[name] for row in rows for name in row.outputs], np.int64),
            output_bytes=np.array([(each.read, each.written) for each in outputs]).reshape(-1, 2),
        )

    @property
    def limits(self) -> tuple[int, ...]:
        """Bytes of reusable blocks that no step shall hold more of, the values to try, ascending."""
        return _spread(np.unique(self.reusable), len(self.rows))

    def stores(self, tiers: Mapping[str, Tier]) -> dict[str, StorePlan]:
        """The plan of each stored map, given where it lives; tiles' extents are left at nothing."""
        lives = self.lives
        arrays = (lives.nbytes, lives.kept, lives.last_reader, lives.rematerialised)
        return {
            name: StorePlan(
                tier=tiers[name],
                gradient_tier=tiers[name],
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

    def traffic(self) -> dict[str, Traffic]:
        """What a pass moves of each stored map with every stage tiled coarsest."""
        moved = dict.fromkeys(self.staging.stored, Traffic(0, 0))
        for row in self.rows:
            for name, traffic in (*row.outputs.items(), *row.tilings[0].moved.items()):
                moved[name] += traffic
        return moved

    def score(
        self,
        tiers: Mapping[str, Tier],
        global_bytes: GlobalBytes,
        hardware: HardwareProfile,
        *,
        reuses_blocks: bool,
    ) -> CandidateScores:
        """Bytes and seconds of every candidate, given where each map lives."""
        places = np.array([_TIERS[tiers[name]] for name in self.maps], np.int64)
        rates = np.array([(hardware.read_bytes[tier], hardware.write_bytes[tier]) for tier in _TIERS])[places]
        waits = np.array([hardware.transfer_seconds[tier] for tier in _TIERS])[places]
        in_memory = places == _TIERS[Tier.MEMORY]
        stored = self.lives.held(len(global_bytes.num_kernels), in_memory, in_memory)
        return CandidateScores(
            forward=self.forward,
            backward=self.backward,
            num_kernels=self.num_kernels,
            reusable=self.reusable,
            seconds=self.seconds[int(reuses_blocks)]
            + self._tile_seconds(np.column_stack((1 / rates, waits))),
            outputs=sum((self.output_bytes / rates[self.outputs]).sum(axis=1).tolist()),
            levels=self.levels,
            peak_levels=self.peak_levels,
            global_bytes=global_bytes,
            held=global_bytes.held + stored,
            reuses_blocks=reuses_blocks,
        )

    def _tile_seconds(self, slowness: Floats) -> Floats:
        """(stages, candidates): projected time spent on stores, as far as it depends on the tiles.

        Parameters
        ----------
        slowness
            (maps, 3): seconds for a byte read, for a byte written and for a transfer.
        """
        summed: Floats = np.zeros_like(self.seconds[0])
        np.add.at(summed, self.toucher, np.einsum("ktc,tk->tc", self.moved, slowness[self.touched]))
        return summed


def _spread(values: Ints, num_stages: int) -> tuple[int, ...]:
    """Ascending values, or as many of them as are tried, the first and the last among them."""
    count = min(len(values), max(_FEWEST_LIMITS, _LIMIT_TRIALS // max(num_stages, 1)))
    places = np.linspace(0, len(values) - 1, count).astype(np.int64)
    return tuple(values[places].tolist()) or (0,)


def _lives(
    staging: Staging, rows: Sequence[StageRow], maps: Sequence[str], gathers: Collection[Node]
) -> Lives:
    made = {name: stage.level for stage in staging.stages for name in stage.stored}
    nbytes, last, needed = dict[str, int](), dict(made), set[str]()
    # Levels of stages ascend, and stages that rematerialise maps come after these.
    for stage, row in zip(staging.stages, rows, strict=False):
        nbytes.update((name, traffic.written) for name, traffic in row.outputs.items())
        last.update(dict.fromkeys(row.touched, stage.level))
        if row.is_differentiated:
            needed.update(row.touched)
    needed.update(node.operands[0] for node in gathers if node.kind is Kind.RESULT)
    for node in gathers:
        if node.operands[0] in last:
            last[node.operands[0]] = max(last[node.operands[0]], staging.levels[node.name])
    again = {name: each.before for each in staging.rematerialised for name in each.stage.stored}
    return Lives(
        nbytes=np.array([nbytes[name] for name in maps], np.int64),
        made=np.array([made[name] for name in maps], np.int64),
        last_reader=np.array([last[name] for name in maps], np.int64),
        kept=np.array([name in needed and name not in again for name in maps], np.bool_),
        rematerialised=np.array([again.get(name, 0) for name in maps], np.int64),
    )


def _padded(blocks: Sequence[NDArray[Any]], is_filled: Flags, fills: Sequence[float]) -> NDArray[Any]:
    """Blocks (fields, values), one after the other, as an array (fields, rows, columns).

    Parameters
    ----------
    is_filled
        (rows, columns): where the values go, row by row.
    fills
        What there is elsewhere, for each field.
    """
    kind = np.result_type(*fills)
    padded = np.empty((len(fills), *is_filled.shape), kind)
    joined = np.concatenate((np.empty((len(fills), 0), kind), *blocks), axis=1)
    for each, values, fill in zip(padded, joined, fills, strict=True):
        each.fill(fill)
        each[is_filled] = values
    return padded
