"""All ways to cut all stages of a staging as arrays, so that a choice of stores is weighed in one go."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from streamcnn.cost_model import Traffic, output_traffic
from streamcnn.libraries import KernelBytes
from streamcnn.memory_model import fresh_waste, is_differentiated
from streamcnn.options import Option, Options
from streamcnn.plan import Home, StorePlan
from streamcnn.program import Kind, Program
from streamcnn.rates import Rates
from streamcnn.small_bytes import SmallBytes, total_bytes
from streamcnn.staging import Stage, Staging
from streamcnn.stored_bytes import StoredBytes

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]

_FEWEST_HEAPS, _HEAP_TRIALS = 6, 96
"""How many limits on reusable blocks are tried: fewer where there are many stages to choose for."""
_NEVER = 2**62
"""Bytes of an option that a stage does not have."""


@dataclass(frozen=True, slots=True, eq=False)
class Weighed:
    """Projected bytes and seconds of every option, given where maps are stored."""

    forward: Ints
    """(stages, options): bytes of a forward step with all that is held beside it but compiled kernels."""
    backward: Ints
    """The same of a backward step; 0 if there is none."""
    num_kernels: Ints
    """(stages, options): kernels that the stage compiles in a forward pass."""
    heap: Ints
    """(stages, options): bytes of it in blocks that the C library may keep when they are freed."""
    seconds: Floats
    """(stages, options): time of the stage, its inputs' stores included."""
    outputs: float
    """Seconds of what stages move however they are cut."""
    tail: int
    """Bytes of the resident tail with all that is held beside it but compiled kernels."""
    opening: int
    """Bytes of the first read of images that are decoded whole; 0 if there are none."""
    levels: Ints
    """By stage."""
    small: SmallBytes

    def kernels(self, choice: Ints | None) -> KernelBytes:
        """What is kept of kernels where each stage takes the option of ``choice``; that of none if None."""
        num_levels = len(self.small.num_kernels)
        if choice is None:
            return self.small.kernels(np.zeros(num_levels, np.int64))
        chosen = self.num_kernels[np.arange(len(choice)), choice]
        return self.small.kernels(np.bincount(self.levels, chosen, num_levels).astype(np.int64))

    def peaks(self, kernels: KernelBytes) -> Ints:
        """(stages, options): bytes of the stage's worst step with all that is held beside it."""
        forward = self.forward + kernels.forward_bytes[self.levels, None]
        backward = self.backward + kernels.backward_bytes[self.levels, None]
        peaks: Ints = np.maximum(forward, np.where(self.backward > 0, backward, 0))
        return peaks

    def tail_peak(self, kernels: KernelBytes) -> int:
        """Bytes of the resident tail with all that is held beside it."""
        return self.tail + int(kernels.backward_bytes[self.small.last])


@dataclass(frozen=True, slots=True, eq=False)
class StageRow:
    """The options of one stage as arrays of one entry per option."""

    options: tuple[Option, ...]
    forward: Ints
    backward: Ints
    heap: Ints
    num_kernels: Ints
    seconds: Mapping[bool, Floats]
    """By whether the C library reuses freed blocks."""
    inputs: tuple[str, ...]
    """Stored inputs; what follows are arrays (inputs, options)."""
    read: Ints
    written: Ints
    outputs: Mapping[str, Traffic]
    is_differentiated: bool

    @classmethod
    def of(cls, options: Options, stage: Stage) -> StageRow:
        """The row of a stage."""
        found = options.of(stage)
        inputs = tuple(found[0].moved)
        moved = [[option.moved[name] for option in found] for name in inputs]
        shape = (len(inputs), len(found))
        times = [option.time for option in found]
        backward = is_differentiated(stage, options.differentiated)
        return cls(
            options=found,
            forward=np.array([option.forward for option in found], np.int64),
            backward=np.array([option.backward for option in found], np.int64),
            heap=np.array([option.heap for option in found], np.int64),
            num_kernels=np.array([option.tiled.num_kernels for option in found], np.int64),
            seconds={
                True: np.array([time.seconds for time in times]),
                False: np.array([time.seconds + time.fresh_seconds for time in times]),
            },
            inputs=inputs,
            read=np.array([[each.read for each in row] for row in moved], np.int64).reshape(shape),
            written=np.array([[each.written for each in row] for row in moved], np.int64).reshape(shape),
            outputs=output_traffic(options.program, stage, backward=backward),
            is_differentiated=backward,
        )


@dataclass(frozen=True, slots=True, eq=False)
class Table:
    """The options of every stage of a staging; arrays are (stages, options), padded at the right."""

    staging: Staging
    rows: tuple[StageRow, ...]
    forward: Ints
    backward: Ints
    heap: Ints
    num_kernels: Ints
    seconds: Mapping[bool, Floats]
    inputs: tuple[str, ...]
    """Which map is read, by row of the arrays (inputs, options) that follow."""
    reader: Ints
    """Which stage reads it."""
    read: Ints
    written: Ints
    heaps: tuple[int, ...]
    """Bytes of reusable blocks that no step shall hold more of, the values to try, ascending."""
    lives: Mapping[str, tuple[int, bool]]
    """For each stored map the level of its last reader, and whether the backward pass needs it."""

    @classmethod
    def of(cls, program: Program, staging: Staging, rows: tuple[StageRow, ...]) -> Table:
        """The table of a staging with the rows of its stages."""
        width = max((len(row.options) for row in rows), default=1)
        heap = _padded([row.heap for row in rows], width, 0)
        return cls(
            staging=staging,
            rows=rows,
            forward=_padded([row.forward for row in rows], width, _NEVER),
            backward=_padded([row.backward for row in rows], width, 0),
            heap=heap,
            num_kernels=_padded([row.num_kernels for row in rows], width, 0),
            heaps=_spread(np.unique(heap), len(rows)),
            seconds={
                reuse: _padded([row.seconds[reuse] for row in rows], width, np.inf) for reuse in (False, True)
            },
            inputs=tuple(name for row in rows for name in row.inputs),
            reader=np.repeat(np.arange(len(rows)), [len(row.inputs) for row in rows]),
            read=_padded([each for row in rows for each in row.read], width, 0),
            written=_padded([each for row in rows for each in row.written], width, 0),
            lives=_lives(program, staging, rows),
        )

    def stores(self, homes: Mapping[str, Home]) -> dict[str, StorePlan]:
        """The plan of each stored map, given where it lives; tiles' extents are left at nothing."""
        return {
            name: StorePlan(
                home=homes[name],
                gradient_home=homes[name],
                nbytes=moved.written,
                kept=kept,
                last_reader=last,
                tile=(0, 0),
            )
            for row in self.rows
            for name, moved in row.outputs.items()
            for last, kept in [self.lives[name]]
        }

    def moved(self) -> dict[str, Traffic]:
        """What a pass moves of each stored map with every stage cut coarsest."""
        moved = {name: traffic for row in self.rows for name, traffic in row.outputs.items()}
        for row in self.rows:
            for name, traffic in row.options[0].moved.items():
                moved[name] += traffic
        return moved

    def weigh(
        self, stores: Mapping[str, StorePlan], small: SmallBytes, rates: Rates, *, reuses_heap: bool
    ) -> Weighed:
        """Bytes and seconds of every option with maps stored as in ``stores``."""
        stored = StoredBytes(stores, self.staging.levels)
        levels = np.array([stage.level for stage in self.staging.stages], np.int64)
        before = stored.forward_bytes[levels] + small.forward_bytes[levels]
        after = stored.backward_bytes[levels] + small.backward_bytes[levels]
        tail = small.tail_step.nbytes
        forward, backward = self.forward, self.backward
        if not reuses_heap:
            forward, backward = forward + fresh_waste(forward), backward + fresh_waste(backward)
            tail += fresh_waste(tail)
        outputs = (
            moved.seconds(rates, stores[name].home)
            for row in self.rows
            for name, moved in row.outputs.items()
        )
        return Weighed(
            forward=before[:, None] + forward,
            backward=np.where(backward > 0, after[:, None] + backward, 0),
            num_kernels=self.num_kernels,
            heap=self.heap,
            seconds=self.seconds[reuses_heap] + self._input_seconds(stores, rates),
            outputs=sum(outputs),
            tail=tail + total_bytes(stored.tail(small.last), small.tail()),
            opening=total_bytes(small.opening()) if small.reading.opening else 0,
            levels=levels,
            small=small,
        )

    def _input_seconds(self, stores: Mapping[str, StorePlan], rates: Rates) -> Floats:
        """(stages, options): projected time spent on the inputs' stores."""
        homes = [stores[name].home for name in self.inputs]
        slowness = np.array([(1 / rates.read_bytes[h], 1 / rates.write_bytes[h]) for h in homes])
        slowness = slowness.reshape(-1, 2)
        summed = np.zeros_like(self.seconds[True])
        np.add.at(summed, self.reader, self.read * slowness[:, :1] + self.written * slowness[:, 1:])
        return summed


def _spread(values: Ints, num_stages: int) -> tuple[int, ...]:
    """Ascending values, or as many of them as are tried, the first and the last among them."""
    count = min(len(values), max(_FEWEST_HEAPS, _HEAP_TRIALS // max(num_stages, 1)))
    places = np.linspace(0, len(values) - 1, count).astype(np.int64)
    return tuple(values[places].tolist()) or (0,)


def _lives(program: Program, staging: Staging, rows: tuple[StageRow, ...]) -> dict[str, tuple[int, bool]]:
    last = {name: staging.levels[name] for name in staging.stored}
    kept: set[str] = set()
    for stage, row in zip(staging.stages, rows, strict=True):
        for name in row.inputs:
            last[name] = max(last[name], stage.level)
        if row.is_differentiated:
            kept.update(row.inputs, stage.stored)
    for node in program.nodes.values():
        if node.kind is Kind.GATHER and node.operands[0] in last:
            last[node.operands[0]] = max(last[node.operands[0]], staging.levels[node.name])
    return {name: (last[name], name in kept) for name in last}


def _padded(rows: list[NDArray[Any]], width: int, value: float) -> NDArray[Any]:
    """Arrays of different lengths as the rows of one, filled up with ``value``."""
    padded = np.full((len(rows), width), value, np.float64 if value == np.inf else np.int64)
    for row, each in zip(padded, rows, strict=True):
        row[: len(each)] = each
    return padded
