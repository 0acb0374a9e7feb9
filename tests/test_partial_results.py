"""Partial results of a reduction's tiles: merged together, a bounded number of them at once."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from operator_counts import count_operators
from torch import Tensor, nn

from streamcnn import StreamingModel
from streamcnn.execution import combiner
from streamcnn.execution.combiner import Combiner
from streamcnn.geometry.axis_maps import Adaptive
from streamcnn.geometry.regions import Interval, Region
from streamcnn.graph.ops.moments import Moments
from streamcnn.graph.ops.reduction_types import (
    AlongOneAxis,
    Extremum,
    ProductSum,
    Reduction,
    Sum,
    VectorNorm,
)
from streamcnn.graph.ops.top_positions import TopPositions
from streamcnn.graph.ops.window_reductions import WindowMaxima, WindowMeans

SHAPE = (2, 3, 120, 7)
DIMS = (0, 2, 3)
WINDOWS = (Adaptive(120, 3), Adaptive(7, 2))
RULES: list[Reduction] = [
    Sum(SHAPE, DIMS, False, 2),
    Moments(SHAPE, DIMS, False),
    Moments(SHAPE, (2, 3), True),
    Extremum(SHAPE, DIMS, False, -1),
    VectorNorm(SHAPE, (2, 3), False, 3.0),
    AlongOneAxis.of(Sum(SHAPE, (2,), False), (2, 3)),
    AlongOneAxis.of(Extremum(SHAPE, (0, 3), True), (2, 3)),
    WindowMeans(SHAPE, (2, 3), True, WINDOWS),
    WindowMaxima(SHAPE, (2, 3), True, WINDOWS),
    TopPositions(SHAPE, (2, 3), True, 9),
]


def merge_rows(rule: Reduction, x: Tensor, height: int = 1) -> tuple[Tensor, ...]:
    """The results of ``rule`` on ``x``, cut into tiles of whole rows."""
    combine = make_combiner(rule)
    for start in range(0, x.shape[2], height):
        region = Region(Interval(start, min(start + height, x.shape[2])), Interval(0, x.shape[3]))
        combine.merge("it", rule.partial(x[:, :, start : start + height], region))
    return rule.finish(combine.take_merged("it"), x.dtype)


def make_combiner(rule: Reduction) -> Combiner:
    program: Any = SimpleNamespace(nodes={"it": SimpleNamespace(reduction=rule)})
    unused: Any = None
    return Combiner(program, unused, unused)


def named(rule: Reduction) -> str:
    return f"{type(rule).__name__} over {rule.dims}"


@pytest.mark.parametrize("rule", RULES, ids=named)
def test_results_do_not_depend_on_the_number_of_tiles(rule: Reduction) -> None:
    torch.manual_seed(0)
    # Values that are equal and far from zero: ties count, and squares alone would lose the variance.
    x = torch.randn(SHAPE, dtype=torch.float64).mul(4).round() + 1e6
    whole = merge_rows(rule, x, height=SHAPE[2])
    torch.testing.assert_close(merge_rows(rule, x, height=40), whole, rtol=1e-11, atol=0)
    torch.testing.assert_close(merge_rows(rule, x), whole, rtol=1e-11, atol=0)


@pytest.mark.parametrize("edge", [7, 49, 107])
def test_the_mean_of_equal_values_is_that_value(edge: int) -> None:
    """A mask that covers everything has a coverage of 1, and a constant map no deviation."""
    shape = (1, 1, edge, edge)
    x = torch.ones(shape, dtype=torch.float64)
    for height in (edge, 16):
        assert merge_rows(Sum(shape, (2, 3), False, edge**2), x, height) == (1,)
        assert merge_rows(Moments(shape, (2, 3), False), 3 * x, height) == (3, 0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_norms_that_are_whole_numbers_are_exact(dtype: torch.dtype) -> None:
    """Whatever the roots of the tiles' own sums."""
    for edge, value, height in ((49, 1, 10), (63, 1, 5), (100, 1, 7), (100, 3, 13)):
        shape = (1, 1, edge, edge)
        x = torch.full(shape, value, dtype=dtype)
        assert merge_rows(VectorNorm(shape, (2, 3), False, 2.0), x, height) == (value * edge,)
        assert merge_rows(VectorNorm(shape, (2, 3), False, 1.0), x, height) == (value * edge**2,)


@pytest.mark.parametrize("dims", [(0, 2, 3), (2, 3), (1, 2, 3)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.complex64], ids=str)
def test_equal_values_have_no_variance(dtype: torch.dtype, dims: tuple[int, ...]) -> None:
    """Whatever the rounding of their sums: where the deviation is 0 its gradient is, and else it is not."""
    x = torch.empty(2, 3, 49, 37, dtype=dtype)
    for value in (0.1, 0.7, -1e5 / 7):
        rule = Moments(x.shape, dims, False)
        # In one of the channels or images all values but one are equal.
        mean, variance = merge_rows(rule, x.fill_(value), 16)
        assert (mean == x[0, 0, 0, 0]).all()
        assert (variance == 0).all()
        x[1, 2, 3, 4] *= 1 + 2 * torch.finfo(dtype).eps
        _, variance = merge_rows(rule, x, 16)
        assert (variance > 0).sum() == 1


@pytest.mark.parametrize("dtype", [torch.complex64, torch.complex128], ids=str)
def test_complex_values_are_merged(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    x = torch.randn(1, 5, 120, 4, dtype=dtype) + 3
    rules = [
        Sum(x.shape, (2, 3), False),
        Moments(x.shape, (0, 2, 3), False),
        ProductSum(x.shape, (1, 2), False, 2),
    ]
    for rule in rules:
        whole = merge_rows(rule, x, height=120)
        torch.testing.assert_close(merge_rows(rule, x), whole)


@pytest.mark.parametrize("rule", RULES, ids=named)
def test_partial_results_have_one_shape_and_type_whatever_the_tile(rule: Reduction) -> None:
    # A pass is traced with those of a single position.
    x = torch.randn(SHAPE)
    small = rule.partial(x[:, :, :1, :1], Region.whole((1, 1)))
    whole = rule.partial(x, Region.whole(SHAPE[2:]))
    assert [(each.shape, each.dtype) for each in small] == [(each.shape, each.dtype) for each in whole]


@pytest.mark.parametrize("rule", RULES, ids=named)
def test_tiles_are_merged_together(rule: Reduction) -> None:
    """Merging two tiles after the other called some eight operators a tile."""
    x = torch.randn(SHAPE, dtype=torch.float64)
    row = Region(Interval(0, 1), Interval(0, SHAPE[3]))
    partials = [rule.partial(x[:, :, :1], row) for _ in range(SHAPE[2])]
    combine = make_combiner(rule)

    def merge() -> None:
        for partial in partials:
            combine.merge("it", partial)
        combine.take_merged("it")

    assert sum(count_operators(merge).values()) <= 2 * 16


def test_nothing_is_merged_of_one_tile() -> None:
    """Most phases of small images have one: their statistics are finished as they come."""
    rule = Moments(SHAPE, DIMS, False)
    combine = make_combiner(rule)
    partial = rule.partial(torch.randn(SHAPE), Region.whole(SHAPE[2:]))

    def finish() -> None:
        combine.merge("it", partial)
        rule.finish(combine.take_merged("it"), torch.float32)

    assert not count_operators(finish)


def test_few_large_partial_results_are_kept() -> None:
    wide = combiner._MOST_BYTES // 8
    rule = AlongOneAxis.of(Sum((1, 1, 9, wide), (2,), False), (2, 3))
    combine = make_combiner(rule)
    for row in range(9):
        region = Region(Interval(row, row + 1), Interval(0, wide))
        combine.merge("it", rule.partial(torch.ones(1, 1, 1, wide, dtype=torch.float64), region))
        assert len(combine._partials["it"]) == 1
    assert torch.equal(combine.take_merged("it")[0], torch.full((1, 1, wide), 9.0, dtype=torch.float64))


@pytest.mark.parametrize("rule", RULES, ids=named)
def test_gradients_leave_what_all_tiles_share(rule: Reduction) -> None:
    """Where a tile is one position, terms are as large as it is."""
    x = torch.randn(SHAPE, dtype=torch.float64)
    results = merge_rows(rule, x)
    terms = rule.gradient_terms(results, [torch.ones_like(result) for result in results], x.dtype)
    before = [term.clone() for term in terms]
    place, spot = Region(Interval(0, 1), Interval(0, 1)), x[:, :, :1, :1]
    once, again = (rule.added_gradient(torch.ones_like(spot), spot, place, terms) for _ in range(2))
    assert torch.equal(once, again)
    assert all(torch.equal(*pair) for pair in zip(terms, before, strict=True))


def test_the_gradient_of_statistics_is_one_operator_a_tile() -> None:
    """Slope and offset are worked out once a phase."""
    rule = Moments(SHAPE, DIMS, False)
    x = torch.randn(SHAPE)
    results = merge_rows(rule, x)
    terms = rule.gradient_terms(results, results, x.dtype)
    whole = Region.whole(SHAPE[2:])
    assert sum(count_operators(lambda: rule.gradient(x, whole, terms)).values()) == 1
    # Beside the sum with what comes from elsewhere.
    assert sum(count_operators(lambda: rule.added_gradient(x, x, whole, terms)).values()) == 2


def test_running_statistics_of_all_norms_are_copied_at_once() -> None:
    """Into the module, when a pass has gone through."""
    norms = [nn.BatchNorm2d(3, momentum=None if index % 2 else 0.1) for index in range(6)]
    model = StreamingModel(nn.Sequential(*norms))
    image = torch.randn(2, 3, 20, 18)
    with torch.no_grad():
        model(image)
        counts = count_operators(lambda: model(image))
    # Floating-point numbers and counters.
    assert counts["_foreach_copy_"] == 2
    assert not counts["copy_"]
