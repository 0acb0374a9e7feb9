"""A few tokens of a map by their indices: those with the largest scores (CLAM, DSMIL), or given ones."""

from __future__ import annotations

import math

import pytest
import torch
from operator_cases import SHAPE, TILE, WIDTH, Function, after_convolution, assert_streams, by_name
from torch import Tensor
from torch.nn import functional as F

from streamcnn import StreamingModel


def tokens(x: Tensor) -> Tensor:
    return x.flatten(2).transpose(1, 2)


def best(x: Tensor, count: int = 3) -> Tensor:
    """Indices (N, count) of the positions with the largest means."""
    return x.mean(1).flatten(1).topk(count, 1)[1]


def critical_instances(x: Tensor) -> Tensor:
    """The tokens with the largest scores of each class, of which one may be two classes' (DSMIL)."""
    bag = x.permute(0, 2, 3, 1).reshape(-1, WIDTH)
    order = bag[:, [0, 1, 0]].sort(0, descending=True)[1]
    return bag.sin().index_select(0, order[0])


def best_and_worst(x: Tensor) -> Tensor:
    """The bag's instances by their attention (CLAM)."""
    bag, scores = tokens(x)[0].cos(), x[0].mean(0).flatten()
    both = [scores.topk(2)[1], scores.neg().topk(2)[1]]
    return bag.index_select(0, torch.cat(both)) * bag[both[0].view(2, 1)].sum()


def hidden(x: Tensor) -> Tensor:
    """Scores, some of them minus infinity."""
    scores = x.mean(1).flatten(1)
    scores = scores.masked_fill(torch.arange(scores.shape[1]) % 2 == 0, -math.inf)
    return scores.gather(1, torch.tensor([[1, 4, 3]] * len(x))).exp()


def every_head(x: Tensor) -> Tensor:
    """Other tokens of each head, of a map with channels last."""
    heads = x.permute(0, 2, 3, 1).flatten(1, 2).unflatten(2, (2, -1)).transpose(1, 2)
    index = heads.mean(3).topk(4, 2)[1]
    return heads.gather(2, index[..., None].expand(-1, -1, -1, WIDTH // 2)).sin()


CASES: dict[str, Function] = {
    "of tokens": lambda x: tokens(x).gather(1, best(x)[..., None].expand(-1, -1, WIDTH)).sin(),
    "of positions": lambda x: x.flatten(2).sin().gather(2, best(x)[:, None].expand(-1, WIDTH, -1)),
    "those pooled": lambda x: x.flatten(2).gather(
        2, F.adaptive_max_pool2d(x.sin(), 2, return_indices=True)[1].flatten(2)
    ),
    "given ones, from the end and twice": lambda x: tokens(x)[:, torch.tensor([[3, -1], [7, 3]])].cos(),
    "of each image its own": lambda x: tokens(x)[torch.arange(len(x))[:, None], best(x)].sin(),
    "of each image its own, behind channels": lambda x: x.flatten(2)[
        torch.arange(len(x))[:, None], :, best(x)
    ],
    "of another image": lambda x: tokens(x)[torch.arange(len(x)).flip(0)[:, None], best(x)].cos(),
    "one channel of each": lambda x: x.flatten(2)[:, torch.tensor([1, 4, 1]), best(x)[0]].sin(),
    "along an axis": lambda x: torch.take_along_dim(tokens(x), best(x)[..., None], 1).sin(),
    "channels along an axis": lambda x: torch.take_along_dim(x.sin(), x.argmax(1, keepdim=True), 1) * x,
    "best and worst": best_and_worst,
    "hidden scores": hidden,
    "every head": every_head,
    "whole numbers": lambda x: x.mean() * (100 * x).long().flatten(2)[..., best(x)[0]],
}


@by_name(CASES)
def test_values_at_indices(case: Function) -> None:
    assert_streams(case, (1, 3, 14, 22), resident=False)
    if case is not best_and_worst:
        assert_streams(case, resident=False)


def lines(x: Tensor) -> tuple[Tensor, ...]:
    """Rows and columns in another order, some of them twice, and one that the image decides."""
    rows = torch.arange(x.shape[2]).flip(0).roll(3)
    cols = (torch.arange(2 * x.shape[3]) * 5) % x.shape[3]
    both = x[:, :, rows].cos()[..., cols][..., 2 : 2 + x.shape[3]]
    best = x.mean((0, 2, 3)).argmax()
    ends = x[:, :, torch.tensor([3, -1, 3])].mean((2, 3))
    return x[:, :, rows] * x + both, x.index_select(3, cols[:4]).sin(), x[:, :, best] * ends[..., None]


def test_rows_and_columns_at_indices() -> None:
    assert_streams(lines, resident=False)
    assert_streams(lines, (1, 3, 14, 22), resident=False)


def test_only_scores_are_whole_where_they_are_sorted() -> None:
    assert_streams(critical_instances, (1, 3, 14, 22), resident=True)
    net = after_convolution(critical_instances)
    (resident,) = StreamingModel(net, tile=TILE).plan((1, 3, 14, 22)).residents
    assert "sort" in resident


@pytest.mark.parametrize("place", [-400, 400])
def test_an_index_out_of_bounds(place: int) -> None:
    model = StreamingModel(after_convolution(lambda x: tokens(x)[:, torch.tensor([0, place])]), tile=TILE)
    with pytest.raises(IndexError, match=r"index -?\d+ is out of bounds for \d+ positions"):
        model(torch.randn(SHAPE))
