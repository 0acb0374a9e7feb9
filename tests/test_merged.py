"""Spatial axes merged with others: tokens and windows, streamed and plain."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch
from einops import rearrange
from helpers import all_in_tiles, streaming_plan, traced
from operator_cases import SHAPE, TILE, WIDTH, Applied, after_convolution, assert_streams, by_name
from torch import Tensor, nn
from torch.nn import functional as F

from streamcnn.graph.program import Kind

EVEN = (2, 3, 22, 18)
"""A shape whose extents windows of two positions divide."""


def tokens_of(x: Tensor) -> Tensor:
    """A map as tokens (N, H * W, C)."""
    return x.flatten(2).transpose(1, 2)


def map_of(tokens: Tensor, like: Tensor) -> Tensor:
    """Tokens as a map of the extents of ``like``."""
    return tokens.transpose(1, 2).reshape(len(like), -1, *like.shape[2:])


class Layers(nn.Module):
    """What a transformer does to each token: positions, norms, layers, gates, and a mean of all tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.last_norm = nn.LayerNorm(WIDTH), nn.RMSNorm(4)
        self.up, self.down = nn.Linear(WIDTH, 8), nn.Linear(8, WIDTH)
        self.positions = nn.Parameter(torch.linspace(-1, 1, 22 * 18 * WIDTH).reshape(1, -1, WIDTH))
        self.scales = nn.Parameter(torch.linspace(1, 2, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        tokens = tokens_of(x) + self.positions
        tokens = tokens + self.scales * self.down(F.gelu(self.up(self.norm(tokens))))
        first, second = tokens.chunk(2, -1)
        tokens = self.last_norm(torch.cat((first * second.softmax(-1), second[..., 1:2]), -1))
        return map_of(tokens * torch.sigmoid(tokens.mean(1, keepdim=True)), x)


class Windows(nn.Module):
    """Attention within windows as Swin has it: a bias for each head, a mask for each window."""

    def __init__(self, fused: bool, size: int = 2, heads: int = 2) -> None:
        super().__init__()
        self.fused, self.size, self.heads = fused, size, heads
        self.mix, self.last = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.bias = nn.Parameter(torch.linspace(-1, 1, heads * size**4).reshape(heads, size**2, size**2))

    def forward(self, x: Tensor) -> Tensor:
        n, c, h, w = x.shape
        rows, cols, inside = h // self.size, w // self.size, self.size**2
        windows = x.permute(0, 2, 3, 1).view(n, rows, self.size, cols, self.size, c)
        windows = windows.transpose(2, 3).contiguous().view(-1, inside, c)
        mixed = self.mix(windows).reshape(-1, inside, 3, self.heads, c // self.heads)
        query, key, value = mixed.permute(2, 0, 3, 1, 4).unbind(0)
        attend = self.attend_fused if self.fused else self.attend
        windows = self.last(attend(query, key, value).transpose(1, 2).reshape(-1, inside, c))
        windows = windows.view(-1, rows, cols, self.size, self.size, c)
        return windows.permute(0, 5, 1, 3, 2, 4).reshape(n, c, h, w)

    def attend_fused(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(query, key, value, attn_mask=self.bias[None])

    def attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        scores = (query * 0.5) @ key.transpose(-2, -1) + self.bias
        count, heads, inside, _ = scores.shape
        mask = torch.linspace(0, 1, count // 2 * inside**2).to(scores).reshape(1, -1, 1, inside, inside)
        scores = (scores.view(2, -1, heads, inside, inside) + mask).view(-1, heads, inside, inside)
        return scores.softmax(-1) @ value


def cross_attention(x: Tensor) -> Tensor:
    """Every position of a map attends to a summary of it, as in pyramid vision transformers."""
    n, c, h, w = x.shape
    summary = tokens_of(F.adaptive_avg_pool2d(x, 3)).reshape(n, 9, 2, 3).transpose(1, 2)
    query = tokens_of(x).reshape(n, h * w, 2, 3).transpose(1, 2)
    attended = F.scaled_dot_product_attention(query, summary, summary.sin(), attn_mask=summary.new_ones(1, 9))
    return map_of(attended.transpose(1, 2).reshape(n, h * w, c), x)


def products(x: Tensor) -> Tensor:
    """Tokens times matrices: one for all, one for each image, and one in front."""
    tokens = tokens_of(x)
    matrix = torch.eye(WIDTH).to(x).cumsum(1)
    context = F.adaptive_avg_pool2d(x, (2, 3)).flatten(2)
    windows = rearrange(x, "n c (h p) (w q) -> (n h w) (p q) c", p=2, q=2)
    mixed = torch.ones(4, 4).to(x).cumsum(0) @ windows + torch.bmm(windows, windows.mT) @ windows
    back = rearrange(mixed, "(n h w) (p q) c -> n c (h p) (w q)", n=2, h=11, p=2)
    return map_of(tokens @ matrix + tokens @ context @ context.mT, x) + back


def products_by_equations(x: Tensor) -> Tensor:
    """Attention within windows by equations, and a matrix for each image."""
    windows = rearrange(x, "n c (h p) (w q) -> (n h w) (p q) c", p=2, q=2)
    scores = torch.einsum("bqc,bkc->bqk", windows, windows.sin()).softmax(-1)
    mixed = torch.einsum("bqk,bkc->bqc", scores, windows)
    back = rearrange(mixed, "(n h w) (p q) c -> n (h p w q) c", n=2, h=11, p=2)
    return (
        torch.einsum("ntc,ncd->ntd", tokens_of(x), F.adaptive_avg_pool2d(x, (2, 3)).flatten(2)) * back.mean()
    )


def attention_of_channels_first(x: Tensor) -> Tensor:
    """Every position with every other, values times scores, as in SHViT."""
    query, key, value = x.flatten(2).sin(), x.flatten(2).cos(), x.flatten(2)
    scores = (query.transpose(-2, -1) @ key * 0.3).softmax(-1)
    return (value @ scores.transpose(-2, -1)).reshape(x.shape)


def linear_attention(x: Tensor) -> Tensor:
    """Attention without a softmax, divided by what a column of ones gives, as in EfficientViT of MIT."""
    heads = x.reshape(2, 2, 3, -1).transpose(-1, -2)
    value = F.pad(heads, (0, 1), mode="constant", value=1.0)
    mixed = heads.relu() @ (heads.sin().relu().transpose(-1, -2) @ value)
    mixed = mixed[..., :-1] / (mixed[..., -1:] + 0.1)
    return mixed.transpose(-1, -2).reshape(x.shape)


def coarser_attention(x: Tensor) -> Tensor:
    """Attention of every position to those of a coarser grid, by matrix products."""
    keys = tokens_of(F.avg_pool2d(x, 2))
    return map_of((tokens_of(x) @ keys.transpose(1, 2)).softmax(-1) @ keys, x)


def sums_over_positions(x: Tensor) -> Tensor:
    """Keys times values of all tokens, which are column by column or in windows of a grid."""
    grids = ("n c h w -> n (w h) c", "n c (h p) (w q) -> n (h p w q) c", "n c (h p) (w q) -> n (h w p q) c")
    sums = [rearrange(x, grid, **({"p": 2, "q": 3} if "p" in grid else {})) for grid in grids]
    return torch.stack([tokens.transpose(1, 2) @ tokens.sin() for tokens in sums])


def attention_pooling(x: Tensor) -> tuple[Tensor, ...]:
    """All tiles of a slide as one bag, weighed and summed, as in multiple-instance learning."""
    bag = rearrange(x, "n c h w -> (n h w) c")
    weights = torch.mm(bag, torch.eye(WIDTH, 2).to(x)).t().softmax(1)
    return torch.mm(weights, bag), torch.mm(bag.sin().t(), bag)


MERGED: dict[str, nn.Module | Callable[[Tensor], Tensor]] = {
    "layers on tokens": Layers(),
    "attention within windows": Windows(fused=False),
    "attention within windows, fused": Windows(fused=True),
    "shifted windows": nn.Sequential(
        Applied(lambda x: x.roll((-1, -1), (2, 3))),
        Windows(fused=True),
        Applied(lambda x: x.roll((1, 1), (2, 3))),
    ),
    "attention to a summary": cross_attention,
    "products": products,
    "tokens by einops": lambda x: rearrange(
        rearrange(x, "b c h w -> b (h w) c").sin(), "b (h w) c -> b c h w", h=22
    ),
    "tokens scanned, sorted and gathered": lambda x: map_of(
        tokens_of(x).cumsum(-1) * tokens_of(x).sort(-1)[0] + tokens_of(x).flip(-1).topk(WIDTH)[0], x
    ),
    "tokens of channels first": lambda x: (x.flatten(2) * x.flatten(2).softmax(1)).unflatten(2, (22, 18)),
    "reductions of tokens": lambda x: x * (tokens_of(x).mean(1) + tokens_of(x).amax((1,)))[..., None, None],
    "largest of all positions, and where": lambda x: (
        x.flatten(2).max(2).values * x.flatten(2).min(-1, keepdim=True)[0].flatten(1),
        tokens_of(x).max(1),
        (tokens_of(x).min(1).indices + tokens_of(x).argmax(1, keepdim=True)[:, 0]) * x.mean((2, 3)),
    ),
    "first of equal ones": lambda x: (
        F.interpolate(x.round(decimals=1), scale_factor=2).flatten(2).max(2),
        x.flatten(2).argmin(2) * x.mean((2, 3)),
    ),
    "some of the largest, and where": lambda x: (
        x.flatten(2).topk(5, 2).values.mean(2),
        tokens_of(x).topk(70, 1),
        (
            tokens_of(x).topk(3, 1, largest=False)[0].sin(),
            x.flatten(2).topk(1)[1] * x.mean((2, 3))[..., None],
        ),
        F.relu(x - 2).flatten(2).topk(200, -1)[0],
    ),
    "any and all of tokens": lambda x: (
        x * ((tokens_of(x) > 1).any(1) | (tokens_of(x) < 1).all(1))[..., None, None]
    ),
    "norms and deviations of tokens": lambda x: (
        map_of(F.normalize(tokens_of(x), dim=-1), x) / tokens_of(x).std(1)[..., None, None]
    ),
    "channels of tokens reduced": lambda x: (
        map_of(tokens_of(x).mean(-1, keepdim=True), x) * tokens_of(x).amax(2).view(2, 1, 22, 18)
    ),
    "windows as large as a quarter": lambda x: rearrange(
        rearrange(x, "b c (h p) (w q) -> (b h w) (p q) c", p=11, q=9).softmax(1),
        "(b h w) (p q) c -> b c (h p) (w q)",
        h=2,
        w=2,
        p=11,
    ),
    "tokens chosen by a table": lambda x: tokens_of(x)[..., torch.tensor([3, 0, 5])].sin().select(2, 1),
    "paths dropped": lambda x: tokens_of(x) * tokens_of(x).new_empty((2, 1, 1)).fill_(0.3),
    "made of a shape": lambda x: tokens_of(x) * torch.empty_like(tokens_of(x)).fill_(2.0),
    "products by equations": products_by_equations,
    "attention of channels first": attention_of_channels_first,
    "attention pooling of a bag": attention_pooling,
    "linear attention with a column of ones": linear_attention,
    "keys times values of turned tokens": sums_over_positions,
    "attention to a coarser grid": coarser_attention,
    "attention to a coarser grid, fused": lambda x: F.scaled_dot_product_attention(
        tokens_of(x)[:, None], *[tokens_of(F.avg_pool2d(x, 2))[:, None]] * 2
    ),
    "attention among tokens": lambda x: F.scaled_dot_product_attention(*[tokens_of(x)[:, None]] * 3),
    "tokens repeated": lambda x: tokens_of(x)[:, None].expand(-1, 2, -1, -1).sin(),
    "tokens stacked": lambda x: torch.stack((tokens_of(x), tokens_of(x).sin()), 1),
    "a map in the shape of tokens, and back": lambda x: (
        x.view_as(x.flatten(2)).sin().view_as(x) * x.flatten(2).view_as(x)
    ),
    "tokens gathered by others": lambda x: map_of(tokens_of(x).gather(-1, tokens_of(x).sin().argsort(-1)), x),
    "dropout of nothing": nn.Sequential(Applied(tokens_of), nn.Dropout(0.0), nn.Linear(WIDTH, 3)),
    "flattened": lambda x: x.flatten(1).sin(),
    "attention of all to all": lambda x: torch.softmax(tokens_of(x) @ x.flatten(2), -1).square().sum(-1),
    "tokens joined with others": lambda x: torch.cat((x.new_ones(2, 1, WIDTH), tokens_of(x)), 1).sin(),
    "tokens as the result": lambda x: tokens_of(x).sin(),
    "several results": lambda x: tokens_of(x).sin().split((1, WIDTH - 1), -1),
}


@by_name(MERGED)
def test_merged_axes_stream(case: nn.Module | Callable[[Tensor], Tensor]) -> None:
    assert_streams(case, EVEN)


RESIDENT: dict[str, nn.Module | Callable[[Tensor], Tensor]] = {
    "convolution of tokens": nn.Sequential(Applied(lambda x: x.flatten(2)), nn.Conv1d(WIDTH, 2, 3)),
    "tokens scanned": lambda x: tokens_of(x).cumsum(1),
    "tokens and what is merged elsewhere": lambda x: (
        tokens_of(x)[:, None] * x.flatten(1).unflatten(1, (1, -1, WIDTH))
    ),
    "tokens times a vector": lambda x: tokens_of(x) @ torch.ones(WIDTH).to(x).cumsum(0),
    "one layer for the whole map": nn.Sequential(nn.Flatten(), nn.Linear(WIDTH * 22 * 18, 2)),
}


@by_name(RESIDENT)
def test_other_uses_of_merged_axes_are_resident(case: nn.Module | Callable[[Tensor], Tensor]) -> None:
    assert_streams(case, EVEN, resident=True)


@pytest.mark.parametrize("count", [3, 30, 250])
def test_nan_is_the_last_of_the_smallest_values(count: int) -> None:
    """Behind infinite ones, and taken only where nothing else is left."""
    torch.manual_seed(0)
    image = torch.randn(2, 3, 13, 21, dtype=torch.float64)

    def smallest(x: Tensor) -> Tensor:
        x = x.masked_fill(x > 1.5, torch.inf).masked_fill(x.abs() < 0.2, torch.nan)
        return x.flatten(2).topk(count, largest=False).values

    found = all_in_tiles(Applied(smallest))(image)
    torch.testing.assert_close(found, smallest(image), rtol=0, atol=0, equal_nan=True)


def test_positions_in_another_order_are_not_paired() -> None:
    assert_streams(lambda x: x.flatten(2) @ tokens_of(x.mT).sin(), (2, 3, 18, 18), resident=True)


TURNED: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "added": lambda x, y: x + y.sin(),
    "joined": lambda x, y: torch.cat((x, y), 1).sin(),
    "compared": F.mse_loss,
    "multiplied": lambda x, y: x @ y.transpose(1, 2),
    "attended to": lambda x, y: F.scaled_dot_product_attention(x[:, None], y[:, None], y[:, None]),
}


@by_name(TURNED)
def test_as_many_windows_or_positions_in_another_order(case: Callable[[Tensor, Tensor], Tensor]) -> None:
    windows = "n c (h p) (w q) -> (n h w) (p q) c", "n c (h p) (w q) -> (n w h) (p q) c"
    by_rows, by_columns = (partial(rearrange, pattern=each, p=2, q=2) for each in windows)
    assert_streams(lambda x: case(by_rows(x), by_columns(x)), EVEN, resident=True)
    assert_streams(lambda x: case(x.flatten(2), x.mT.flatten(2)).sin(), EVEN, resident=True)


def test_no_whole_map_is_taken_for_windows() -> None:
    program, _ = traced(nn.Sequential(after_convolution(Windows(fused=True)), nn.AdaptiveAvgPool2d(1)), EVEN)
    assert Kind.GATHER not in {node.kind for node in program.nodes.values()}


def test_tokens_in_the_resident_tail() -> None:
    net = nn.Sequential(nn.Conv2d(3, WIDTH, 3, padding=1), Layers())
    program, _ = traced(net, EVEN, tail="linear")
    after = [
        node
        for node in program.nodes.values()
        if program.position(node.name) > program.position("layer_norm")
    ]
    assert not any(node.kind is Kind.LOCAL for node in after)


def test_a_whole_value_says_who_asked_for_it() -> None:
    net = after_convolution(lambda x: tokens_of(x).cumsum(1))
    (resident,) = streaming_plan(net, SHAPE, TILE)[1].residents
    assert resident.startswith("aten.cumsum: it works along merged axes of space")


@pytest.mark.parametrize("fused", [False, True])
def test_windows_of_another_size(fused: bool) -> None:
    assert_streams(Windows(fused, size=3, heads=3), (2, 3, 21, 15))
