"""Products by an equation, ``einsum`` and ``tensordot``, of maps and of tokens."""

from __future__ import annotations

import pytest
import torch
from operator_cases import WIDTH, Function, assert_streams, by_name
from torch import Tensor

from streamcnn.graph.ops.products import terms_of
from streamcnn.graph.ops.rules import NotStreamable

HEADS = 2


def tokens(x: Tensor) -> Tensor:
    return x.flatten(2).transpose(1, 2)


def upsampled(x: Tensor) -> Tensor:
    """As in HoVer-Net: each position times a matrix of ones."""
    n, c, h, w = x.shape
    blocks = torch.tensordot(x.unsqueeze(-1), torch.ones(1, 2, 2, dtype=x.dtype), dims=1)
    return blocks.permute(0, 1, 2, 4, 3, 5).reshape(n, c, 2 * h, 2 * w)


def attention(x: Tensor) -> Tensor:
    """Of all tokens to all, in heads, as in CvT."""
    q, k = (each.unflatten(2, (HEADS, -1)).transpose(1, 2) for each in (tokens(x), tokens(x.sin())))
    scores = torch.einsum("bhlk,bhtk->bhlt", [q, k]) / WIDTH
    mixed = torch.einsum("bhlt,bhtv->bhlv", [scores.softmax(-1), k.cos()])
    return mixed.transpose(1, 2).flatten(2).transpose(1, 2).view_as(x)


def unnamed(x: Tensor) -> Tensor:
    """Axes in front without names, as in einops' users' code."""
    q, k = (each.unflatten(2, (HEADS, -1)).transpose(1, 2) for each in (tokens(x), tokens(x.sin())))
    scores = torch.einsum("... i d, ... j d -> ... i j", q, k).softmax(-1)
    return (
        torch.einsum("... i j, ... j d -> ... i d", scores, k).transpose(1, 2).flatten(2).mT.reshape(x.shape)
    )


def linear_attention(x: Tensor) -> Tensor:
    """As in MAnet and ABCNet: keys with values, sums of keys and of values."""
    n, c, h, w = x.shape
    q, k, v = x.flatten(2), x.sin().flatten(2), x.cos().flatten(2)
    keys = torch.einsum("bmn,bcn->bmc", k, v)
    norm = 1 / (h * w + torch.einsum("bnc,bc->bn", q.mT, torch.einsum("bcn->bc", k)))
    total = torch.einsum("bcn->bc", v).unsqueeze(-1).expand(-1, c, h * w)
    mixed = total + torch.einsum("bnm,bmc->bcn", q.mT, keys)
    return torch.einsum("bcn,bn->bcn", mixed, norm).view(n, c, h, w)


def few_tokens(x: Tensor) -> Tensor:
    """As in BIT: a few tokens that are weighted means of all positions."""
    shares = x[:, :2].flatten(2).softmax(-1)
    found = torch.einsum("bln,bcn->blc", shares, x.flatten(2))
    return x + torch.einsum("blc,blhw->bchw", found, x[:, 2:4])


def gram(x: Tensor) -> Tensor:
    return x * torch.einsum("nchw,ndhw->ncd", x, x).mean(2)[:, :, None, None]


STREAMED = {
    "upsampling by ones": upsampled,
    "tensordot over channels": lambda x: torch.tensordot(x, torch.eye(WIDTH, 3).to(x), ([1], [0])).sin(),
    "attention": attention,
    "axes without names": unnamed,
    "linear attention": linear_attention,
    "few tokens": few_tokens,
    "Gram matrix": gram,
    "sums of other axes too": lambda x: x * torch.einsum("nchw,ndhw->d", x, x.sin()).view(1, -1, 1, 1),
    "the result's axes not given": lambda x: torch.einsum("achw,bc", x, torch.eye(4, WIDTH).to(x)).sin(),
}


@by_name(STREAMED)
def test_equation(case: Function) -> None:
    assert_streams(case, resident=False)
    assert_streams(case, (1, 3, 14, 22), resident=False)


@by_name(
    {
        "a diagonal of positions": lambda x: torch.einsum("ncii->nci", x[:, :, :17, :17]),
        "rows with columns": lambda x: torch.einsum("nchw,ncvw->nchv", x, x),
    }
)
def test_equation_on_whole_maps(case: Function) -> None:
    assert_streams(case, resident=True)


@pytest.mark.parametrize(
    ("equation", "ndims", "terms"),
    [
        ("bqc, bkc -> bqk", (3, 3), ["bqc", "bkc", "bqk"]),
        ("...ij,...jk->...ik", (4, 3), ["ABij", "Bjk", "ABik"]),
        ("ij,jk", (2, 2), ["ij", "jk", "ik"]),
        ("...b,ba", (3, 2), ["ABb", "ba", "ABa"]),
        ("ii->i", (2,), ["ii", "i"]),
    ],
)
def test_letters_of_an_equation(equation: str, ndims: tuple[int, ...], terms: list[str]) -> None:
    assert terms_of(equation, ndims) == terms


def test_an_equation_that_cannot_be_read() -> None:
    assert isinstance(terms_of("ab,bc->ac", (2,)), NotStreamable)
