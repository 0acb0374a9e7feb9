"""Every axis map against the operators it stands for.

What an output really reads is found by putting a NaN at one input position at a time. Whether the rule is
enough is found by running the operator on what it asks for.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from helpers import required
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from streamcnn.geometry.axis_maps import (
    Adaptive,
    All,
    AxisMap,
    Broadcast,
    Gathered,
    Index,
    Line,
    Repeated,
    Reversed,
    Same,
    Sliding,
    Transposed,
    reflected,
)
from streamcnn.geometry.regions import Interval, Intervals, Region
from streamcnn.geometry.windows import padded, placed
from streamcnn.graph.ops.taps import (
    CUBIC,
    TRIANGLE,
    Taps,
    antialiased_taps,
    bicubic_taps,
    bilinear_taps,
    nearest_taps,
)

Operator = Callable[[Tensor], Tensor]
AXES = (2, 3)
few = settings(max_examples=30)


@dataclass(frozen=True)
class Case:
    """An axis map and what it describes, along the last axis of (N, C, 1, size)."""

    axis_map: AxisMap
    whole: Operator
    """The operator on the whole axis, with its own padding."""
    size: int
    part: Operator | None = None
    """What runs on a tile; ``None`` where only the dependence is compared."""
    fill: float | None = None
    """The padding that the interpreter adds before ``part`` runs, if it adds any."""
    exact: bool = True
    """Whether nothing more is required than what is read; else it is a hull."""
    channels: int = 1

    def image(self, batch: int = 1) -> Tensor:
        return torch.randn(batch, self.channels, 1, self.size, dtype=torch.float64)


def positions_read(case: Case) -> list[set[int]]:
    """For each output position, the input positions that it reads."""
    image = case.image(batch=case.size)
    image[range(case.size), :, :, range(case.size)] = torch.nan
    reached = case.whole(image).isnan().any(2).any(1)
    return [set(column.nonzero().flatten().tolist()) for column in reached.unbind(1)]


def all_intervals(size: int) -> list[Interval]:
    return [Interval(a, b) for a in range(size) for b in range(a + 1, size + 1)]


def assert_required(case: Case) -> None:
    """Raise unless what the rule requires holds all that is read, and no more where it is exact."""
    reads = positions_read(case)
    outs = all_intervals(len(reads))
    at_once = Intervals(np.array([out.start for out in outs]), np.array([out.stop for out in outs]))
    each = [required(case.axis_map, out, case.size) for out in outs]
    assert list(case.axis_map.required_each(at_once, case.size)) == each
    for out in outs:
        read = set[int]().union(*reads[out.start : out.stop])
        needed = required(case.axis_map, out, case.size)
        assert 0 <= needed.start < needed.stop <= case.size, (out, needed)
        assert read <= set(range(needed.start, needed.stop)), (out, needed, read)
        if case.exact:
            hull = Interval(min(read), max(read) + 1) if read else Interval(needed.start, needed.start + 1)
            assert needed == hull, (out, needed, read)


def assert_runs(case: Case) -> None:
    """Raise unless the operator, run on what the rule requires, gives its part of the whole result."""
    assert case.part is not None
    image = case.image(batch=2)
    whole = case.whole(image)
    rows, out_rows = Interval(0, 1), Interval(0, whole.shape[2])
    for out in all_intervals(whole.shape[3])[::3]:
        needed = required(case.axis_map, out, case.size)
        x = image[..., needed.start : needed.stop]
        if case.fill is not None:
            window = case.axis_map.window(out)
            found = case.part(padded(x, AXES, Region(rows, needed), Region(rows, window), case.fill))
        else:
            result = case.axis_map.result(needed, out)
            found = placed(case.part(x), AXES, Region(out_rows, result), Region(out_rows, out))
        torch.testing.assert_close(found, whole[..., out.start : out.stop], rtol=1e-12, atol=1e-12)


def assert_right(case: Case) -> None:
    assert_required(case)
    if case.part is not None:
        assert_runs(case)


# --- sliding windows ----------------------------------------------------------------------------------

sizes = st.integers(1, 9)
kernels, strides, dilations = st.integers(1, 4), st.integers(1, 4), st.integers(1, 3)


def convolution(kernel: int, stride: int, padding: int, dilation: int, size: int) -> Case:
    weight = torch.rand(1, 1, 1, kernel, dtype=torch.float64) + 0.5

    def run(x: Tensor, pads: int) -> Tensor:
        return F.conv2d(x, weight, None, (1, stride), (0, pads), (1, dilation))

    return Case(
        Sliding(kernel, stride, padding, dilation),
        lambda x: run(x, padding),
        size,
        lambda x: run(x, 0),
        fill=0.0,
        # Gaps between what is read may reach over the edge, where the rule asks up to the edge.
        exact=dilation == 1 and stride <= kernel,
    )


def max_pooling(kernel: int, stride: int, padding: int, dilation: int, ceil: bool, size: int) -> Case:
    def run(x: Tensor, pads: int, ceil_mode: bool) -> Tensor:
        return F.max_pool2d(x, (1, kernel), (1, stride), (0, pads), (1, dilation), ceil_mode)

    return Case(
        Sliding(kernel, stride, padding, dilation),
        lambda x: run(x, padding, ceil),
        size,
        lambda x: run(x, 0, False),
        fill=-torch.inf,
        exact=dilation == 1 and stride <= kernel,
    )


def average_pooling(kernel: int, stride: int, padding: int, ceil: bool, size: int) -> Case:
    def run(x: Tensor, pads: int, ceil_mode: bool) -> Tensor:
        return F.avg_pool2d(x, (1, kernel), (1, stride), (0, pads), ceil_mode, divisor_override=3)

    return Case(
        Sliding(kernel, stride, padding),
        lambda x: run(x, padding, ceil),
        size,
        lambda x: run(x, 0, False),
        fill=0.0,
        exact=stride <= kernel,
    )


@few
@given(kernels, strides, st.integers(0, 7), dilations, sizes)
def test_convolution(kernel: int, stride: int, padding: int, dilation: int, size: int) -> None:
    assume(size + 2 * padding > dilation * (kernel - 1))
    assert_right(convolution(kernel, stride, padding, dilation, size))


@few
@given(kernels, strides, st.integers(0, 2), dilations, st.booleans(), sizes)
def test_max_pooling(kernel: int, stride: int, padding: int, dilation: int, ceil: bool, size: int) -> None:
    assume(2 * padding <= kernel and size + 2 * padding > dilation * (kernel - 1))
    assert_right(max_pooling(kernel, stride, padding, dilation, ceil, size))


@few
@given(kernels, strides, st.integers(0, 2), st.booleans(), sizes)
def test_average_pooling(kernel: int, stride: int, padding: int, ceil: bool, size: int) -> None:
    assume(2 * padding <= kernel and size + 2 * padding >= kernel)
    assert_right(average_pooling(kernel, stride, padding, ceil, size))


@few
@given(st.integers(0, 4), strides, sizes)
def test_strided_slice(start: int, step: int, size: int) -> None:
    assume(start < size)
    axis_map = Sliding(1, step, -start)
    part = Case(axis_map, lambda x: x[..., start::step], size, lambda x: x[..., ::step], exact=step == 1)
    assert_right(part)


@few
@given(st.integers(-3, 7), st.integers(-3, 7), sizes)
def test_constant_padding(before: int, after: int, size: int) -> None:
    assume(size + before + after > 0 and size + before > 0 and size + after > 0)
    case = Case(
        Sliding(padding=before), lambda x: F.pad(x, (before, after), value=0.5), size, lambda x: x, fill=0.5
    )
    assert_right(case)


@few
@given(st.integers(1, 4), st.integers(1, 3))
def test_pixel_unshuffle(factor: int, num_blocks: int) -> None:
    def run(x: Tensor) -> Tensor:
        return F.pixel_unshuffle(x.expand(-1, -1, factor, -1), factor)

    assert_right(Case(Sliding(factor, factor), run, factor * num_blocks, run))


@few
@given(st.integers(1, 12), sizes)
def test_adaptive_pooling(num_out: int, size: int) -> None:
    assert_required(Case(Adaptive(size, num_out), lambda x: F.adaptive_avg_pool2d(x, (1, num_out)), size))


@few
@given(st.integers(1, 12), sizes)
def test_windows_of_adaptive_pooling_that_read_positions(num_out: int, size: int) -> None:
    reads = positions_read(Case(Same(), lambda x: F.adaptive_avg_pool2d(x, (1, num_out)), size))
    for positions in all_intervals(size):
        found = Adaptive(size, num_out).readers(positions)
        wanted = set(range(positions.start, positions.stop))
        assert set(range(found.start, found.stop)) == {i for i, read in enumerate(reads) if read & wanted}


@few
@given(sizes)
def test_all_positions(size: int) -> None:
    assert_right(Case(All(size), lambda x: x.cumsum(3) + x.flip(3).cumsum(3).flip(3), size))


@few
@given(sizes, sizes)
def test_whole_lines(size: int, num_out: int) -> None:
    assert_right(Case(Line(size), lambda x: x.cumsum(3) + x.flip(3).cumsum(3).flip(3), size))
    outs = all_intervals(num_out)
    at_once = Intervals(np.array([out.start for out in outs]), np.array([out.stop for out in outs]))
    assert set(Line(size).computed_each(at_once, num_out)) == {Interval(0, num_out)}
    assert list(Same().computed_each(at_once, num_out)) == outs


@few
@given(sizes)
def test_positions_in_reverse(size: int) -> None:
    assert_right(Case(Reversed(size), lambda x: x.flip(3), size, lambda x: x.flip(3)))


@few
@given(kernels, strides, sizes)
def test_windows_of_a_tensor(kernel: int, stride: int, size: int) -> None:
    assume(kernel <= size)

    def run(x: Tensor) -> Tensor:
        return x.unfold(3, kernel, stride).sum(-1)

    assert_right(Case(Sliding(kernel, stride), run, size, run, exact=stride <= kernel))


# --- finer grids --------------------------------------------------------------------------------------


def transposed(kernel: int, stride: int, padding: int, dilation: int, output_padding: int, size: int) -> Case:
    weight = torch.rand(1, 1, 1, kernel, dtype=torch.float64) + 0.5

    def run(x: Tensor, pads: int, extra: int) -> Tensor:
        return F.conv_transpose2d(x, weight, None, (1, stride), (0, pads), (0, extra), 1, (1, dilation))

    return Case(
        Transposed(kernel, stride, padding, dilation),
        lambda x: run(x, padding, output_padding),
        size,
        lambda x: run(x, 0, 0),
        # Between the positions that an input reaches there are others where windows are dilated.
        exact=dilation == 1,
    )


@few
@given(kernels, strides, st.integers(0, 3), dilations, st.integers(0, 3), sizes)
def test_transposed_convolution(
    kernel: int, stride: int, padding: int, dilation: int, output_padding: int, size: int
) -> None:
    assume(output_padding < max(stride, dilation))
    assume((size - 1) * stride - 2 * padding + dilation * (kernel - 1) + output_padding + 1 > 0)
    assert_right(transposed(kernel, stride, padding, dilation, output_padding, size))


@few
@given(st.integers(1, 4), sizes)
def test_pixel_shuffle(factor: int, size: int) -> None:
    def run(x: Tensor) -> Tensor:
        return F.pixel_shuffle(x, factor)

    assert_right(Case(Repeated(factor), run, size, run, channels=factor * factor))


@few
@given(st.integers(1, 4), sizes)
def test_nearest_upsampling_by_whole_factors(factor: int, size: int) -> None:
    def run(x: Tensor) -> Tensor:
        return F.interpolate(x, (1, x.shape[3] * factor))

    assert_right(Case(Repeated(factor), run, size, run))


@few
@given(st.integers(2, 5), sizes)
def test_bilinear_upsampling_by_whole_factors(factor: int, size: int) -> None:
    def run(x: Tensor) -> Tensor:
        return F.interpolate(x, (1, x.shape[3] * factor), mode="bilinear")

    # One position more than is read is asked for on one side, so that a tile is interpolated as the whole.
    assert_right(Case(Repeated(factor, 1), run, size, run, exact=False))


# --- listed sources -----------------------------------------------------------------------------------


@few
@given(st.integers(0, 9), st.integers(0, 9), sizes, st.sampled_from(["reflect", "replicate", "circular"]))
def test_padding_by_the_maps_own_values(before: int, after: int, size: int, mode: str) -> None:
    assume(mode == "replicate" or max(before, after) < size)
    source_of = {
        "reflect": lambda place: reflected(place, size),
        "replicate": lambda place: min(max(place, 0), size - 1),
        "circular": lambda place: place % size,
    }[mode]
    sources = tuple(source_of(place) for place in range(-before, size + after))

    def run(x: Tensor) -> Tensor:
        return F.pad(x, (before, after, 0, 0), mode=mode)

    assert_required(Case(Gathered(sources, sources), run, size))
    x = torch.arange(float(size)).reshape(1, 1, 1, size)
    assert run(x).flatten().tolist() == list(sources)


@few
@given(st.integers(1, 20), sizes)
def test_nearest_resampling_to_a_size(num_out: int, size: int) -> None:
    def run(x: Tensor) -> Tensor:
        return F.interpolate(x, (1, num_out))

    taps = nearest_taps(num_out, size, None)
    assert taps
    assert_required(Case(taps.access, run, size))


@pytest.mark.parametrize("mode", ["nearest", "nearest-exact"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize(("num_out", "size"), [(99_991, 40_000), (13_337, 40_000), (4_797, 3), (160, 120)])
def test_nearest_positions_of_wide_maps(num_out: int, size: int, dtype: torch.dtype, mode: str) -> None:
    taps = nearest_taps(num_out, size, None, centred="exact" in mode, dtype=dtype)
    # One image a bit of the position, as such numbers are beyond what some types can hold.
    bits = torch.arange(size.bit_length())
    x = ((torch.arange(size) >> bits[:, None]) & 1)[:, None, None].to(dtype)
    found = F.interpolate(x, (1, num_out), mode=mode).long()[:, 0, 0]
    picked = tuple((found << bits[:, None]).sum(0).tolist())
    x = x[:1].requires_grad_()
    F.interpolate(x, (1, num_out), mode=mode).float().sum().backward()
    assert x.grad is not None
    agrees = x.grad.flatten().equal(torch.bincount(torch.tensor(picked), minlength=size).to(dtype))
    assert (taps is not None and taps.sources == (picked,)) or (dtype == torch.float64 and not agrees)


def taps_of(mode: str, corners: bool, num_out: int, size: int) -> Taps:
    if mode.endswith("antialiased"):
        return antialiased_taps(num_out, size, None, corners, TRIANGLE if "bilinear" in mode else CUBIC)
    taps = bilinear_taps if mode == "bilinear" else bicubic_taps
    return taps(num_out, size, None, corners)


@few
@given(
    st.integers(1, 20),
    sizes,
    st.booleans(),
    st.sampled_from(["bilinear", "bicubic", "bilinear, antialiased", "bicubic, antialiased"]),
)
def test_interpolation_to_a_size(num_out: int, size: int, corners: bool, mode: str) -> None:
    taps = taps_of(mode, corners, num_out, size)

    def run(x: Tensor) -> Tensor:
        kind, _, antialiased = mode.partition(", ")
        return F.interpolate(x, (1, num_out), mode=kind, align_corners=corners, antialias=bool(antialiased))

    # Where a place falls on a position, ATen may or may not read others with a weight of zero.
    case = Case(taps.access, run, size, exact=False)
    assert_required(case)
    image = case.image()
    # An axis that stays as it is has no weights.
    weights = taps.weights or ((1.0,) * num_out,)
    read = sum(
        image[..., list(source)] * torch.tensor(weight, dtype=image.dtype)
        for source, weight in zip(taps.sources, weights, strict=True)
    )
    torch.testing.assert_close(read, run(image), rtol=1e-12, atol=1e-12)


@few
@given(st.integers(1, 7), st.integers(1, 12))
def test_reflection_stays_inside(size: int, distance: int) -> None:
    assert all(0 <= reflected(place, size) < size for place in range(-distance, size + distance))


# --- pointwise ----------------------------------------------------------------------------------------


@few
@given(sizes)
def test_same_position(size: int) -> None:
    assert Same().pointwise
    assert_right(Case(Same(), torch.sin, size, torch.sin))


@few
@given(sizes)
def test_broadcast_position(size: int) -> None:
    assert Broadcast().pointwise
    assert Broadcast().window(Interval(size - 1, size + 1)) == Interval(0, 1)
    assert_required(Case(Broadcast(), lambda x: x.expand(-1, -1, -1, size), 1))


@pytest.mark.parametrize(
    "axis_map",
    [
        Sliding(),
        Transposed(1, 1, 0, 1),
        Repeated(1),
        Gathered((0,), (0,)),
        Adaptive(1, 1),
        Reversed(1),
        All(1),
    ],
)
def test_what_may_move_positions_is_not_pointwise(axis_map: AxisMap) -> None:
    assert not axis_map.pointwise


# --- the tests themselves -----------------------------------------------------------------------------


@dataclass(frozen=True)
class Narrowed(AxisMap):
    """A rule that asks for too little on one side."""

    right: AxisMap
    before: int
    after: int

    def bounds(self, start: Index, stop: Index) -> tuple[Index, Index]:
        first, last = self.right.bounds(start, stop)
        return first + self.before, np.maximum(last - self.after, first + self.before)

    def result(self, at_hand: Interval, out: Interval) -> Interval:
        return self.right.result(at_hand, out)


FIVE = (0, 1, 2, 3, 4)
CASES: dict[str, Case] = {
    "convolution": convolution(3, 1, 1, 1, 5),
    "even kernel": convolution(4, 2, 1, 1, 7),
    "dilated": convolution(2, 1, 2, 3, 6),
    "max pooling": max_pooling(3, 2, 1, 1, True, 6),
    "transposed": transposed(3, 2, 1, 1, 1, 4),
    "bilinear": Case(Repeated(2, 1), lambda x: F.interpolate(x, (1, 10), mode="bilinear"), 5, exact=False),
    "pixel shuffle": Case(Repeated(2), lambda x: F.pixel_shuffle(x, 2), 5, channels=4),
    "gathered": Case(Gathered(FIVE, FIVE), torch.sin, 5),
    "same": Case(Same(), torch.sin, 5),
}


@pytest.mark.parametrize(("before", "after"), [(1, 0), (0, 1)])
@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_a_window_too_small_is_noticed(case: Case, before: int, after: int) -> None:
    assert_required(case)
    fields: dict[str, Any] = {**case.__dict__, "axis_map": Narrowed(case.axis_map, before, after)}
    with pytest.raises(AssertionError):
        assert_required(Case(**fields))
