"""Attention by products with a mask (``baddbmm``): ``nn.MultiheadAttention`` where weights are needed."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from operator_cases import SHAPE, TILE, WIDTH, after_convolution, assert_streams, by_name
from torch import Tensor, nn

from streamcnn import verify


class Attending(nn.Module):
    """Tokens of a map attend to each other, then queries to them; DETR hides what lies outside of images."""

    def __init__(self) -> None:
        super().__init__()
        self.own, self.other = (nn.MultiheadAttention(WIDTH, 2, batch_first=True) for _ in range(2))
        self.queries = nn.Parameter(torch.linspace(-1, 1, 5 * WIDTH).reshape(1, 5, WIDTH))

    def forward(self, x: Tensor, hidden: Tensor | None = None) -> tuple[Tensor, Tensor]:
        if hidden is None:
            hidden = (torch.arange(x.shape[3]) > 11).expand(x.shape[0], *x.shape[2:])
        hidden = F.interpolate(hidden[None].float(), size=x.shape[2:]).bool()[0].flatten(1)
        tokens = x.flatten(2).transpose(1, 2)
        tokens = tokens + self.own(tokens, tokens, tokens, key_padding_mask=hidden)[0]
        queries = self.queries.expand(len(x), -1, -1)
        found = self.other(queries, tokens, tokens, key_padding_mask=hidden)[0]
        return found, tokens


class Masked(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.convolution, self.attention = nn.Conv2d(3, WIDTH, 3, padding=1), Attending()

    def forward(self, x: Tensor, hidden: Tensor) -> tuple[Tensor, Tensor]:
        found: tuple[Tensor, Tensor] = self.attention(self.convolution(x), hidden)
        return found


def test_a_mask_that_is_computed_streams() -> None:
    assert_streams(Attending())


def test_a_mask_that_is_an_argument_streams() -> None:
    hidden = torch.zeros(SHAPE[0], *SHAPE[2:], dtype=torch.bool)
    hidden[0, 15:] = True
    hidden[1, :, 12:] = True
    found = verify(Masked(), SHAPE, tile=TILE, inputs=(hidden,))
    assert found.max_error < 1e-9
    assert found.num_tiles > 1
    assert not found.residents


def keys(x: Tensor) -> Tensor:
    """Few values that are computed from the whole map."""
    return F.adaptive_avg_pool2d(x, 3).flatten(2)


BIASED: dict[str, Callable[[Tensor], Tensor]] = {
    "scaled": lambda x: torch.baddbmm(keys(x)[:, :1], x.flatten(2).mT, keys(x), beta=0.5, alpha=2),
    "no bias": lambda x: torch.baddbmm(keys(x)[:, :1], x.flatten(2).mT, keys(x), beta=0),
    "a bias for each position": lambda x: torch.baddbmm(x[:, :1].flatten(2).mT, x.flatten(2).mT, keys(x)),
    "positions as columns": lambda x: torch.baddbmm(x[:, :1].flatten(2), keys(x).mT, x.flatten(2)),
}


@by_name(BIASED)
def test_product_with_bias(case: Callable[[Tensor], Tensor]) -> None:
    assert_streams(case)


def test_a_bias_of_every_pair_of_positions() -> None:
    def with_distances(x: Tensor) -> Tensor:
        tokens = x.flatten(2).mT
        index = torch.arange(tokens.shape[1], dtype=x.dtype)
        distances = (index - index[:, None]).abs().expand(len(x), -1, -1)
        return torch.baddbmm(distances, tokens, tokens.mT, beta=-0.01).softmax(-1) @ tokens

    assert verify(after_convolution(with_distances), SHAPE, tile=TILE).max_error < 1e-9
