"""Merged axes of space: tokens, windows, attention, and back to maps."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from helpers import assert_streamed_equals_plain, traced
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from streamcnn.capture.lowering.folded_shapes import regrouping
from streamcnn.capture.lowering.folding import Folded
from streamcnn.graph.program import Ref, on_whole_maps

DIM, HEADS, WINDOW = 8, 2, 4


class Tokens(nn.Module):
    """Tokens through ``mix`` and back to a map."""

    def mix(self, tokens: Tensor, shape: torch.Size) -> Tensor:
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        return self.mix(x.flatten(2).transpose(1, 2), x.shape).transpose(1, 2).reshape(x.shape)


class Mlp(Tokens):
    """As in MLPs of transformers: a norm, two layers, a residual."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.first, self.last = nn.LayerNorm(DIM), nn.Linear(DIM, 12), nn.Linear(12, DIM)

    def mix(self, tokens: Tensor, shape: torch.Size) -> Tensor:
        return tokens + self.last(F.gelu(self.first(self.norm(tokens))))


class DepthwiseMlp(Mlp):
    """A depthwise convolution in the middle, as in PVTv2 and Segformer."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(12, 12, 3, padding=1, groups=12)

    def mix(self, tokens: Tensor, shape: torch.Size) -> Tensor:
        y = self.first(self.norm(tokens)).transpose(1, 2).view(shape[0], 12, *shape[2:])
        return tokens + self.last(F.gelu(self.conv(y).flatten(2).transpose(1, 2)))


class Attention(Tokens):
    """Queries, keys and values of all tokens, in one of the ways in which it is written."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.qkv, self.last = nn.Linear(DIM, 3 * DIM), nn.Linear(DIM, DIM)
        if kind == "biased":
            self.bias = nn.Parameter(torch.randn(HEADS, 24 * 20, 24 * 20))

    def mix(self, tokens: Tensor, shape: torch.Size) -> Tensor:
        n, count, _ = tokens.shape
        q, k, v = self.qkv(tokens).reshape(n, count, 3, HEADS, -1).permute(2, 0, 3, 1, 4).unbind(0)
        if self.kind == "products":
            y = (q * 0.3 @ k.transpose(-2, -1)).softmax(-1) @ v
        elif self.kind == "linear":
            y = q @ (F.normalize(k, dim=-2).transpose(-2, -1) @ v)
        elif self.kind == "channels":
            y = ((F.normalize(q, dim=-2).transpose(-2, -1) @ k).softmax(-1) @ v.transpose(-2, -1)).mT
        else:
            y = F.scaled_dot_product_attention(q, k, v, getattr(self, "bias", None))
        return tokens + self.last(y.transpose(1, 2).reshape(n, count, DIM))


class PooledKeys(Tokens):
    """Keys and values of a coarser map, as in PVTv2 and Segformer."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.last = nn.Linear(DIM, DIM, bias=False), nn.Linear(DIM, DIM)
        self.pool = nn.Conv2d(DIM, 2 * DIM, 4, 4)

    def mix(self, tokens: Tensor, shape: torch.Size) -> Tensor:
        n, count, _ = tokens.shape
        q = self.query(tokens).reshape(n, count, HEADS, -1).permute(0, 2, 1, 3)
        kv = self.pool(tokens.transpose(1, 2).reshape(shape)).flatten(2).transpose(1, 2)
        k, v = kv.reshape(n, -1, 2, HEADS, DIM // HEADS).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(q, k, v)
        return tokens + self.last(y.transpose(1, 2).reshape(n, count, DIM))


class Windows(nn.Module):
    """Attention within windows, as in Swin, with a bias for each pair of positions."""

    def __init__(self, *, fused: bool) -> None:
        super().__init__()
        self.fused = fused
        self.qkv, self.last = nn.Linear(DIM, 3 * DIM), nn.Linear(DIM, DIM)
        self.bias = nn.Parameter(torch.randn(HEADS, WINDOW**2, WINDOW**2))

    def forward(self, x: Tensor) -> Tensor:
        n, c, h, w = x.shape
        x = x.permute(0, 2, 3, 1)
        y = x.view(n, h // WINDOW, WINDOW, w // WINDOW, WINDOW, c).transpose(2, 3).contiguous()
        y = y.view(-1, WINDOW, WINDOW, c).view(-1, WINDOW**2, c)
        q, k, v = self.qkv(y).reshape(-1, WINDOW**2, 3, HEADS, c // HEADS).permute(2, 0, 3, 1, 4)
        if self.fused:
            y = F.scaled_dot_product_attention(q, k, v, self.bias)
        else:
            y = (q @ k.mT + self.bias.unsqueeze(0)).softmax(-1) @ v
        y = self.last(y.transpose(1, 2).flatten(2))
        y = y.view(n, h // WINDOW, w // WINDOW, WINDOW, WINDOW, c).transpose(2, 3).reshape(x.shape)
        return (x + y).permute(0, 3, 1, 2)


class Patches(nn.Module):
    """Attention among the same places of all patches, as in MobileViT."""

    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Linear(DIM, DIM)
        self.norm = nn.LayerNorm(DIM)

    def forward(self, x: Tensor) -> Tensor:
        n, c, h, w = x.shape
        rows, cols = h // 2, w // 2
        y = x.reshape(n * c * rows, 2, cols, 2).transpose(1, 2).reshape(n, c, rows * cols, 4)
        y = self.mix(self.norm(y.transpose(1, 3).reshape(n * 4, rows * cols, c)))
        y = y.view(n, 4, rows * cols, c).transpose(1, 3).reshape(n * c * rows, cols, 2, 2)
        return x * y.transpose(1, 2).reshape(n, c, h, w)


class NormalisedTokens(Tokens):
    """Batch norm of (N * H * W, C) as in LeViT, of (N, C, H * W), and statistics of tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.BatchNorm1d(DIM), nn.BatchNorm1d(DIM)

    def mix(self, tokens: Tensor, shape: torch.Size) -> Tensor:
        flat = tokens.flatten(0, 1)
        y = torch.sigmoid(self.first(flat)).reshape_as(tokens)
        y = y * self.last(tokens.transpose(1, 2).sin()).transpose(1, 2)
        y = y + tokens.mean(1, keepdim=True) * tokens.amax((1, 2), keepdim=True)
        first, second = torch.cat((y, tokens * y.mean(-1, keepdim=True)), -1).chunk(2, -1)
        return first[:, :] - torch.stack((second, first), 1).softmax(3)[:, 0]


KINDS: dict[str, Any] = {
    "MLP": Mlp,
    "depthwise MLP": DepthwiseMlp,
    **{f"{kind} attention": lambda kind=kind: Attention(kind) for kind in ("products", "fused", "biased")},
    **{f"{kind} attention": lambda kind=kind: Attention(kind) for kind in ("linear", "channels")},
    "pooled keys": PooledKeys,
    "windows": lambda: Windows(fused=False),
    "fused windows": lambda: Windows(fused=True),
    "patches": Patches,
    "normalised tokens": NormalisedTokens,
}
WHOLE = ("products attention", "fused attention", "biased attention", "pooled keys")
"""Those whose keys and values are whole."""


def network(kind: str) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, DIM, 3, 2, 1), KINDS[kind](), nn.Conv2d(DIM, 4, 3), nn.Flatten(2))


@pytest.mark.parametrize("num_images", [1, 2])
@pytest.mark.parametrize("kind", KINDS)
def test_merged_axes_are_streamed_and_exact(kind: str, num_images: int) -> None:
    shape = (num_images, 3, 48, 40)
    net = nn.Sequential(network(kind)[:3], nn.AdaptiveAvgPool2d(1))
    program, _ = traced(net, shape)
    assert program.residents == ()
    assert (kind in WHOLE) == bool(on_whole_maps(program))
    assert_streamed_equals_plain(net, shape, tile=6, resident=False)


@pytest.mark.parametrize("kind", ["MLP", "windows"])
def test_an_output_with_merged_axes(kind: str) -> None:
    net = nn.Sequential(network(kind)[:2], nn.Flatten(2))
    assert_streamed_equals_plain(net, (2, 3, 48, 40), tile=6)


class ClassToken(Tokens):
    """A token of no position beside the others."""

    def __init__(self) -> None:
        super().__init__()
        self.token, self.mlp = nn.Parameter(torch.randn(1, 1, DIM)), Mlp()

    def mix(self, tokens: Tensor, shape: torch.Size) -> Tensor:
        joined = torch.cat((self.token.expand(len(tokens), -1, -1), tokens), 1)
        return self.mlp.mix(joined, shape)[:, 1:]


def test_a_class_token_among_them() -> None:
    net = nn.Sequential(
        nn.Conv2d(3, DIM, 3, 2, 1), ClassToken(), nn.Conv2d(DIM, 4, 3), nn.AdaptiveAvgPool2d(1)
    )
    assert_streamed_equals_plain(net, (2, 3, 30, 26), tile=6)


class Mixed(Tokens):
    """Tokens beside a map of the same shape."""

    def mix(self, tokens: Tensor, shape: torch.Size) -> Tensor:
        # Of (N, H * W, C) and (N, C, H, W), which broadcast where N * C is H * W's extent by chance.
        other = tokens.transpose(1, 2).reshape(shape).sin()
        return (tokens.unsqueeze(1) + other.mean(1, keepdim=True).flatten(2)[..., None]).squeeze(1)


def test_operands_that_are_merged_differently() -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 3), Mixed(), nn.Conv2d(4, 3, 3), nn.AdaptiveAvgPool2d(1))
    assert_streamed_equals_plain(net, (1, 3, 14, 12), tile=5, resident=None)


EXTENTS = st.integers(1, 4)


@given(st.lists(EXTENTS, min_size=2, max_size=6), st.data())
def test_a_regrouping_gives_the_shape_and_keeps_space(before: list[int], data: st.DataObject) -> None:
    rows = data.draw(st.integers(0, len(before) - 2))
    cols = data.draw(st.integers(rows + 1, len(before) - 1))
    after = data.draw(groupings(before))
    found = regrouping(before, (rows, cols), after)
    if found is None:
        return
    extents, runs = found
    assert math.prod(extents) == math.prod(before)
    assert Folded(Ref("x"), runs).seen(extents) == tuple(after)
    assert sum(runs) == len(extents)


@st.composite
def groupings(draw: st.DrawFn, before: list[int]) -> list[int]:
    """Other shapes of as many elements: axes cut and merged, and axes of one position put in."""
    after: list[int] = []
    cuts = [draw(st.sampled_from([k for k in range(1, extent + 1) if extent % k == 0])) for extent in before]
    parts = (part for whole, cut in zip(before, cuts, strict=True) for part in (whole // cut, cut))
    for extent in parts:
        if after and draw(st.booleans()):
            after[-1] *= extent
        else:
            after.append(extent)
        if draw(st.integers(0, 5)) == 0:
            after.append(1)
    return after


def test_regroupings() -> None:
    tokens = regrouping((2, 5, 7, 3), (1, 2), (2, 35, 3))
    assert tokens == ((2, 5, 7, 3), (1, 2, 1))
    heads = regrouping((2, 5, 7, 12), (1, 2), (2, 35, 3, 2, 2))
    assert heads == ((2, 5, 7, 3, 2, 2), (1, 2, 1, 1, 1))
    windows = regrouping((2, 5, 7, 4, 4, 3), (1, 2), (70, 16, 3))
    assert windows == ((2, 5, 7, 16, 3), (3, 1, 1))
    assert regrouping((2, 5, 7, 16, 3), (1, 2), (2, 5, 7, 4, 4, 3)) == ((2, 5, 7, 4, 4, 3), (1,) * 6)
    # Rows are split into ten of two, and merged with images and channels.
    assert regrouping((2, 3, 20, 8), (2, 3), (60, 2, 8)) == ((2, 3, 10, 2, 8), (3, 1, 1))
    # A row is cut in the middle, and half of it joined with the one before.
    assert regrouping((2, 3, 4, 6), (2, 3), (2, 3, 8, 3)) is None
