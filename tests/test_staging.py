"""Phases and checkpoints of random programs, and of the blocks that networks are made of."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from helpers import assert_streamed_equals_plain, streaming_plan
from hypothesis import given, settings
from hypothesis import strategies as st
from programs import programs
from torch import Tensor, nn

from streamcnn.graph.program import Kind, Program
from streamcnn.planning.split_points import choose_split_points
from streamcnn.planning.staging import Staging, assign_levels, divide
from streamcnn.planning.tiling import Outline, grid, tile_stage

some = settings(max_examples=80)
SHAPE = (2, 3, 32, 40)


@st.composite
def staged(draw: st.DrawFn) -> tuple[Program, set[str], Staging]:
    """A program, some split points, and how it is divided."""
    program = draw(programs())
    local = [node.name for node in program.nodes.values() if node.kind is Kind.LOCAL]
    split_points = set(draw(st.lists(st.sampled_from(local), max_size=2)))
    return program, split_points, divide(program, split_points)


@some
@given(staged())
def test_levels_never_fall_and_rise_after_reductions(case: tuple[Program, set[str], Staging]) -> None:
    program, _, staging = case
    for node in program.nodes.values():
        for operand in node.operands:
            below, above = staging.levels[operand], staging.levels[node.name]
            assert below <= above
            if node.kind is Kind.LOCAL and program.nodes[operand].kind is not Kind.LOCAL:
                assert below < above


@some
@given(staged())
def test_what_follows_a_split_point_is_in_a_later_phase(case: tuple[Program, set[str], Staging]) -> None:
    program, split_points, staging = case
    local = [node.name for node in program.nodes.values() if node.kind is Kind.LOCAL]
    for place in split_points:
        before, after = local[: local.index(place) + 1], local[local.index(place) + 1 :]
        for later in after:
            assert staging.levels[later] > max(staging.levels[name] for name in before)


@some
@given(staged())
def test_every_phase_has_what_it_reads(case: tuple[Program, set[str], Staging]) -> None:
    program, _, staging = case
    levels = [stage.level for stage in staging.stages]
    assert levels == sorted(set(levels))
    for stage in staging.stages:
        for name in stage.inputs:
            node = program.nodes[name]
            assert node.kind is not Kind.LOCAL or (
                name in staging.stored and staging.levels[name] < stage.level
            )
        done = set(stage.inputs)
        for name in stage.nodes:
            assert set(program.nodes[name].local.accesses) <= done
            done.add(name)
        assert set(stage.owned(program)) <= done


@some
@given(staged())
def test_every_checkpoint_and_reduction_has_one_phase(case: tuple[Program, set[str], Staging]) -> None:
    program, _, staging = case
    stored = [name for stage in staging.stages for name in stage.stored]
    assert sorted(stored) == sorted(staging.stored)
    reductions = [name for stage in staging.stages for name in stage.reductions]
    assert sorted(reductions) == sorted(n for n, node in program.nodes.items() if node.kind is Kind.REDUCTION)
    small = [name for names in staging.segments.values() for name in names]
    expected = (Kind.GLOBAL, Kind.REDUCTION, Kind.GATHER)
    assert sorted(small) == sorted(n for n, node in program.nodes.items() if node.kind in expected)


@some
@given(staged())
def test_what_is_gathered_is_stored(case: tuple[Program, set[str], Staging]) -> None:
    program, _, staging = case
    for node in program.nodes.values():
        if node.kind is Kind.GATHER:
            assert node.operands[0] in staging.stored


@some
@given(programs())
def test_no_split_points_without_a_limit(program: Program) -> None:
    assert choose_split_points(program, float("inf")) == frozenset()


@some
@given(programs(), st.integers(0, 30))
def test_a_split_point_is_an_operator_of_the_phase_that_it_splits(program: Program, limit: int) -> None:
    split_points = choose_split_points(program, limit)
    assert all(program.nodes[name].kind is Kind.LOCAL for name in split_points)
    levels = assign_levels(program, split_points)
    highest = max(levels.values(), default=0)
    assert all(levels[name] < highest for name in split_points)


# --- the blocks of networks ---------------------------------------------------------------------------


def normalized(width_in: int, width: int = 6, **options: int) -> nn.Sequential:
    """Convolution, batch norm, activation."""
    convolution = nn.Conv2d(width_in, width, 3, padding=1, bias=False, **options)
    return nn.Sequential(convolution, nn.BatchNorm2d(width), nn.ReLU())


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(normalized(w) for w in (3, 6, 6, 6))

    def forward(self, x: Tensor) -> Tensor:
        x = self.blocks[0](x)
        for block in self.blocks[1:]:
            x = x + block(x)
        return x.mean((2, 3))


class Dense(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 3, padding=1)
        self.grow = nn.ModuleList(
            nn.Sequential(nn.BatchNorm2d(width), nn.ReLU(), nn.Conv2d(width, 4, 3, padding=1))
            for width in (6, 10, 14)
        )

    def forward(self, x: Tensor) -> Tensor:
        features = [self.stem(x)]
        for layer in self.grow:
            features.append(layer(torch.cat(features, 1)))
        return features[-1].mean((2, 3))


class Gated(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.block, self.last = normalized(3), nn.Conv2d(6, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.block(x)
        return self.last(x * torch.sigmoid(x.mean((2, 3), keepdim=True))).mean((2, 3))


class Pooled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(normalized(3), nn.MaxPool2d(3, 2, 1), normalized(6), normalized(6))

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x).mean((2, 3))


CHECKPOINTS: dict[str, tuple[Callable[[], nn.Module], bool, set[str]]] = {
    # Only convolutions are stored: what norm and activation make of them is cheap to make again.
    "chain": (lambda: nn.Sequential(normalized(3), normalized(6)), True, {"conv2d", "conv2d_1", "relu_1"}),
    # The pooled map is a quarter of its convolution's, but that one is needed for batch norm's gradient.
    "pooled": (Pooled, True, {"conv2d", "conv2d_1", "conv2d_2"}),
    # A sum of two stored maps is stored: to read both would move twice the bytes.
    "residual": (Residual, True, {"conv2d", "conv2d_1", "conv2d_2", "conv2d_3", "add", "add_1"}),
    # A concatenation of stored maps is not, as its parts have no more bytes. The last one is: of its
    # parts one is read by nothing else and so not stored.
    "dense": (Dense, True, {"conv2d", "conv2d_1", "cat_2"}),
    "gated": (Gated, True, {"conv2d"}),
    # Without whole-image norms nothing needs to be stored,
    "chain in eval mode": (lambda: nn.Sequential(Pooled()), False, set()),
    # but a gate is a barrier in either mode.
    "gated in eval mode": (Gated, False, {"relu"}),
}


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_checkpoints(name: str) -> None:
    build, train, expected = CHECKPOINTS[name]
    program, _ = streaming_plan(build().train(train), SHAPE, 512)
    assert set(divide(program).stored) == expected


def test_a_convolution_read_by_batch_norm_alone_is_never_computed_again() -> None:
    _, plan = streaming_plan(nn.Sequential(normalized(3), normalized(6)), SHAPE, 16)
    assert [phase.skipped for phase in plan.phases] == [("conv2d",), ("conv2d_1",), ()]


def test_a_cut_stores_what_crosses_it() -> None:
    net = nn.Sequential(nn.Conv2d(3, 6, 3), nn.ReLU(), nn.Conv2d(6, 6, 3), nn.AdaptiveAvgPool2d(1))
    program, _ = streaming_plan(net, SHAPE, 512)
    assert divide(program).stored == frozenset()
    assert divide(program, {"relu"}).stored == {"relu"}
    assert [stage.stored for stage in divide(program, {"conv2d"}).stages] == [("conv2d",), ()]


def test_long_stretches_are_cut() -> None:
    # With few channels, computing again would be faster than meeting the stores once more.
    net = nn.Sequential(*(nn.Conv2d(16, 16, 7, padding=3) for _ in range(12)), nn.AdaptiveAvgPool2d(1))
    program, plan = streaming_plan(net, (1, 16, 200, 200), 64)
    outlines = [Outline.of(program, stage) for stage in divide(program).stages]
    ((uncut,),) = (tile_stage(outline, grid(outline, (64, 64))) for outline in outlines)
    assert max(uncut.phase(differentiated=True).halo) >= 60
    assert len(plan.phases) > 3
    assert all(max(phase.halo) <= 16 + 6 for phase in plan.phases)


class Biases(nn.Module):
    """A bias for every position of the second of three blocks, and parts of one parameter for two of them."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(normalized(w) for w in (3, 6, 6))
        self.bias = nn.Parameter(torch.rand(1, 1, *SHAPE[2:]))
        self.scales = nn.Parameter(torch.rand(12, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        first, last = self.scales.exp().chunk(2)
        x = self.blocks[0](x) * first
        x = self.blocks[1](x) + self.bias.tanh()
        return (self.blocks[2](x) * last).mean((2, 3))


def test_what_follows_from_parameters_is_worked_out_when_it_is_needed() -> None:
    program, plan = streaming_plan(Biases(), SHAPE, 16)
    phases = {name: phase.level for phase in plan.phases for name in phase.nodes}
    bias, first, last = (program.nodes[name] for name in ("tanh", "chunk.1", "chunk.2"))
    # In time for the phases that read them, and for the first if there are several.
    assert plan.levels[bias.name] == phases["conv2d_2"] - 1 > 1
    assert {plan.levels[name] for name in ("exp", "chunk", first.name, last.name)} == {phases["conv2d_1"] - 1}
    assert_streamed_equals_plain(Biases(), SHAPE, tile=16)
