"""Attention among the positions of each row, of each column, or of stripes; and heads in the batch."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from helpers import assert_streamed_equals_plain, traced
from torch import Tensor, nn
from torch.nn import functional as F

from streamcnn.capture.lowering.folded_shapes import regrouping
from streamcnn.geometry.axis_maps import All, Same
from streamcnn.graph.program import Program

DIM, HEADS, STRIPE = 8, 2, 4
SHAPE = (2, 3, 24, 20)
TILE = 8

Mix = Callable[[Tensor, Tensor, Tensor], Tensor]


def fused(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(query, key, value)


def products(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    return (query * 0.3 @ key.transpose(-2, -1)).softmax(-1) @ value


def by_equation(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    shares = torch.einsum("bhqd,bhkd->bhqk", query * 0.3, key).softmax(-1)
    return torch.einsum("bhqk,bhkd->bhqd", shares, value)


class Rows(nn.Module):
    """Attention within rows, each an image of a longer batch (axial attention)."""

    def __init__(self, mix: Mix = fused) -> None:
        super().__init__()
        self.qkv, self.last, self.mix = nn.Linear(DIM, 3 * DIM), nn.Linear(DIM, DIM), mix

    def forward(self, x: Tensor) -> Tensor:
        n, c, h, w = x.shape
        tokens = x.permute(0, 2, 3, 1).reshape(n * h, w, c)
        q, k, v = self.qkv(tokens).reshape(n * h, w, 3, HEADS, c // HEADS).permute(2, 0, 3, 1, 4)
        y = self.mix(q, k, v).transpose(1, 2).reshape(n, h, w, c)
        return x + self.last(y).permute(0, 3, 1, 2)


class Columns(Rows):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.transpose(2, 3)).transpose(2, 3)


class BiasedRows(Rows):
    """With a bias for each pair of columns."""

    def __init__(self) -> None:
        super().__init__(self.biased)
        self.bias = nn.Parameter(torch.randn(HEADS, SHAPE[3], SHAPE[3]))

    def biased(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return (query @ key.transpose(-2, -1) + self.bias).softmax(-1) @ value


class ByLetters(nn.Module):
    """Maps whose rows stay rows, by ``einsum``."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Conv2d(DIM, DIM, 1) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        scores = torch.einsum("nchw,nchv->nhwv", self.q(x), self.k(x)).softmax(-1)
        return x + torch.einsum("nhwv,nchv->nchw", scores, self.v(x))


class CrissCross(nn.Module):
    """Attention to the positions of the same row and of the same column, with one softmax (CCNet)."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Conv2d(DIM, DIM, 1) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        n, c, h, w = x.shape

        def columns(y: Tensor) -> Tensor:
            return y.permute(0, 3, 1, 2).contiguous().view(n * w, -1, h)

        def rows(y: Tensor) -> Tensor:
            return y.permute(0, 2, 1, 3).contiguous().view(n * h, -1, w)

        q, k, v = self.q(x), self.k(x), self.v(x)
        itself = -torch.diag(torch.full((h,), float("inf"), dtype=x.dtype)).repeat(n * w, 1, 1)
        down = torch.bmm(columns(q).mT, columns(k)) + itself
        across = torch.bmm(rows(q).mT, rows(k)).view(n, h, w, w)
        both = torch.cat((down.view(n, w, h, h).permute(0, 2, 1, 3), across), 3).softmax(3)
        down, across = both.split((h, w), 3)
        along_columns = torch.bmm(columns(v), down.permute(0, 2, 1, 3).reshape(n * w, h, h).mT)
        along_rows = torch.bmm(rows(v), across.reshape(n * h, w, w).mT)
        y = along_columns.view(n, w, c, h).permute(0, 2, 3, 1) + along_rows.view(n, h, c, w).permute(
            0, 2, 1, 3
        )
        return x + y


class Stripes(Rows):
    """Attention within stripes of some rows (CSWin)."""

    def forward(self, x: Tensor) -> Tensor:
        n, c, h, w = x.shape

        def windows(tokens: Tensor) -> Tensor:
            image = tokens.transpose(1, 2).reshape(n, c, h // STRIPE, STRIPE, 1, w)
            y = image.permute(0, 2, 4, 3, 5, 1).reshape(-1, STRIPE * w, HEADS, c // HEADS)
            return y.permute(0, 2, 1, 3).contiguous()

        q, k, v = self.qkv(x.flatten(2).transpose(1, 2)).reshape(n, h * w, 3, c).permute(2, 0, 1, 3)
        y = self.mix(windows(q), windows(k), windows(v)).transpose(1, 2).reshape(-1, STRIPE * w, c)
        y = y.view(n, h // STRIPE, 1, STRIPE, w, c).permute(0, 5, 1, 3, 2, 4).reshape(x.shape)
        return x + y


class Layer(nn.Module):
    """PyTorch's own layer, whose heads join the batch."""

    def __init__(self, *, batch_first: bool = True) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(DIM, HEADS, batch_first=batch_first)

    def attend(self, tokens: Tensor) -> Tensor:
        """Attention among tokens (N, L, C)."""
        if self.attention.batch_first:
            return self.attention(tokens, tokens, tokens, need_weights=False)[0]
        tokens = tokens.transpose(0, 1)
        return self.attention(tokens, tokens, tokens)[0].transpose(0, 1)


class LayerOnRows(Layer):
    def forward(self, x: Tensor) -> Tensor:
        n, c, h, w = x.shape
        return x + self.attend(x.permute(0, 2, 3, 1).reshape(n * h, w, c)).reshape(n, h, w, c).permute(
            0, 3, 1, 2
        )


class LayerOnAll(Layer):
    def forward(self, x: Tensor) -> Tensor:
        return x + self.attend(x.flatten(2).transpose(1, 2)).transpose(1, 2).reshape(x.shape)


class LayerOnWindows(Layer):
    def forward(self, x: Tensor) -> Tensor:
        n, c, h, w = x.shape
        y = x.reshape(n, c, h // STRIPE, STRIPE, w // STRIPE, STRIPE).permute(0, 2, 4, 3, 5, 1)
        y = self.attend(y.reshape(-1, STRIPE**2, c)).reshape(n, h // STRIPE, w // STRIPE, STRIPE, STRIPE, c)
        return x + y.permute(0, 5, 1, 3, 2, 4).reshape(x.shape)


class Axial(nn.Module):
    """Rows of (N * H, C, W) with 1-D layers, and queries by a table of distances (Axial-DeepLab)."""

    def __init__(self) -> None:
        super().__init__()
        width, each = SHAPE[3], DIM // HEADS
        self.qkv, self.norm = nn.Conv1d(DIM, 3 * DIM, 1, bias=False), nn.BatchNorm1d(3 * DIM)
        self.table = nn.Parameter(torch.randn(each, 2 * width - 1))
        self.scores = nn.BatchNorm2d(2 * HEADS)
        distances = torch.arange(width)[:, None] - torch.arange(width) + width - 1
        self.register_buffer("distances", distances.flatten())

    def forward(self, x: Tensor) -> Tensor:
        n, c, h, w = x.shape
        lines = x.permute(0, 2, 1, 3).reshape(n * h, c, w)
        q, k, v = self.norm(self.qkv(lines)).reshape(n * h, 3, HEADS, c // HEADS, w).unbind(1)
        table = torch.index_select(self.table, 1, self.distances).view(-1, w, w)
        by_distance = torch.einsum("bgci,cij->bgij", q, table)
        both = torch.cat((torch.einsum("bgci,bgcj->bgij", q, k), by_distance), 1)
        shares = self.scores(both).view(n * h, 2, HEADS, w, w).sum(1).softmax(3)
        return torch.einsum("bgij,bgcj->bgci", shares, v).reshape(n, h, c, w).permute(0, 2, 1, 3)


class Distances(nn.Module):
    """All positions, with a bias by the distance of rows and by that of columns (SAM, MViT)."""

    def __init__(self, *, fused: bool = False) -> None:
        super().__init__()
        self.fused = fused
        self.qkv = nn.Linear(DIM, 3 * DIM)
        self.down, self.across = (
            nn.Parameter(torch.randn(extent, extent, DIM // HEADS)) for extent in SHAPE[2:]
        )

    def forward(self, x: Tensor) -> Tensor:
        n, c, h, w = x.shape
        tokens = self.qkv(x.permute(0, 2, 3, 1)).reshape(n, h * w, 3, HEADS, c // HEADS)
        q, k, v = tokens.permute(2, 0, 3, 1, 4).reshape(3, n * HEADS, h * w, c // HEADS).unbind(0)
        queries = q.reshape(n * HEADS, h, w, c // HEADS)
        bias = torch.einsum("bhwc,hkc->bhwk", queries, self.down)[..., None]
        bias = bias + torch.einsum("bhwc,wkc->bhwk", queries, self.across)[:, :, :, None]
        if self.fused:
            heads = [each.view(n, HEADS, h * w, c // HEADS) for each in (q, k, v)]
            y = F.scaled_dot_product_attention(*heads, bias.reshape(-1, HEADS, h * w, h * w))
        else:
            scores = ((q * 0.3) @ k.transpose(-2, -1)).view(-1, h, w, h, w) + bias
            y = scores.view(-1, h * w, h * w).softmax(-1) @ v
        return x + y.view(n, HEADS, h, w, -1).permute(0, 1, 4, 2, 3).reshape(x.shape)


LINES: dict[str, Callable[[], nn.Module]] = {
    "rows": Rows,
    "columns": Columns,
    "rows of keys that are the queries": lambda: Rows(lambda q, k, v: fused(q, q, v + k)),
    "columns by products": lambda: Columns(products),
    "rows with a bias": BiasedRows,
    "einsum": ByLetters,
    "rows and columns": CrissCross,
    "rows in 1-D layers": Axial,
    "all positions, with distances": Distances,
    "all positions, with distances as a mask": lambda: Distances(fused=True),
    "stripes": Stripes,
    "stripes by products": lambda: Stripes(products),
    "stripes by einsum": lambda: Stripes(by_equation),
    "a layer on rows": LayerOnRows,
    "a layer on windows": LayerOnWindows,
    "a layer on all positions": LayerOnAll,
    "a layer that returns its weights": lambda: LayerOnAll(batch_first=False),
}


def network(mix: nn.Module) -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, DIM, 3, padding=1), mix, nn.Conv2d(DIM, 4, 3), nn.AdaptiveAvgPool2d(1))


@pytest.mark.parametrize("num_images", [1, 2])
@pytest.mark.parametrize("kind", LINES)
def test_attention_along_lines_is_streamed(kind: str, num_images: int) -> None:
    torch.manual_seed(0)
    net = network(LINES[kind]())
    assert_streamed_equals_plain(net, (num_images, *SHAPE[1:]), tile=TILE)


def accesses(program: Program) -> set[tuple[object, object]]:
    """How the operators of a program read maps."""
    local = [node.local for node in program.nodes.values() if node.local is not None]
    return {(access.rows, access.cols) for each in local for access in each.accesses.values()}


def test_keys_and_values_are_read_along_one_axis_alone() -> None:
    rows, cols = SHAPE[2:]
    of_rows = accesses(traced(network(Rows()), SHAPE)[0])
    assert (Same(), All(cols)) in of_rows
    assert (All(rows), Same()) in accesses(traced(network(Columns()), SHAPE)[0])
    assert not any(isinstance(access, All) for access, _ in of_rows)


class Causal(Rows):
    def __init__(self) -> None:
        super().__init__(lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True))


class Turned(Rows):
    """Queries of rows, keys of columns, on a square map."""

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.einsum("nchw,ncwv->nchv", x, x.sin())


@pytest.mark.parametrize("kind", [Causal, Turned])
def test_what_is_not_streamed_is_exact(kind: type[Rows]) -> None:
    torch.manual_seed(0)
    assert_streamed_equals_plain(network(kind()), (2, 3, 20, 20), tile=TILE, resident=True)


def test_heads_join_the_batch() -> None:
    # Columns (H, N, W, heads times channels) of a batch first layer.
    assert regrouping((6, 2, 5, 8), (0, 2), (6, 20, 4)) == ((6, 2, 5, 2, 4), (1, 3, 1))
    # And back: a run of positions, images and heads is cut before the heads.
    assert regrouping((5, 7, 4, 4), (0, 1), (70, 8)) == ((5, 7, 2, 8), (3, 1))
    # Columns would be cut.
    assert regrouping((5, 2, 4, 3), (0, 2), (5, 4, 6)) is None
