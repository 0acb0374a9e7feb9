"""Projected time of a plan, from its arithmetic, the memory it reads and writes, and its stores.

Times are sums of quotients, work over a measured rate, and only as good as the rates. Their purpose is to
tell which of two plans is faster.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import NamedTuple

from streamcnn.graph.costs import Cost, Operation, cost_of, counted, elements, windows
from streamcnn.graph.fusion import runs
from streamcnn.graph.program import Kind, Node, Program, on_whole_maps
from streamcnn.plan.hardware import HardwareProfile
from streamcnn.plan.storage import Tier
from streamcnn.planning.backends import Backend
from streamcnn.planning.staging import Stage
from streamcnn.planning.tiling import TiledStage

BACKWARD_WORK = 2
"""Arithmetic of an operator's backward pass over its forward pass: one product per operand."""
PARAMETER_PASSES = 6
"""How often a tile's parameter gradients are read or written: they are zeroed and computed in the kernels'
layout, converted to the parameters' own, and added to those of earlier tiles."""


@dataclass(frozen=True, slots=True)
class Work:
    """The work of an operator's forward pass on a whole map."""

    flops: int
    """Floating-point operations."""
    nbytes: int
    """Bytes of operands read and of the result written."""
    made: int
    """Bytes of the result alone."""
    grouped: bool
    """Whether every channel is convolved by itself."""
    num_positions: int
    """Spatial positions of the result."""
    is_fused: bool = False
    """Whether a kernel does it in the same pass over the map as the operator before it."""

    def seconds(self, hardware: HardwareProfile) -> float:
        """Projected time, without that of taking new memory from the operating system."""
        rate = hardware.grouped_flops if self.grouped else hardware.dense_flops
        return self.flops / rate + self.nbytes / hardware.memory_bytes


def work(program: Program, node: Node) -> Work:
    """The work of one local operator on its whole map."""
    assert node.local is not None
    read = sum(program.nodes[name].nbytes for name in node.local.accesses)
    cost, call = cost_of(node.target), Operation.of(program, node)
    operations = cost.operations or (windows if node.local.heavy else elements)
    return Work(
        flops=operations(call),
        nbytes=read + node.nbytes,
        made=node.nbytes,
        grouped=_is_grouped(cost, call),
        num_positions=math.prod(node.size),
    )


def resident_work(program: Program, node: Node) -> Work:
    """The work of an operator on whole values; none if it is a view."""
    if node.view_of:
        return Work(0, 0, 0, grouped=False, num_positions=1)
    read = sum(program.nodes[name].nbytes for name in node.operands)
    cost, call = cost_of(node.target), Operation.of(program, node)
    flops = max(call.numel, (cost.operations or counted)(call))
    return Work(flops, read + node.nbytes, node.nbytes, _is_grouped(cost, call), num_positions=1)


def _is_grouped(cost: Cost, call: Operation) -> bool:
    return cost.per_channel is not None and cost.per_channel(call)


def resident_time(
    program: Program,
    differentiated: Collection[str],
    hardware: HardwareProfile,
    backend: Backend,
    *,
    keeps_blocks: bool,
) -> StageTime:
    """Time of all operators that run on whole maps in any plan, forward and backward.

    ``keeps_blocks`` means the same as for `plain_time`.
    """
    nodes = on_whole_maps(program)
    works = {node.name: resident_work(program, node) for node in nodes if not node.view_of}
    both = {name: each for name, each in works.items() if name in differentiated}
    once = {name: each for name, each in works.items() if name not in differentiated}
    return plain_time(both, hardware, backend, backward=True, keeps_blocks=keeps_blocks) + plain_time(
        once, hardware, backend, backward=False, keeps_blocks=keeps_blocks
    )


@dataclass(frozen=True, slots=True)
class StageTime:
    """Projected seconds and operations of all tiles of a stage, forward and backward together."""

    seconds: float
    """Time where freed blocks are reused, without that of stores."""
    fresh_seconds: float
    """Time to add if all memory comes fresh from the operating system."""
    flops: int

    def __add__(self, other: StageTime) -> StageTime:
        return StageTime(
            self.seconds + other.seconds, self.fresh_seconds + other.fresh_seconds, self.flops + other.flops
        )


def stage_time(
    tiled: TiledStage,
    works: Mapping[str, Work],
    hardware: HardwareProfile,
    backend: Backend,
    *,
    backward: bool,
) -> StageTime:
    """Time of a stage. ``backward`` adds its backward pass, which runs all but skipped operators again."""
    seconds = launches = fresh = flops = 0.0
    skipped, num_tiles = frozenset(tiled.outline.skipped), tiled.num_tiles
    for name in tiled.stage.nodes:
        each, passes = works[name], 1.0
        if backward:
            passes += BACKWARD_WORK + (name not in skipped)
        repeated = passes * tiled.covered(name) / each.num_positions
        zeroing = 0.0 if backend.keeps_blocks else repeated * each.made / hardware.fresh_bytes
        seconds += repeated * each.seconds(hardware)
        if not each.is_fused:
            launches += passes * num_tiles * hardware.operator_seconds
        if repeated * each.made >= passes * num_tiles * backend.reusable_bytes:
            seconds += zeroing
        else:
            fresh += zeroing
        flops += repeated * each.flops
    if backward:
        seconds += PARAMETER_PASSES * num_tiles * tiled.outline.parameter_bytes / hardware.memory_bytes
    return StageTime(_together(seconds, launches, backend), fresh, int(flops))


def _together(seconds: float, launches: float, backend: Backend) -> float:
    """Seconds of operators and of launching them, which may overlap."""
    return max(seconds, launches) if backend.runs_ahead else seconds + launches


@dataclass(frozen=True, slots=True)
class Traffic:
    """Traffic of a pass to and from one store."""

    read: int
    """Bytes read."""
    written: int
    transfers: int = 0
    """Number of regions that are read, written or added."""

    def __add__(self, other: Traffic) -> Traffic:
        return Traffic(self.read + other.read, self.written + other.written, self.transfers + other.transfers)

    def seconds(self, hardware: HardwareProfile, tier: Tier) -> float:
        """Projected time in a store at ``tier``."""
        return (
            self.read / hardware.read_bytes[tier]
            + self.written / hardware.write_bytes[tier]
            + self.transfers * hardware.transfer_seconds[tier]
        )


NO_TRAFFIC = Traffic(0, 0)
Tiers = tuple[Tier, Tier]
"""The tier of a map, and the tier of its gradient map."""


@dataclass(frozen=True, slots=True)
class MapTraffic:
    """Traffic of a pass with one map and its gradient map."""

    values: Traffic = NO_TRAFFIC
    gradient: Traffic = NO_TRAFFIC

    def __add__(self, other: MapTraffic) -> MapTraffic:
        return MapTraffic(self.values + other.values, self.gradient + other.gradient)

    def seconds(self, hardware: HardwareProfile, tiers: Tiers) -> float:
        """Projected time in stores at ``tiers``."""
        return self.values.seconds(hardware, tiers[0]) + self.gradient.seconds(hardware, tiers[1])


def tile_traffic(tiled: TiledStage, *, backward: bool) -> dict[str, MapTraffic]:
    """Traffic of a stage's tiles with each stored input; of maps that they store, only the transfers."""
    found, num_tiles = {}, tiled.num_tiles
    for name in tiled.stage.inputs:
        if tiled.program.nodes[name].kind is Kind.LOCAL:
            nbytes = tiled.covered(name) * tiled.outline.position_bytes[name]
            found[name] = MapTraffic(Traffic(nbytes, 0, num_tiles))
            if backward:
                # The backward pass reads the map again, and adds to its gradient map.
                found[name] += MapTraffic(Traffic(nbytes, 0, num_tiles), Traffic(nbytes, nbytes, num_tiles))
    for name, times_read in _times_read(tiled.program, tiled.stage, backward=backward).items():
        found[name] = MapTraffic(
            Traffic(0, 0, (1 + times_read.values) * num_tiles), Traffic(0, 0, times_read.gradient * num_tiles)
        )
    return found


def output_traffic(program: Program, stage: Stage, *, backward: bool) -> dict[str, MapTraffic]:
    """Bytes that a stage moves of each map that it stores, whatever its tiles; transfers are left out."""
    found = {}
    for name, times_read in _times_read(program, stage, backward=backward).items():
        nbytes = program.nodes[name].nbytes
        found[name] = MapTraffic(
            Traffic(times_read.values * nbytes, nbytes), Traffic(times_read.gradient * nbytes, 0)
        )
    return found


class _TimesRead(NamedTuple):
    """How often a stage itself reads a map that it writes, and that map's gradient."""

    values: int
    gradient: int


def _times_read(program: Program, stage: Stage, *, backward: bool) -> dict[str, _TimesRead]:
    """How often a stage reads each map that it writes, and that map's gradient.

    The backward pass reads the gradient, and the values once more where a reduction needs them.
    """
    reduced = {program.nodes[name].operands[0] for name in stage.reductions}
    return {name: _TimesRead(int(backward and name in reduced), int(backward)) for name in stage.stored}


def plain_time(
    works: Mapping[str, Work],
    hardware: HardwareProfile,
    backend: Backend,
    *,
    backward: bool,
    keeps_blocks: bool,
) -> StageTime:
    """Time of operators on whole maps, each run once forward and, if ``backward``, once backward.

    Unless ``keeps_blocks``, large results take fresh memory from the operating system, as in plain PyTorch.
    """
    seconds = flops = 0.0
    passes = 1 + BACKWARD_WORK * backward
    launches = passes * len(works) * hardware.operator_seconds
    for each in works.values():
        seconds += passes * each.seconds(hardware)
        if each.made >= backend.reusable_bytes and not keeps_blocks:
            seconds += passes * each.made / hardware.fresh_bytes
        flops += passes * each.flops
    return StageTime(_together(seconds, launches, backend), 0.0, int(flops))


def all_works(program: Program) -> dict[str, Work]:
    """The work of every local operator."""
    return {node.name: work(program, node) for node in program.nodes.values() if node.kind is Kind.LOCAL}


def works_on_tiles(program: Program, works: Mapping[str, Work], backend: Backend) -> Mapping[str, Work]:
    """The work of every local operator on tiles, where the backend may fuse it with the one before."""
    if not backend.fuses_norms:
        return works
    nodes = program.nodes
    seen = {name for node in nodes.values() if node.kind is not Kind.LOCAL for name in node.operands}
    found = dict(works)
    for run in runs([nodes[name] for name in works], seen.union(program.output_names)):
        for before, node in pairwise(run):
            read = sum(nodes[name].nbytes for name in node.operands if name != before.name)
            found[node.name] = replace(works[node.name], nbytes=read, made=0, is_fused=True)
    return found
