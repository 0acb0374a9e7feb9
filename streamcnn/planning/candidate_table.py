"""All ways to tile all stages of a staging as arrays, so that a choice of stores is scored in one go."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from streamcnn.graph.program import Kind, Program
from streamcnn.plan.hardware import HardwareProfile
from streamcnn.plan.level_bytes import HeldBytes, Ints
from streamcnn.plan.storage import StorePlan, Tier
from streamcnn.plan.stored_bytes import StoredBytes
from streamcnn.planning.candidates import TilingCandidate, TilingCandidates
from streamcnn.planning.cost_model import Traffic, output_traffic
from streamcnn.planning.global_bytes import GlobalBytes
from streamcnn.planning.memory_model import PassBytes, is_differentiated
from streamcnn.planning.staging import Stage, Staging

Floats = NDArray[np.float64]

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
        points = [(found.held.tail, whole.last, whole.tail_step.nbytes)]
        if whole.reading.opening:
            points.append((whole.opening, 0, 0))
        return max(int(found.at(*point)) for point in points)


@dataclass(frozen=True, slots=True, eq=False)
class StageRow:
    """The candidates of one stage as arrays of one entry for each."""

    tilings: tuple[TilingCandidate, ...]
    forward: Ints
    """Bytes of a step in the forward pass; 0 if there is none. Likewise the next."""
    backward: Ints
    reusable: Ints
    num_kernels: Ints
    seconds: Mapping[bool, Floats]
    """By whether freed blocks are kept for reuse."""
    inputs: tuple[str, ...]
    """Stored inputs; what follows are arrays (inputs, candidates)."""
    read: Ints
    written: Ints
    outputs: Mapping[str, Traffic]
    is_differentiated: bool

    @classmethod
    def of(cls, tilings: TilingCandidates, stage: Stage) -> StageRow:
        """The row of a stage."""
        found = tilings.of(stage)
        inputs = tuple(found[0].moved)
        moved = [[tiling.moved[name] for tiling in found] for name in inputs]
        shape = (len(inputs), len(found))
        times = [tiling.time for tiling in found]
        backward = is_differentiated(stage, tilings.differentiated)
        steps = [(tiling.forward, tiling.backward) for tiling in found]
        if stage.rematerialises:
            steps = [(0, forward) for forward, _ in steps]
        forward_bytes, backward_bytes = np.array(steps, np.int64).T
        return cls(
            tilings=found,
            forward=forward_bytes,
            backward=backward_bytes,
            reusable=np.array([tiling.reusable for tiling in found], np.int64),
            num_kernels=np.array([tiling.tiled.num_kernels for tiling in found], np.int64),
            seconds={
                True: np.array([time.seconds for time in times]),
                False: np.array([time.seconds + time.fresh_seconds for time in times]),
            },
            inputs=inputs,
            read=np.array([[each.read for each in row] for row in moved], np.int64).reshape(shape),
            written=np.array([[each.written for each in row] for row in moved], np.int64).reshape(shape),
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
    seconds: Mapping[bool, Floats]
    inputs: tuple[str, ...]
    """Which map is read, by row of the arrays (inputs, candidates) that follow."""
    reader: Ints
    """Which stage reads it."""
    read: Ints
    written: Ints
    limits: tuple[int, ...]
    """Bytes of reusable blocks that no step shall hold more of, the values to try, ascending."""
    lives: Mapping[str, Life]
    """Of each stored map."""

    @classmethod
    def of(cls, program: Program, staging: Staging, rows: tuple[StageRow, ...]) -> CandidateTable:
        """The table of a staging with the rows of its stages."""
        width = max((len(row.tilings) for row in rows), default=1)
        reusable = _padded([row.reusable for row in rows], width, 0)
        stages, again = staging.stages, staging.rematerialised
        return cls(
            staging=staging,
            rows=rows,
            levels=np.array([stage.level for stage in (*stages, *(each.stage for each in again))], np.int64),
            peak_levels=np.array(
                [*(stage.level for stage in stages), *(each.before for each in again)], np.int64
            ),
            forward=_padded([row.forward for row in rows], width, _NEVER),
            backward=_padded([row.backward for row in rows], width, 0),
            reusable=reusable,
            num_kernels=_padded([row.num_kernels for row in rows], width, 0),
            limits=_spread(np.unique(reusable), len(rows)),
            seconds={
                reuse: _padded([row.seconds[reuse] for row in rows], width, np.inf) for reuse in (False, True)
            },
            inputs=tuple(name for row in rows for name in row.inputs),
            reader=np.repeat(np.arange(len(rows)), [len(row.inputs) for row in rows]),
            read=_padded([each for row in rows for each in row.read], width, 0),
            written=_padded([each for row in rows for each in row.written], width, 0),
            lives=_lives(program, staging, rows),
        )

    def stores(self, tiers: Mapping[str, Tier]) -> dict[str, StorePlan]:
        """The plan of each stored map, given where it lives; tiles' extents are left at nothing."""
        return {
            name: StorePlan(
                tier=tiers[name],
                gradient_tier=tiers[name],
                nbytes=moved.written,
                kept=life.is_needed and life.rematerialised is None,
                last_reader=life.last_reader,
                rematerialised=life.rematerialised,
                tile=(0, 0),
            )
            for row in self.rows[: len(self.staging.stages)]
            for name, moved in row.outputs.items()
            for life in [self.lives[name]]
        }

    def moved(self) -> dict[str, Traffic]:
        """What a pass moves of each stored map with every stage tiled coarsest."""
        moved = dict.fromkeys(self.staging.stored, Traffic(0, 0))
        for row in self.rows:
            for name, traffic in (*row.outputs.items(), *row.tilings[0].moved.items()):
                moved[name] += traffic
        return moved

    def score(
        self,
        stores: Mapping[str, StorePlan],
        global_bytes: GlobalBytes,
        hardware: HardwareProfile,
        *,
        reuses_blocks: bool,
    ) -> CandidateScores:
        """Bytes and seconds of every candidate with maps stored as in ``stores``."""
        stored = StoredBytes(stores, self.staging.levels)
        outputs = (
            moved.seconds(hardware, stores[name].tier)
            for row in self.rows
            for name, moved in row.outputs.items()
        )
        return CandidateScores(
            forward=self.forward,
            backward=self.backward,
            num_kernels=self.num_kernels,
            reusable=self.reusable,
            seconds=self.seconds[reuses_blocks] + self._input_seconds(stores, hardware),
            outputs=sum(outputs),
            levels=self.levels,
            peak_levels=self.peak_levels,
            global_bytes=global_bytes,
            held=global_bytes.held + stored.held,
            reuses_blocks=reuses_blocks,
        )

    def _input_seconds(self, stores: Mapping[str, StorePlan], hardware: HardwareProfile) -> Floats:
        """(stages, candidates): projected time spent on the inputs' stores."""
        tiers = [stores[name].tier for name in self.inputs]
        slowness = np.array([(1 / hardware.read_bytes[h], 1 / hardware.write_bytes[h]) for h in tiers])
        slowness = slowness.reshape(-1, 2)
        summed = np.zeros_like(self.seconds[True])
        np.add.at(summed, self.reader, self.read * slowness[:, :1] + self.written * slowness[:, 1:])
        return summed


def _spread(values: Ints, num_stages: int) -> tuple[int, ...]:
    """Ascending values, or as many of them as are tried, the first and the last among them."""
    count = min(len(values), max(_FEWEST_LIMITS, _LIMIT_TRIALS // max(num_stages, 1)))
    places = np.linspace(0, len(values) - 1, count).astype(np.int64)
    return tuple(values[places].tolist()) or (0,)


@dataclass(frozen=True, slots=True)
class Life:
    """How long a stored map is needed."""

    last_reader: int
    """Level of its last reader in the forward pass."""
    is_needed: bool
    """Whether the backward pass needs it."""
    rematerialised: int | None
    """Level before whose backward phase it is computed again, if it is dropped in between."""


def _lives(program: Program, staging: Staging, rows: tuple[StageRow, ...]) -> dict[str, Life]:
    last = {name: staging.levels[name] for name in staging.stored}
    kept: set[str] = set()
    for stage, row in zip(staging.stages, rows, strict=False):
        for name in row.inputs:
            last[name] = max(last[name], stage.level)
        if row.is_differentiated:
            kept.update(row.inputs, stage.stored)
    for node in program.nodes.values():
        if node.kind is Kind.GATHER and node.operands[0] in last:
            last[node.operands[0]] = max(last[node.operands[0]], staging.levels[node.name])
    again = {name: each.before for each in staging.rematerialised for name in each.stage.stored}
    return {name: Life(last[name], name in kept, again.get(name)) for name in last}


def _padded(rows: list[NDArray[Any]], width: int, value: float) -> NDArray[Any]:
    """Arrays of different lengths as the rows of one, filled up with ``value``."""
    padded = np.full((len(rows), width), value, np.float64 if value == np.inf else np.int64)
    for row, each in zip(padded, rows, strict=True):
        row[: len(each)] = each
    return padded
