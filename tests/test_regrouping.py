"""Reshapes that split and merge spatial axes: space to depth, depth to space, patches, however spelled."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from einops import rearrange
from helpers import assert_streamed_equals_plain, required
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from streamcnn.geometry.axis_maps import Repeated, Same, Sliding
from streamcnn.geometry.regions import Interval, Region
from streamcnn.geometry.windows import crop, with_extents
from streamcnn.graph.ops.shape import moved_axes, regrouped

Function = Callable[[Tensor], Tensor]


class Applied(nn.Module):
    """A function of a map as a module."""

    def __init__(self, function: Function) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


def to_depth(x: Tensor, rows: int, cols: int) -> Tensor:
    """Space to depth as TResNet has it."""
    n, c, h, w = x.shape
    x = x.view(n, c, h // rows, rows, w // cols, cols).permute(0, 3, 5, 1, 2, 4).contiguous()
    return x.view(n, c * rows * cols, h // rows, w // cols)


def to_space(x: Tensor, rows: int, cols: int) -> Tensor:
    """Depth to space, its inverse."""
    n, c, h, w = x.shape
    x = x.view(n, rows, cols, c // (rows * cols), h, w).permute(0, 3, 4, 1, 5, 2).contiguous()
    return x.view(n, c // (rows * cols), h * rows, w * cols)


def patch_merging(x: Tensor) -> Tensor:
    """Patch merging of a map with channels last."""
    x = x.permute(0, 2, 3, 1)
    n, h, w, c = x.shape
    x = x.reshape(n, h // 2, 2, w // 2, 2, c).permute(0, 1, 3, 4, 2, 5).flatten(3)
    return x.permute(0, 3, 1, 2)


def unflattened(x: Tensor) -> Tensor:
    """Space to depth by ``unflatten`` and ``flatten``."""
    x = x.unflatten(2, (-1, 2)).unflatten(4, (-1, 3)).permute(0, 1, 3, 5, 2, 4)
    return x.flatten(1, 3)


def round_trip(x: Tensor) -> Tensor:
    """Split, work in blocks, and merge again, the blocks never being channels."""
    n, c, h, w = x.shape
    x = x.reshape(n, c, h // 3, 3, w // 2, 2)
    return (x * x.softmax(3).cumsum(5)).reshape(n, c, h, w)


def within_blocks(x: Tensor) -> Tensor:
    """Space to depth with the blocks' axes kept apart and reduced."""
    n, c, h, w = x.shape
    return x.view(n, c, h // 2, 2, w // 2, 2).amax((3, 5))


STREAMED: dict[str, tuple[Function, tuple[int, int], int]] = {
    "to depth": (lambda x: to_depth(x, 2, 2), (22, 18), 24),
    "to depth, two factors": (lambda x: to_depth(x, 3, 2), (21, 16), 36),
    "to depth, rows alone": (lambda x: to_depth(x, 4, 1), (20, 17), 24),
    "to depth, columns alone": (lambda x: to_depth(x, 1, 5), (21, 15), 30),
    "to depth, extents that coincide": (lambda x: to_depth(x, 4, 4), (16, 16), 96),
    "to depth, a square of channels": (lambda x: to_depth(x, 6, 6), (36, 36), 216),
    "to space": (lambda x: to_space(x, 1, 2), (11, 9), 3),
    "to space, two factors": (lambda x: to_space(x, 2, 3), (11, 9), 1),
    "to space, extents that coincide": (lambda x: to_space(x, 3, 2), (6, 6), 1),
    "patch merging": (patch_merging, (22, 18), 24),
    "unflatten": (unflattened, (22, 18), 36),
    "there and back": (round_trip, (21, 16), 6),
    "to depth and to space": (lambda x: to_space(to_depth(x, 2, 3).sin(), 2, 3), (22, 18), 6),
    "within blocks": (within_blocks, (22, 18), 6),
    "einops, to depth": (
        lambda x: rearrange(x, "b c (h p) (w q) -> b (p q c) h w", p=2, q=3),
        (22, 18),
        36,
    ),
    "einops, to space": (
        lambda x: rearrange(x, "b (c p q) h w -> b c (h p) (w q)", p=2, q=3),
        (11, 9),
        1,
    ),
    "einops, channels last": (
        lambda x: rearrange(x, "b c (h p) (w q) -> b h w (p q c)", p=2, q=2).movedim(-1, 1),
        (22, 18),
        24,
    ),
    "slices": (
        lambda x: torch.cat((x[..., ::2, ::2], x[..., 1::2, ::2], x[..., ::2, 1::2], x[..., 1::2, 1::2]), 1),
        (22, 18),
        24,
    ),
}

RESIDENT: dict[str, tuple[Function, tuple[int, int], int]] = {
    "tokens": (
        lambda x: rearrange(x, "b c h w -> b (h w) c").sin().movedim(1, -1).unflatten(2, (11, 9)),
        (11, 9),
        6,
    ),
    "windows in the batch": (
        lambda x: rearrange(x, "b c (h p) (w q) -> (b h w) c p q", p=11, q=9),
        (22, 18),
        6,
    ),
    "split the other way": (
        lambda x: rearrange(x, "b c (p h) (q w) -> b (p q c) h w", p=2, q=2),
        (22, 18),
        24,
    ),
    "rows into channels": (lambda x: x.reshape(x.shape[0], -1, 7, x.shape[3]), (21, 9), 18),
    "uneven": (lambda x: x.reshape(x.shape[0], 6, 8, 6, 9), (12, 36), 6),
}


Case = tuple[Function, tuple[int, int], int]
"""A function, the extents of the map that it is given, and the channels of what it gives."""


def _check(case: Case, tile: tuple[int, int], *, resident: bool | None) -> None:
    function, size, channels = case
    last: nn.Module = nn.Conv2d(channels, 2, 3, padding=1) if resident is False else nn.Tanh()
    net = nn.Sequential(nn.Conv2d(3, 6, 3, padding=1), Applied(function), last)
    assert_streamed_equals_plain(net, (2, 3, *size), tile=tile, resident=resident)


@pytest.mark.parametrize("tile", [(5, 7), (4, 3)], ids=str)
@pytest.mark.parametrize("case", STREAMED.values(), ids=STREAMED.keys())
def test_regrouping_streams(case: Case, tile: tuple[int, int]) -> None:
    _check(case, tile, resident=False)


@pytest.mark.parametrize("case", RESIDENT.values(), ids=RESIDENT.keys())
def test_other_regrouping_is_exact(case: Case) -> None:
    _check(case, (8, 7), resident=None)


# --- the rule itself, against whole tensors -----------------------------------------------------------


@st.composite
def reshapes(draw: st.DrawFn) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, int]]:
    """A shape, another grouping of the same elements, and two axes of the first."""
    factors = draw(st.lists(st.integers(1, 4), min_size=2, max_size=7))

    def grouped() -> tuple[int, ...]:
        shape = [1]
        for factor in factors:
            if draw(st.booleans()):
                shape.append(factor)
            else:
                shape[-1] *= factor
        return tuple(shape)

    before, after = grouped(), grouped()
    if len(before) < 2:
        before = (*before, 1)
    axes = draw(st.permutations(range(len(before))))[:2]
    return before, after, (axes[0], axes[1])


@settings(max_examples=300, deadline=None)
@given(reshapes(), st.data())
def test_a_tile_is_reshaped_like_the_whole(
    case: tuple[tuple[int, ...], tuple[int, ...], tuple[int, int]], data: st.DataObject
) -> None:
    before, after, axes = case
    moves = moved_axes(before, after, axes)
    if moves is None:
        return
    whole = torch.arange(math.prod(before)).reshape(before)
    places = (moves[0].place, moves[1].place)
    assert places[0] != places[1]
    intervals = []
    for move in moves:
        start = data.draw(st.integers(0, move.result - 1))
        intervals.append(Interval(start, data.draw(st.integers(start + 1, move.result))))
    out = Region(*intervals)
    sizes = [move.size for move in moves]
    part = Region(*(required(m.access, i, n) for m, i, n in zip(moves, out, sizes, strict=True)))
    at_hand = crop(whole, axes, Region.whole((sizes[0], sizes[1])), part)
    found = regrouped(at_hand, after, moves)
    covered = Region(*(m.access.result(p, i) for m, p, i in zip(moves, part, out, strict=True)))
    assert covered.contains(out)
    assert tuple(found.shape) == with_extents(after, places, covered.size)
    whole_after = Region.whole((after[places[0]], after[places[1]]))
    expected = crop(whole.reshape(after), places, whole_after, out)
    assert torch.equal(crop(found, places, covered, out), expected)


@pytest.mark.parametrize(
    ("before", "after", "links"),
    [
        ((2, 4, 6, 9), (2, 4, 6, 9), (Same(), Same())),
        ((2, 4, 6, 9), (2, 2, 2, 6, 9, 1), (Same(), Same())),
        ((2, 4, 6, 9), (2, 4, 3, 2, 3, 3), (Sliding(2, 2), Sliding(3, 3))),
        ((2, 4, 6, 9), (8, 2, 3, 9), (Sliding(3, 3), Same())),
        ((2, 4, 4, 4), (2, 4, 1, 4, 4), (Same(), Same())),
        ((2, 4, 6, 9), (2, 4, 54), None),
        ((2, 4, 6, 9), (2, 24, 9), None),
        ((2, 4, 6, 9), (2, 4, 3, 3, 6), None),
        ((2, 4, 6, 9), (2, 4, 3, 18), None),
    ],
)
def test_links(before: tuple[int, ...], after: tuple[int, ...], links: tuple[object, object] | None) -> None:
    moves = moved_axes(before, after, (2, 3))
    assert (None if moves is None else tuple(move.access for move in moves)) == links


def test_merging_repeats() -> None:
    moves = moved_axes((2, 6, 3, 9, 2), (2, 18, 18), (1, 3))
    assert moves is not None
    assert [move.access for move in moves] == [Repeated(3), Repeated(2)]
