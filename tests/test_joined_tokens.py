"""Tokens of a map that are joined with class tokens, registers or padding (CoaT, CvT, XCiT, ViT)."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from operator_cases import SHAPE, TILE, WIDTH, Function, after_convolution, assert_streams, by_name
from torch import Tensor, nn
from torch.nn import functional as F

from streamcnn import StreamingModel
from streamcnn.capture.lowering.joined_calls import outermost

HEADS = 2


def heads(x: Tensor) -> Tensor:
    """Tokens (N, L, C) as (N, heads, L, C / heads)."""
    return x.unflatten(2, (HEADS, -1)).transpose(1, 2)


def merged(x: Tensor) -> Tensor:
    return x.transpose(1, 2).flatten(2)


class Tokens(nn.Module):
    """A class token before the tokens of a map, blocks, and both of them at the end."""

    def __init__(self) -> None:
        super().__init__()
        self.token = nn.Parameter(torch.randn(1, 1, WIDTH))
        self.norm = nn.LayerNorm(WIDTH)
        self.qkv, self.last = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        tokens = torch.cat((self.token.expand(len(x), -1, -1), x.flatten(2).transpose(1, 2)), 1)
        tokens = self.block(tokens, x.shape)
        return tokens[:, 1:].transpose(1, 2).reshape(x.shape).sin() + tokens[:, 0][..., None, None]

    def block(self, tokens: Tensor, shape: torch.Size) -> Tensor:
        q, k, v = self.qkv(self.norm(tokens)).chunk(3, -1)
        tokens = tokens + merged(self.mix(heads(q), heads(k), heads(v)))
        return tokens + self.last(F.gelu(tokens))

    def mix(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v)


class Products(Tokens):
    """Attention of all tokens to all, by products (ViT)."""

    def mix(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return (q * 0.3 @ k.transpose(-2, -1)).softmax(-1) @ v


class Hidden(Tokens):
    """The class token is hidden from all."""

    def mix(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        scores = q @ k.transpose(-2, -1)
        hides = torch.arange(scores.shape[-1]) == 0
        return scores.masked_fill(hides, -math.inf).softmax(-1) @ v


class Equations(Tokens):
    """By equations (CvT)."""

    def mix(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        shares = torch.einsum("bhlk,bhtk->bhlt", [q, k]).softmax(-1)
        return torch.einsum("bhlt,bhtv->bhlv", [shares, v])


class Factors(Tokens):
    """Linear attention with convolutions as positional encodings (CoaT)."""

    def __init__(self) -> None:
        super().__init__()
        self.encoding = nn.Conv2d(WIDTH, WIDTH, 3, padding=1, groups=WIDTH)
        self.relative = nn.Conv2d(WIDTH, WIDTH, 3, padding=1, groups=WIDTH)

    def block(self, tokens: Tensor, shape: torch.Size) -> Tensor:
        first, image = tokens[:, :1], tokens[:, 1:].transpose(1, 2).view(shape)
        tokens = torch.cat((first, (self.encoding(image) + image).flatten(2).transpose(1, 2)), 1)
        n, length, c = tokens.shape
        qkv = self.qkv(self.norm(tokens)).reshape(n, length, 3, HEADS, c // HEADS)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        mixed = q @ (k.softmax(2).transpose(-1, -2) @ v)
        values = v[:, :, 1:].transpose(-1, -2).reshape(shape)
        encoded = self.relative(values).reshape(n, HEADS, c // HEADS, -1).transpose(-1, -2)
        mixed = 0.3 * mixed + F.pad(q[:, :, 1:] * encoded, (0, 0, 1, 0, 0, 0))
        tokens = tokens + self.last(mixed.transpose(1, 2).reshape(n, length, c))
        return tokens + self.last(F.gelu(tokens))


class ClassAttention(Tokens):
    """Only the class token attends (CaiT, XCiT)."""

    def block(self, tokens: Tensor, shape: torch.Size) -> Tensor:
        normed = self.norm(tokens)
        q = heads(self.last(normed[:, 0]).unsqueeze(1))
        k, v = (heads(each) for each in self.qkv(normed)[..., WIDTH:].chunk(2, -1))
        first = merged(self.mix(q, k, v))
        tokens = tokens + torch.cat((first, normed[:, 1:]), 1)
        return torch.cat((tokens[:, :1] + self.last(self.norm(tokens[:, 0:1])), tokens[:, 1:]), 1)


class ClassProducts(ClassAttention):
    """The same by products."""

    mix = Products.mix


class Registers(Tokens):
    """Registers behind the tokens, a position of each, and means over all."""

    def __init__(self) -> None:
        super().__init__()
        self.registers = nn.Parameter(torch.randn(1, 3, WIDTH))

    def block(self, tokens: Tensor, shape: torch.Size) -> Tensor:
        places = torch.linspace(-1, 1, tokens.shape[1] * WIDTH).to(tokens).view(1, -1, WIDTH)
        tokens = torch.cat((tokens + places, self.registers.expand(len(tokens), -1, -1)), 1)
        tokens = super().block(F.dropout(tokens, 0.0), shape)
        first, image, registers = tokens.split([1, shape[2] * shape[3], 3], 1)
        means = tokens.mean(1, keepdim=True) + tokens[:, -3:].sum((0, 1)) + registers.amax(1, keepdim=True)
        return torch.cat((first * means.sin(), image + means), 1)


class Layer(Tokens):
    """PyTorch's own layer."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.TransformerEncoderLayer(WIDTH, HEADS, 8, dropout=0.0, batch_first=True)

    def block(self, tokens: Tensor, shape: torch.Size) -> Tensor:
        return self.layer(tokens)


KINDS = [Tokens, Products, Hidden, Equations, Factors, ClassAttention, ClassProducts, Registers, Layer]


@settings(max_examples=100)
@given(
    st.lists(st.integers(1, 4), min_size=1, max_size=3),
    st.lists(st.integers(1, 6), min_size=2, max_size=3),
    st.data(),
)
def test_a_reshape_has_parts_one_after_the_other(
    outer: list[int], sizes: list[int], data: st.DataObject
) -> None:
    inner = data.draw(st.lists(st.integers(1, 4), max_size=3))
    before = (*outer, sum(sizes), *inner)
    numel = math.prod(before)
    divisors = st.sampled_from([d for d in range(1, numel + 1) if numel % d == 0])
    first = data.draw(divisors)
    second = data.draw(divisors.filter(lambda d: numel // first % d == 0))
    after = (first, second, numel // first // second)
    axis = outermost(before, after, len(outer))
    if axis is None or any(size * after[axis] % sum(sizes) for size in sizes):
        return
    x = torch.arange(numel).view(before)
    shares = [size * after[axis] // sum(sizes) for size in sizes]
    parts = x.split(sizes, len(outer))
    found = [
        p.reshape(*after[:axis], share, *after[axis + 1 :]) for p, share in zip(parts, shares, strict=True)
    ]
    assert torch.equal(torch.cat(found, axis), x.view(after))


@pytest.mark.parametrize("kind", KINDS)
def test_tokens_with_others(kind: type[nn.Module]) -> None:
    torch.manual_seed(0)
    net = kind()
    assert_streams(net, resident=False)
    assert_streams(net.eval(), (1, 3, 14, 22), resident=False)


def tokens_of(x: Tensor) -> Tensor:
    return x.flatten(2).transpose(1, 2)


def with_first(x: Tensor) -> Tensor:
    """Tokens behind one of ones."""
    return torch.cat((x.new_ones(len(x), 1, WIDTH), tokens_of(x)), 1)


def overwritten(x: Tensor) -> Tensor:
    """In place, while the map's own tokens are read afterwards."""
    tokens = tokens_of(x)
    y = torch.cat((tokens, x.amax((2, 3))[:, None]), 1).mul_(2)
    y += torch.linspace(0, 1, y.shape[1]).to(y)[:, None]
    return y[:, :-1] * tokens + y[:, -1:]


def masked(x: Tensor) -> Tensor:
    y = with_first(x)
    mask = (torch.arange(y.shape[1]) % 3 == 0)[None, :, None]
    return y.masked_fill(mask, 0.5).where(~mask, y.cos()).transpose(1, 2)[:, :, 1:].view_as(x)


def channels_first(x: Tensor) -> Tensor:
    y = torch.cat((x.new_ones(len(x), WIDTH, 1).float(), x.flatten(2), x.mean((2, 3))[..., None]), 2)
    z = y.softmax(2) * y.log_softmax(-1) + y.logsumexp(2, keepdim=True)
    means = y.sum(2) * y.mean(-1) * z[..., 0]
    return z[..., 1:-1].view_as(x) + means[..., None, None]


@pytest.mark.parametrize("value", [math.inf, -math.inf])
@pytest.mark.parametrize("operator", [torch.softmax, torch.log_softmax, torch.logsumexp])
def test_infinite_scores(operator: Function, value: float) -> None:
    """Where plain PyTorch gives NaN, too."""

    def scores(x: Tensor) -> Any:
        y = torch.cat((torch.full((len(x), WIDTH, 1), value, dtype=x.dtype), x.flatten(2)), 2)
        # Of the first channel all, of the others the first alone.
        y = y.masked_fill((torch.arange(WIDTH) == 0)[None, :, None], value)
        found = operator(y, 2)
        return found if found.dim() == 2 else (found[..., 0], found[..., 1:].view_as(x))

    net = after_convolution(scores).double()
    image = torch.randn(SHAPE, dtype=torch.float64)
    with torch.no_grad():
        expected = net(image)
        model = StreamingModel(net, tile=TILE)
        model.resident_tail = False
        torch.testing.assert_close(model(image), expected, rtol=1e-9, atol=1e-9, equal_nan=True)


def padded(x: Tensor) -> Tensor:
    y = F.pad(tokens_of(x), (0, 0, 2, 1), value=0.3).sin()[:, 2:-1]
    return y + F.pad(x.flatten(2), (1, 1))[..., 1:-1].transpose(1, 2)


def along_channels(x: Tensor) -> Tensor:
    y = with_first(x)
    values, places = y.topk(2, 2)
    largest = y.unflatten(2, (2, 3)).max(2)[0].sum(2, keepdim=True)
    return (values * places + largest)[:, 1:] + torch.stack((y, y.sin()), 2)[:, 1:].sum((2, 3))[..., None]


def cut(x: Tensor) -> Tensor:
    first, rest = with_first(x).tensor_split((1,), 1)
    return rest * first.sin() + with_first(x).select(1, 0)[:, None]


def weighed(x: Tensor) -> Tensor:
    y = with_first(x)
    weights = torch.linspace(-1, 1, y.shape[1]).to(y)
    return torch.einsum("nlc,l->nc", y, weights)[:, :, None] * (y.mT @ weights[:, None])


@by_name({each.__name__: each for each in (overwritten, masked, channels_first, padded, along_channels, cut)})
def test_operators_on_tokens_with_others(case: Function) -> None:
    assert_streams(case, resident=False)


def test_a_product_that_takes_tokens_whole() -> None:
    assert_streams(weighed, resident=None)


class OwnQueries(nn.Module):
    """Queries of tokens by a layer of their own, of which only the class token's are used (CvT)."""

    def __init__(self) -> None:
        super().__init__()
        self.token = nn.Parameter(torch.randn(1, 1, WIDTH))
        self.own, self.unused = nn.Conv2d(WIDTH, WIDTH, 1), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        token, tokens = self.token.expand(len(x), -1, -1), x.flatten(2).transpose(1, 2)
        queries = torch.cat((token, self.own(x).flatten(2).transpose(1, 2)), 1)
        keys = torch.cat((token, tokens), 1)
        mixed = F.scaled_dot_product_attention(queries, keys, keys)
        return mixed[:, 0][..., None, None] * x


@pytest.mark.parametrize("tail", [False, True])
def test_layers_whose_tokens_are_cut_off_have_gradients_of_zero(tail: bool) -> None:
    """As with autograd, so that their weights decay; layers that are not used have none."""
    model = StreamingModel(OwnQueries(), tile=TILE)
    model.resident_tail = tail
    model(torch.randn(1, WIDTH, 12, 14)).sum().backward()
    none = [name for name, weight in model.net.named_parameters() if weight.grad is None]
    assert none == ["unused.weight", "unused.bias"]
    own = model.net.own.weight.grad
    assert own is not None
    assert not own.any()


MEETING: dict[str, Function] = {
    "sums of tokens before each": lambda tokens: tokens.cumsum(1),
    "every second token": lambda tokens: tokens[:, ::2],
    "tokens of every image in one axis": lambda tokens: tokens.flatten(0, 1).sin()[None],
    "some of the map's": lambda tokens: tokens[:, 2:5].sin(),
    "of one axis": lambda tokens: torch.cat((tokens.flatten(), tokens.new_ones(3))).sin()[None, None],
    "in order": lambda tokens: tokens.sort(1)[0],
}


@pytest.mark.parametrize("kind", MEETING)
def test_tokens_that_meet_are_whole(kind: str) -> None:
    def operator(x: Tensor) -> Tensor:
        tokens = torch.cat((x.mean((2, 3))[:, None], x.flatten(2).transpose(1, 2).sin()), 1)
        return MEETING[kind](tokens).mean((0, 1))

    assert_streams(operator, resident=True)
    assert len(StreamingModel(after_convolution(operator), tile=TILE).plan(SHAPE).residents) == 1
