"""Staging: which maps are stored, and which operators run in which phase.

Every node gets a level. A map that uses a reduction's result is one level above it, since every position
of the reduced map must have been seen first. The operators that a level's maps need form a phase, and the
level's global values are computed after that. A split point raises the level of every later map, so
that long stretches without a barrier do not accumulate halo.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace

from streamcnn.graph.costs import may_draw
from streamcnn.graph.program import Kind, Node, Program


@dataclass(frozen=True, slots=True)
class Stage:
    """The operators of one phase, before it is tiled."""

    level: int
    nodes: tuple[str, ...]
    inputs: tuple[str, ...]
    stored: tuple[str, ...]
    reductions: tuple[str, ...]
    rematerialises: bool = False
    """Whether the stage only rematerialises, in the backward pass, maps that were dropped."""

    def owned(self, program: Program) -> tuple[str, ...]:
        """Maps of which each tile owns a part: those stored or reduced, each once."""
        reduced = (program.nodes[name].operands[0] for name in self.reductions)
        return tuple(dict.fromkeys((*self.stored, *reduced)))


@dataclass(frozen=True, slots=True)
class Rematerialisation:
    """Maps of one level that are computed again in the backward pass."""

    stage: Stage
    before: int
    """Level of the first backward phase that needs the maps."""


@dataclass(frozen=True, slots=True, eq=False)
class Staging:
    """A program divided into phases and segments of global values."""

    levels: Mapping[str, int]
    stored: frozenset[str]
    """Local maps that are checkpoints."""
    stages: tuple[Stage, ...]
    segments: Mapping[int, tuple[str, ...]]
    """Global values, reductions and gathers by level."""
    rematerialised: tuple[Rematerialisation, ...] = ()
    """In the order in which the backward pass carries them out."""


def is_differentiated(stage: Stage, differentiated: Collection[str]) -> bool:
    """Whether the backward pass differentiates the stage."""
    given = (*stage.stored, *stage.reductions)
    return not stage.rematerialises and any(name in differentiated for name in given)


def divide(program: Program, split_points: Collection[str] = ()) -> Staging:
    """Divide ``program`` into phases; a new one starts after each node named in ``split_points``."""
    levels = assign_levels(program, split_points)
    stored = choose_checkpoints(program, levels)
    reductions: dict[int, list[str]] = {}
    segments: dict[int, list[str]] = {}
    kept: dict[int, list[str]] = {}
    for node in program.nodes.values():
        level = levels[node.name]
        if node.name in stored:
            kept.setdefault(level, []).append(node.name)
        if node.kind is Kind.REDUCTION:
            reductions.setdefault(level, []).append(node.name)
        if node.kind in (Kind.GLOBAL, Kind.REDUCTION, Kind.GATHER):
            segments.setdefault(level, []).append(node.name)
    stages = tuple(
        _stage(program, levels, stored, level, tuple(kept.get(level, ())), tuple(reductions.get(level, ())))
        for level in sorted({*kept, *reductions})
    )
    return Staging(levels, stored, stages, {level: tuple(names) for level, names in sorted(segments.items())})


def recompute(program: Program, staging: Staging, name: str) -> Staging:
    """The same staging, but with checkpoint ``name`` recomputed by every phase that reads it.

    By then the results of reductions that the map depends on are known, so the reading phases grow by local
    operators only. A map that an operator takes whole must be stored.
    """
    assert name in staging.stored
    stored = staging.stored - {name}
    stages = []
    for stage in staging.stages:
        if name in stage.stored or name in stage.inputs:
            kept = tuple(other for other in stage.stored if other != name)
            if not kept and not stage.reductions:
                continue
            stage = _stage(program, staging.levels, stored, stage.level, kept, stage.reductions)
        stages.append(stage)
    return replace(staging, stored=stored, stages=tuple(stages))


def drop(
    program: Program, staging: Staging, names: Collection[str], is_visited: Callable[[Stage], bool]
) -> Staging:
    """The same staging, but with checkpoints ``names`` dropped between the two passes.

    They are freed after their last forward reader, and rematerialised before the first backward phase that
    needs them: one that reads them, needs their values for a reduction, or rematerialises a map from them.
    So each map in a stretch of dropped maps is computed once more, however long the stretch is.

    Parameters
    ----------
    names
        Stored maps that are dropped; those that the backward pass does not need stay as they are.
    is_visited
        Whether the backward pass visits a stage.
    """
    wanted = frozenset(names)
    assert staging.stored >= wanted
    first: dict[str, int] = {}
    for stage in staging.stages:
        reduced = [program.nodes[name].operands[0] for name in stage.reductions]
        needed = wanted.intersection((*stage.inputs, *reduced))
        if needed and is_visited(stage):
            # Levels of stages ascend.
            first.update(dict.fromkeys(needed, stage.level))
    by_level: dict[int, list[str]] = {}
    for name in sorted(names, key=program.position):
        by_level.setdefault(staging.levels[name], []).append(name)
    found = []
    # What a level is rematerialised from lies below it.
    for level, dropped in sorted(by_level.items(), reverse=True):
        kept = tuple(name for name in dropped if name in first)
        if not kept:
            continue
        before = max(first[name] for name in kept)
        stage = _stage(program, staging.levels, staging.stored, level, kept, (), rematerialises=True)
        found.append(Rematerialisation(stage, before))
        for name in wanted.intersection(stage.inputs):
            first[name] = max(first.get(name, 0), before)
    found.sort(key=lambda each: (-each.before, each.stage.level))
    return replace(staging, rematerialised=tuple(found))


def assign_levels(program: Program, split_points: Collection[str]) -> dict[str, int]:
    """The level of every node, in topological order."""
    levels: dict[str, int] = {}
    floor = highest = 1
    drawn = 0
    for node in program.nodes.values():
        level = _level(program, node, levels)
        if node.kind is Kind.GLOBAL and may_draw(node.target):
            # Numbers are drawn in the order in which the model draws them.
            level = drawn = max(level, drawn)
        if node.kind is Kind.LOCAL:
            level = max(level, floor)
            highest = max(highest, level)
        levels[node.name] = level
        if node.name in split_points:
            floor = highest + 1
    _delay(program, levels)
    return levels


def _delay(program: Program, levels: dict[str, int]) -> None:
    """Compute values that depend on parameters alone only when they are needed, as plain PyTorch does.

    Such values can be as large as maps, as the relative position biases of attention are. Computed late, they
    take no memory in earlier phases, and in the backward pass their gradients take none in later phases.
    """
    free: set[str] = set()
    for node in program.nodes.values():
        is_value = node.kind in (Kind.GLOBAL, Kind.PROMOTED) and not may_draw(node.target)
        if is_value and all(n in free or program.nodes[n].kind is Kind.STATE for n in node.operands):
            free.add(node.name)
    latest: dict[str, int] = {}
    for node in reversed(list(program.nodes.values())):
        level = levels[node.name]
        if node.name in free:
            level = latest.get(node.name, level)
            # An operator's results stay together, see below.
            if node.target is not operator.getitem:
                levels[node.name] = level
        # Maps and reductions read values that an earlier level has made.
        reads = level - (node.kind in (Kind.LOCAL, Kind.REDUCTION))
        for name in node.operands:
            latest[name] = min(latest.get(name, reads), reads)
    for node in program.nodes.values():
        if node.name in free and node.target is operator.getitem:
            levels[node.name] = levels[node.operands[0]]


def _level(program: Program, node: Node, levels: Mapping[str, int]) -> int:
    operands = [(program.nodes[name].kind, levels[name]) for name in node.operands]
    if node.kind in (Kind.LOCAL, Kind.REDUCTION):
        # A global value or a promoted one is ready only after its own level's phase.
        return max((level + (kind is not Kind.LOCAL) for kind, level in operands), default=1)
    return max((level for _, level in operands), default=0)


def choose_checkpoints(program: Program, levels: Mapping[str, int]) -> frozenset[str]:
    """The local maps that a later phase, a resident operator or the caller reads from a store.

    A pointwise function of maps that are stored already is recomputed instead, if reading those maps moves no
    more bytes than reading its result would.
    """
    late, whole = _used_late(program, levels), gathered(program)
    stored: set[str] = set()
    bases: dict[str, frozenset[str]] = {}
    for node in program.nodes.values():
        if not node.is_map:
            continue
        found = _bases(program, node, bases) if node.kind is Kind.LOCAL else frozenset({node.name})
        keeps = node.name in late and not _worth_recomputing(program, node, found)
        if node.name in whole or keeps:
            stored.add(node.name)
            found = frozenset({node.name})
        if found is not None:
            bases[node.name] = found
    return frozenset(name for name in stored if program.nodes[name].kind is Kind.LOCAL)


def _used_late(program: Program, levels: Mapping[str, int]) -> set[str]:
    return {
        name
        for node in program.nodes.values()
        if node.kind in (Kind.LOCAL, Kind.REDUCTION)
        for name in node.operands
        if program.nodes[name].is_map and levels[name] < levels[node.name]
    }


def gathered(program: Program) -> set[str]:
    """Maps that an operator on whole maps, or the caller as a result, reads from a store."""
    kinds = (Kind.GATHER, Kind.RESULT)
    return {node.operands[0] for node in program.nodes.values() if node.kind in kinds}


def _bases(program: Program, node: Node, bases: Mapping[str, frozenset[str]]) -> frozenset[str] | None:
    """The stored maps from which pointwise operators can recompute ``node``, or ``None``."""
    assert node.local is not None
    if not node.local.pointwise or any(name not in bases for name in node.local.accesses):
        return None
    return frozenset().union(*(bases[name] for name in node.local.accesses))


def _worth_recomputing(program: Program, node: Node, bases: frozenset[str] | None) -> bool:
    if bases is None:
        return False
    return sum(program.nodes[name].nbytes for name in bases) <= node.nbytes


def _stage(
    program: Program,
    levels: Mapping[str, int],
    stored: Collection[str],
    level: int,
    kept: tuple[str, ...],
    reductions: tuple[str, ...],
    *,
    rematerialises: bool = False,
) -> Stage:
    """Build the stage of a level, backwards from its outputs to stored maps and other inputs."""
    pending = [*kept, *(program.nodes[name].operands[0] for name in reductions)]
    inside: set[str] = set()
    inputs: set[str] = set()
    while pending:
        name = pending.pop()
        node = program.nodes[name]
        at_hand = name in stored and levels[name] < level
        if node.kind is not Kind.LOCAL or at_hand:
            inputs.add(name)
        elif name not in inside:
            inside.add(name)
            assert node.local is not None
            pending.extend(node.local.accesses)
    return Stage(
        level=level,
        nodes=tuple(sorted(inside, key=program.position)),
        inputs=tuple(sorted(inputs, key=program.position)),
        stored=kept,
        reductions=reductions,
        rematerialises=rematerialises,
    )
