"""Overwriting part of a tensor with another part of it: refused where the parts overlap."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from helpers import assert_streamed_equals_plain
from hypothesis import given
from hypothesis import strategies as st
from operator_cases import after_convolution, by_name
from torch import Tensor

from streamcnn import StreamingModel, UnsupportedModel
from streamcnn.capture.flat.overlaps import overlap_in_part

SHAPE = (1, 3, 20, 24)


@st.composite
def views(draw: st.DrawFn, base: Tensor) -> Tensor:
    """A range, with a step, of each axis of ``base``."""
    for axis, extent in enumerate(base.shape):
        start = draw(st.integers(0, extent - 1))
        stop = draw(st.integers(start + 1, extent))
        base = base.narrow(axis, start, stop - start)
    step = draw(st.sampled_from([1, 1, 2]))
    return base[..., ::step]


@given(st.lists(st.integers(1, 4), min_size=1, max_size=4), st.data())
def test_views_overlap_if_their_elements_do(shape: list[int], data: st.DataObject) -> None:
    base = torch.arange(torch.Size(shape).numel()).reshape(shape)
    if data.draw(st.booleans()):
        base = base.transpose(0, -1)
    written, read = data.draw(views(base)), data.draw(views(base))
    try:
        broadcast = read.expand_as(written)
    except RuntimeError:
        return
    shared = set(written.flatten().tolist()) & set(read.flatten().tolist())
    is_elsewhere = bool(shared) and not torch.equal(written, broadcast)
    alike = all(own == 1 or own == other for own, other in zip(read.shape, written.shape, strict=True))
    certain = alike and all(
        own == 1 or first == second
        for own, first, second in zip(read.shape, read.stride(), written.stride(), strict=True)
    )
    found = overlap_in_part(written, read)
    assert not found or is_elsewhere
    if certain:
        assert found == is_elsewhere


def shifted(x: Tensor) -> Tensor:
    """The shift of rows in S2-MLP as it is published."""
    x = x.permute(0, 2, 3, 1).contiguous()
    x[:, 1:, :, :2] = x[:, :-1, :, :2]
    return x.permute(0, 3, 1, 2).sin()


def _added(x: Tensor) -> Tensor:
    x = x * 1
    x[:, :, :, 1:] += x[:, :, :, :-1]
    return x


def _first_added(x: Tensor) -> Tensor:
    x = x * 1
    x += x[:, :1]
    return x


@by_name({"rows are shifted": shifted, "columns are added": _added, "the first channel": _first_added})
def test_overlapping_parts_are_refused(case: Callable[[Tensor], Tensor]) -> None:
    model = StreamingModel(after_convolution(case), tile=8)
    with pytest.raises(UnsupportedModel, match=r"overlapping part \(.*copy these first \(clone\(\)\)"):
        model(torch.randn(SHAPE))


def _halves(x: Tensor) -> Tensor:
    x = x * 1
    x[:, :3] += x[:, 3:]
    x[:, 3:] = x[:, :3]
    return x


def _in_turn(x: Tensor) -> Tensor:
    x = x * 1
    x[:, ::2] += x[:, 1::2]
    x[:, 1:] -= x[:, :1]
    x[:, 2:4].add_(x[:, 2:4])
    return x


def _copied(x: Tensor) -> Tensor:
    x = x * 1
    x[:, :, 1:] = x[:, :, :-1].clone()
    return x


@by_name({"halves": _halves, "every other channel": _in_turn, "a copy": _copied})
def test_other_parts_are_streamed(case: Callable[[Tensor], Tensor]) -> None:
    assert_streamed_equals_plain(after_convolution(case), SHAPE, tile=8, resident=None)
