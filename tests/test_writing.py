"""Functional assignments: slice_scatter and its kin, with maps and global values on either side."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from helpers import assert_streamed_equals_plain, required
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from streamcnn.geometry.axis_maps import Transposed
from streamcnn.geometry.regions import Interval, Region
from streamcnn.graph.ops.writing import written

aten = torch.ops.aten
SHAPE = (2, 3, 21, 17)
TILE = (8, 7)
Function = Callable[..., Tensor]


class Writing(nn.Module):
    """A function of a map (N, 6, 21, 17) and of a parameter, between convolutions."""

    def __init__(self, function: Function, extents: tuple[int, ...]) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 6, 3, padding=1)
        self.function = function
        self.value = nn.Parameter(torch.linspace(-1, 1, torch.Size(extents).numel()).sin().reshape(extents))
        self.last = nn.Conv2d(6, 2, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.function(self.first(x), self.value).sin())


def inside(f: Tensor, g: Tensor) -> Tensor:
    """``f[:, :, 2:9, 3:-1] = g`` as functionalisation has it."""
    rows = f[:, :, 2:9]
    return torch.slice_scatter(f, torch.slice_scatter(rows, g, 3, 3, -1), 2, 2, 9)


MAPS: dict[str, tuple[Function, tuple[int, ...]]] = {
    "channels": (lambda f, v: torch.slice_scatter(f, f[:, 3:5] * v, 1, 0, 2), ()),
    "every other channel": (lambda f, v: torch.slice_scatter(f, f[:, :3] * v, 1, 1, None, 2), ()),
    "one channel": (lambda f, v: torch.select_scatter(f, (f * v).sum(1), 1, -2), ()),
    "one image": (lambda f, v: torch.select_scatter(f, f[1] * v, 0, 0), ()),
    "rows, shifted": (lambda f, v: torch.slice_scatter(f, f[:, :, 9:16] * v, 2, 3, 10), ()),
    "rows to the end": (lambda f, v: torch.slice_scatter(f, f[:, :, :4] * v, 2, -4), ()),
    "columns": (lambda f, v: torch.slice_scatter(f, f[..., 1:12] * v, 3, 0, 11), ()),
    "every third column": (lambda f, v: torch.slice_scatter(f, f[..., 4:10] * v, -1, 1, 17, 3), ()),
    "every other row": (lambda f, v: torch.slice_scatter(f, f[:, :, :10] * v, 2, 1, None, 2), ()),
    "a rectangle": (lambda f, v: inside(f, f[:, :, 10:17, 1:14] * v), ()),
    "a rectangle of itself": (lambda f, v: inside(f, f[:, :, 2:9, 3:-1] * v), ()),
    "nothing": (lambda f, v: torch.slice_scatter(f, f[:, :, 4:4], 2, 4, 4) * v, ()),
    "channels last": (
        lambda f, v: torch.slice_scatter(f.movedim(1, -1), f[:, 2:4].movedim(1, -1) * v, 3, 0, 2).movedim(
            -1, 1
        ),
        (),
    ),
    "rows of a parameter": (lambda f, v: torch.slice_scatter(f, v * 1, 2, 4, 9), (2, 6, 5, 17)),
    "channels of a parameter": (lambda f, v: torch.slice_scatter(f, v * 1, 1, 4, 6), (2, 2, 21, 17)),
    "one channel of a parameter": (lambda f, v: torch.select_scatter(f, v * 1, 1, 4), (2, 21, 17)),
    "one row of a parameter": (lambda f, v: torch.select_scatter(f, v * 1, 2, 13), (2, 6, 17)),
    "one column of a parameter": (lambda f, v: torch.select_scatter(f, v * 1, 3, 0), (2, 6, 21)),
    "into a parameter": (lambda f, v: torch.slice_scatter(v * 1, f[:, 1:4], 1, 0, 3), (2, 6, 21, 17)),
    "rows into a parameter": (lambda f, v: torch.slice_scatter(v * 1, f[:, :, 6:], 2, 2, 17), (2, 6, 21, 17)),
    "one channel into a parameter": (lambda f, v: torch.select_scatter(v * 1, f[:, 2], 1, 5), (2, 6, 21, 17)),
    "filled rows": (
        lambda f, v: torch.slice_scatter(f, aten.fill.Scalar(f[:, :, 3:8], 1.5), 2, 3, 8) * v,
        (),
    ),
    "filled with a parameter": (
        lambda f, v: torch.slice_scatter(f, aten.fill.Tensor(f[:, 3:5], v * 1), 1, 0, 2),
        (),
    ),
    "zeroed": (lambda f, v: torch.slice_scatter(f, aten.zero(f[..., 5:9]), 3, 5, 9) * v, ()),
    "copied": (lambda f, v: torch.slice_scatter(f, _copy(f[:, 3:5], f[:, :1] * v), 1, 0, 2), ()),
    "copied parameter": (lambda f, v: torch.slice_scatter(f, _copy(f[:, 3:5], v), 1, 0, 2), (2, 1, 1)),
    "copied position": (lambda f, v: torch.slice_scatter(f, _copy(f[:, 3:5], v), 1, 0, 2), (21, 17)),
    "cloned, lifted": (lambda f, v: torch.ops.aten.lift_fresh(f.clone()) * v + aten.alias_copy(f), ()),
}

RESIDENT: dict[str, tuple[Function, tuple[int, ...]]] = {
    "masked scatter": (lambda f, v: aten.masked_scatter(f, f > 0.3, f.flip(1) * v), ()),
    "index put": (
        lambda f, v: aten.index_put(f, [None, torch.tensor([0, 3]), torch.tensor([4, 5])], v * 1),
        (2, 2, 17),
    ),
    "index put, added": (
        lambda f, v: aten.index_put(f, [torch.tensor([0, 0, 1])], f[:1] * v, True),
        (),
    ),
    "a row of a map": (lambda f, v: torch.select_scatter(f, f[:, :, 3] * v, 2, 5), ()),
    "a diagonal": (lambda f, v: torch.diagonal_scatter(f, f[:, :, 0] * v, 0, 2, 3), ()),
}


def _copy(target: Tensor, value: Tensor) -> Tensor:
    """``aten.copy``, which plain autograd cannot differentiate, by its plain form where that is run."""
    if torch.compiler.is_exporting():
        return aten.copy(target, value)
    return value.expand(target.shape)


def _check(case: tuple[Function, tuple[int, ...]], *, resident: bool) -> None:
    assert_streamed_equals_plain(Writing(*case), SHAPE, tile=TILE, resident=resident)


@pytest.mark.parametrize("case", MAPS.values(), ids=MAPS.keys())
def test_assignment_streams(case: tuple[Function, tuple[int, ...]]) -> None:
    _check(case, resident=False)


@pytest.mark.parametrize("case", RESIDENT.values(), ids=RESIDENT.keys())
def test_other_assignment_is_resident(case: tuple[Function, tuple[int, ...]]) -> None:
    _check(case, resident=True)


class SmallCopy(nn.Module):
    """``aten.copy`` among global values."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 6, 3)
        self.scale = nn.Parameter(torch.tensor(1.7))

    def forward(self, x: Tensor) -> Tensor:
        pooled = self.conv(x).mean((2, 3))
        return pooled * _copy(pooled, pooled[:, :1] * self.scale)


def test_copy_of_small_values() -> None:
    assert_streamed_equals_plain(SmallCopy(), SHAPE, tile=TILE)


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_a_tile_is_written_like_the_whole(data: st.DataObject) -> None:
    draw = data.draw
    size = draw(st.integers(1, 30))
    first = draw(st.integers(0, size - 1))
    step, stop = draw(st.integers(1, 7)), draw(st.integers(first + 1, size))
    positions = range(first, stop, step)
    into = torch.arange(size).reshape(1, 1, size, 1)
    part = -1 - torch.arange(len(positions)).reshape(1, 1, -1, 1)
    expected = torch.slice_scatter(into, part, 2, first, stop, step)
    begin = draw(st.integers(0, size - 1))
    rows = Interval(begin, draw(st.integers(begin + 1, size)))
    at_hand = required(Transposed(1, step, -first, 1), rows, len(positions))
    cols = Interval(0, 1)
    found = written(
        part[:, :, at_hand.start : at_hand.stop],
        into[:, :, rows.start : rows.stop],
        2,
        0,
        first,
        step,
        out=Region(rows, cols),
        origin=Region(at_hand, cols),
    )
    assert torch.equal(found, expected[:, :, rows.start : rows.stop])
