"""Attention whose weights are dropped in part: the mask is the same for any tiles and on whole maps."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from helpers import assert_streamed_equals_plain
from operator_cases import WIDTH, after_convolution, by_name
from torch import Tensor, nn
from torch.nn import functional as F

from streamcnn import StreamingModel

IMAGE = (2, 3, 20, 16)
HEADS = 2
CERTAIN = 1e-12
"""A probability with which nothing is dropped, although plain PyTorch draws."""


def heads(x: Tensor) -> Tensor:
    return x.unflatten(2, (HEADS, -1)).transpose(1, 2)


def merged(x: Tensor) -> Tensor:
    return x.transpose(1, 2).flatten(2)


class Attending(nn.Module):
    """All tokens to all, by PyTorch's operator."""

    def __init__(self, probability: float = 0.3) -> None:
        super().__init__()
        self.qkv, self.token = nn.Linear(WIDTH, 3 * WIDTH), nn.Parameter(torch.randn(1, 1, WIDTH))
        self.probability = probability

    def tokens(self, x: Tensor) -> Tensor:
        return x.flatten(2).transpose(1, 2)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.tokens(x)
        q, k, v = map(heads, self.qkv(tokens).chunk(3, -1))
        return tokens + merged(self.mix(q, k, v))

    def mix(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, dropout_p=self.probability)


class ByHand(Attending):
    def mix(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.dropout((q @ k.mT * 0.4).softmax(-1), self.probability) @ v


class WithClassToken(Attending):
    def tokens(self, x: Tensor) -> Tensor:
        tokens = torch.cat((self.token.expand(len(x), -1, -1), super().tokens(x)), 1)
        return F.dropout(tokens, self.probability)


class Windows(Attending):
    def tokens(self, x: Tensor) -> Tensor:
        n, c, h, w = x.shape
        return x.reshape(n, c, h // 4, 4, w // 4, 4).permute(0, 2, 4, 3, 5, 1).reshape(-1, 16, c)


class Rows(Attending):
    def tokens(self, x: Tensor) -> Tensor:
        return x.permute(0, 2, 3, 1).flatten(0, 1)


class Pooling(Attending):
    """One query of its own to all tokens."""

    def forward(self, x: Tensor) -> Tensor:
        _, k, v = map(heads, self.qkv(self.tokens(x)).chunk(3, -1))
        return merged(self.mix(heads(self.token.expand(len(x), -1, -1)), k, v))


class Hidden(Attending):
    """Keys that are hidden from all, and queries from which all are."""

    def mix(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        places = torch.arange(k.shape[-2])
        shown = (places % 3 != 0) & (places[:, None] % 5 != 0)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=shown, dropout_p=self.probability)


class Biased(Attending):
    """Added scores, some of them minus infinity."""

    def mix(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        bias = torch.linspace(-1, 1, k.shape[-2]).to(q)
        bias = bias.masked_fill(bias < -0.7, -math.inf).expand(q.shape[-2], -1)
        return F.scaled_dot_product_attention(q, k, v, bias, dropout_p=self.probability, scale=0.3)


class Layer(nn.Module):
    """PyTorch's own, whose attention returns its weights or not."""

    def __init__(self, probability: float = 0.3) -> None:
        super().__init__()
        options: dict[str, Any] = {"dropout": probability, "batch_first": True}
        self.layer = nn.TransformerEncoderLayer(WIDTH, HEADS, 8, **options)
        self.attention = nn.MultiheadAttention(WIDTH, HEADS, **options)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.layer(x.flatten(2).transpose(1, 2))
        return self.attention(tokens, tokens.sin(), tokens.cos())[0]


CASES = {
    each.__name__: each
    for each in (Attending, ByHand, WithClassToken, Windows, Rows, Pooling, Hidden, Biased, Layer)
}


@by_name(CASES)
def test_attention_that_drops_nothing_is_plain_pytorchs(case: Any) -> None:
    torch.manual_seed(0)
    net = after_convolution(case(CERTAIN))
    assert_streamed_equals_plain(net, IMAGE, tile=(8, 7), resident=False)
    assert_streamed_equals_plain(net.eval(), (1, *IMAGE[1:]), tile=(8, 7), resident=False)


def _run(net: nn.Module, image: Tensor, tile: int | None) -> tuple[Tensor, ...]:
    """Output, the next random number and gradients; on whole maps where there is no tile."""
    model = StreamingModel(net, "8GiB") if tile is None else StreamingModel(net, tile=tile)
    model.resident_tail = tile is None
    leaf = image.clone().requires_grad_()
    torch.manual_seed(3)
    output = model(leaf)
    after = torch.rand(1)
    leaves = [leaf, *(p for name, p in net.named_parameters() if "token" not in name)]
    return output.detach(), after, *torch.autograd.grad(output.square().sum(), leaves)


@by_name(CASES)
def test_the_mask_is_the_same_for_any_tiles_and_on_whole_maps(case: Any) -> None:
    torch.manual_seed(0)
    net = after_convolution(case()).double()
    image = torch.randn(IMAGE, dtype=torch.float64)
    first = _run(net, image, 8)
    for tile in (5, None):
        torch.testing.assert_close(_run(net, image, tile), first, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("probability", [0.2, 0.7])
def test_weights_are_dropped_at_their_rate(probability: float) -> None:
    """With equal scores and values of one, each result tells how many weights were kept."""

    class Counting(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            q, ones = x.flatten(2).transpose(1, 2) * 0, x.new_ones(2, 320, 3)
            return F.scaled_dot_product_attention(q, q, ones, dropout_p=probability)

    model = StreamingModel(Counting(), tile=6)
    model.resident_tail = False
    kept = model(torch.randn(IMAGE, dtype=torch.float64)) * (1 - probability)
    assert kept.std() > 0
    deviation = (probability * (1 - probability) / (2 * 320 * 320)) ** 0.5
    assert abs(float(kept.mean()) - (1 - probability)) < 4 * deviation
