"""Entries at an index that is a tensor without axes, ``x[:, i]``, which plain PyTorch reads as a number."""

from __future__ import annotations

import time

import pytest
import torch
from operator_cases import SHAPE, TILE, WIDTH, after_convolution, assert_streams, by_name
from torch import Tensor, nn

from streamcnn import StreamingModel, UnsupportedModel


class Indexing(nn.Module):
    """Weights to take entries of, and indices: one in a buffer, and one that the image decides."""

    order: Tensor

    def __init__(self, *, is_guarded: bool = True) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.linspace(-1, 2, 5 * WIDTH).reshape(5, WIDTH, 1, 1))
        self.register_buffer("order", torch.tensor(-2))
        self.is_guarded = is_guarded

    def forward(self, x: Tensor) -> Tensor:
        if not self.is_guarded:
            time.perf_counter()  # Dynamo does not follow it.
        return self.taken(x, x.mean((0, 2, 3)).argmax())

    def taken(self, x: Tensor, i: Tensor) -> Tensor:
        return x * self.weight[i % 5] * self.weight[self.order] * self.weight[torch.tensor(1)]


class OfMap(Indexing):
    def taken(self, x: Tensor, i: Tensor) -> Tensor:
        return x[:, i].sin() * x[:, self.order] + x[:, (i - WIDTH).int()].cos()


class AmongOthers(Indexing):
    def taken(self, x: Tensor, i: Tensor) -> Tensor:
        first = x[None, ..., i, 2:, :].sin() * x[torch.tensor([-1, 0]), i % 3, :-2]
        chosen = self.weight[i % 5, torch.tensor([True, False, True, False, False, False]), None]
        return first.squeeze(0).squeeze(0).mean(0) * chosen.sum() * self.weight[[0, 4], i, :, 0].sum()


class Written(Indexing):
    """Assigned to, as a whole and in part, and changed through a view after the index has changed."""

    def taken(self, x: Tensor, i: Tensor) -> Tensor:
        y, weight = x * 2, self.weight * 1
        weight[i % 5] = x.mean((0, 2, 3))[:, None, None]
        y[:, i] = x[:, 0].sin()
        view = y[:, :, 3:9][:, i]
        i.sub_(1)
        view[:, 1:].mul_(x.mean())
        y[:, i, 2:] += 1
        return y * weight.sum(0)


class OfTokens(Indexing):
    """A token of all."""

    def taken(self, x: Tensor, i: Tensor) -> Tensor:
        tokens = x.flatten(2).transpose(1, 2)
        class_token = tokens.mean(1, keepdim=True)
        return tokens[:, i + 20] * torch.cat((class_token, tokens), 1).sin()[:, 0]


class Numbers(Indexing):
    """Other indices: alone, as they are, and in a tuple."""

    def taken(self, x: Tensor, i: Tensor) -> Tensor:
        weight = self.weight[1][None] * self.weight[[0, 2]][-1] + self.weight[:, None][...][1:][0][0]
        return x[:, [0, 1]].mean(1, keepdim=True) * weight[0] * torch.arange(1, WIDTH + 1)[:, None, None]


CASES = {each.__name__: each for each in (Indexing, OfMap, AmongOthers, Written, OfTokens, Numbers)}


@pytest.mark.parametrize("is_guarded", [True, False], ids=["guarded", "anew"])
@by_name(CASES)
def test_entries_at_a_tensor(case: type[Indexing], is_guarded: bool) -> None:
    assert_streams(case(is_guarded=is_guarded), resident=False)
    model = StreamingModel(after_convolution(case(is_guarded=is_guarded)), tile=TILE)
    model(torch.randn(SHAPE))
    assert bool(model._call._guarded.count) is is_guarded


class Beyond(Indexing):
    def taken(self, x: Tensor, i: Tensor) -> Tensor:
        return x * self.weight[i + 5]


@pytest.mark.parametrize("is_guarded", [True, False], ids=["guarded", "anew"])
def test_an_index_out_of_bounds(is_guarded: bool) -> None:
    model = StreamingModel(after_convolution(Beyond(is_guarded=is_guarded)), tile=TILE)
    with pytest.raises(IndexError, match=r"index \d+ is out of bounds for 5 positions"):
        model(torch.randn(SHAPE))


class Byte(Indexing):
    """A mask, to plain PyTorch, whose shape depends on its value."""

    def taken(self, x: Tensor, i: Tensor) -> Tensor:
        return x[(i >= 0).to(torch.uint8)]


def test_a_byte_is_a_mask() -> None:
    with pytest.raises(UnsupportedModel, match="it reads a value of a tensor"):
        StreamingModel(after_convolution(Byte()), tile=TILE)(torch.randn(SHAPE))
