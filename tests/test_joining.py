"""Maps that are joined along an axis of space, and cut into parts along one."""

from __future__ import annotations

import torch
from operator_cases import SHAPE, Function, assert_streams, by_name
from torch import Tensor
from torch.nn import functional as F


def rolled(x: Tensor) -> Tensor:
    """By hand, along both axes."""
    x = torch.cat((x[:, :, -4:], x[:, :, :-4]), 2)
    return torch.cat((x[..., 3:], x[..., :3]), 3)


def gradients(x: Tensor) -> Tensor:
    """Differences of neighbours, with a row of zeros at the end."""
    return torch.cat((x[:, :, 1:] - x[:, :, :-1], torch.zeros_like(x[:, :, :1])), 2)


def patches(x: Tensor) -> Tensor:
    """Halves that are normalised by themselves."""
    return torch.cat([half - half.mean((2, 3), keepdim=True) for half in x.chunk(2, 2)], 2)


def halves_swapped(x: Tensor) -> Tensor:
    left, middle, right = x.sin().split((8, 1, x.shape[3] - 9), 3)
    return torch.cat((right, middle, left), 3)


STREAMED = {
    "rolled by hand": rolled,
    "gradients": gradients,
    "patches": patches,
    "parts in another order": halves_swapped,
    "the last row repeated": lambda x: torch.cat((x, x[:, :, -1:], x[:, :, -1:]), 2),
    "one map several times": lambda x: torch.cat((x, x, x.cos(), x), 3),
    "channels last": lambda x: torch.cat(
        (x.permute(0, 2, 3, 1)[:, 2:], x.permute(0, 2, 3, 1)[:, :5]), 1
    ).sin(),
    "masks": lambda x: x * torch.cat((x[:, :, :7] > 0, x[:, :, 7:] > 1), 2),
    "of several types": lambda x: F.avg_pool2d(torch.cat((x[:, :, :7], (x[:, :, 7:] > 0).long()), 2), 2),
    "axes of space exchanged": lambda x: torch.cat((x, x.transpose(2, 3).transpose(2, 3)[..., :4]), 3),
}


@by_name(STREAMED)
def test_maps_joined_along_space(case: Function) -> None:
    assert_streams(case, resident=False)
    assert_streams(case, (1, 3, 26, 31), resident=False)


def test_many_parts_are_joined_whole() -> None:
    assert_streams(lambda x: torch.cat([x[:, :, row : row + 1] for row in range(SHAPE[2])], 2), resident=True)
    assert_streams(lambda x: torch.cat(x.split(1, 2)[::-1], 2), resident=True)


def encoded(x: Tensor) -> Tensor:
    """Tokens beside encodings of their positions (Perceiver)."""
    tokens = x.flatten(2).transpose(1, 2)
    places = torch.linspace(-1, 1, 2 * tokens.shape[1]).to(x).view(1, -1, 2).expand(len(x), -1, -1)
    return torch.cat((tokens, places), 2).sin()


def relative_positions(x: Tensor) -> Tensor:
    """Distances within rows of windows as positions, by padding (BoTNet, HaloNet)."""
    n, c, h, w = x.shape
    windows = x.view(n, c, h // 3, 3, w // 3, 3).permute(0, 2, 4, 3, 5, 1).reshape(-1, 3, 3, c)
    weights = torch.linspace(-1, 1, 5 * c).view(5, c).to(x)
    scores = torch.einsum("bxyd,rd->bxyr", windows, weights).flatten(0, 1)
    rows = torch.cat((scores, torch.zeros((len(scores), 3, 1)).to(x)), 2).flatten(1)
    rows = torch.cat((rows, torch.zeros((len(rows), 2)).to(x)), 1)
    return rows.reshape(-1, 4, 5)[:, :3, 2:].reshape(-1, 3, 3, 3).sin()


BESIDE = {
    "encodings of positions": encoded,
    "relative positions": relative_positions,
    "stacked": lambda x: torch.stack(
        (x.flatten(2), torch.linspace(-1, 1, x.numel()).to(x).view(*x.shape[:2], -1)), 1
    ).sin(),
    "means": lambda x: torch.cat(
        (x.mean((2, 3))[:, None].expand(-1, x[0, 0].numel(), -1), x.flatten(2).transpose(1, 2)), 2
    ),
    "ones as a channel": lambda x: torch.cat((x.new_ones(len(x), 1, x[0, 0].numel()), x.flatten(2)), 1).cos(),
}


@by_name(BESIDE)
def test_values_without_positions_beside_tokens(case: Function) -> None:
    assert_streams(case, (1, 3, 24, 30), resident=False)
    assert_streams(case, (2, 3, 18, 27), resident=False)
