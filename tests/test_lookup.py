"""Entries of a table by a map of indices: embeddings, palettes, codebooks."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from operator_cases import SHAPE, TILE, WIDTH, after_convolution, assert_streams, by_name
from test_losses import CLASSES, WithLoss, an_image, assert_equal, both, some_classes
from torch import Tensor, nn

from streamcnn import StreamingModel, verify
from streamcnn.runtime.obstacles import streamability


class Coded(nn.Module):
    """A map with a learned table of ``WIDTH`` entries."""

    def __init__(self, function: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.linspace(-1, 2, WIDTH * 4).view(WIDTH, 4).sin())
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        # Indices alone give the image no gradient.
        return self.function(x, self.table) * (1 + x.mean())


def nearest(x: Tensor, table: Tensor) -> Tensor:
    """Vector quantisation with a straight-through gradient, as VQ-VAE has it."""
    flat = x[:, :4].permute(0, 2, 3, 1).reshape(-1, 4)
    distances = flat.pow(2).sum(1, keepdim=True) - 2 * flat @ table.t() + table.pow(2).sum(1)
    found = F.embedding(distances.argmin(1), table).view(x.shape[0], *x.shape[2:], 4).permute(0, 3, 1, 2)
    near = x[:, :4] + (found - x[:, :4]).detach()
    return near + 0.25 * (found - x[:, :4].detach()).pow(2)


TAKEN = {
    "an embedding": lambda x, t: F.embedding(x.argmax(1), t).permute(0, 3, 1, 2) * x[:, :4],
    "an embedding with a padding index": lambda x, t: F.embedding(x.argmax(1), t, padding_idx=2).sum(-1),
    "an embedding of tokens": lambda x, t: F.embedding(x.argmax(1).flatten(1), t).mean(1),
    "an embedding of channels": lambda x, t: F.embedding((x * 2).long().clamp(0, 5), t).sum(1),
    "a table of vectors": lambda x, t: t[x.argmax(1)],
    "a table of numbers": lambda x, t: t[:, 1][x.argmax(1)] * x[:, 0],
    "a table of matrices": lambda x, t: t.view(WIDTH, 2, 2)[x.argmax(1)] @ x[:, :2, :, :, None].movedim(1, 3),
    "from the end": lambda x, t: t[-1 - x.argmax(1)],
    "32-bit indices": lambda x, t: t[x.argmax(1).int()],
    "a table of the image": lambda x, t: (t * x.mean())[x.argmax(1)],
    "the nearest code": nearest,
}


@by_name(TAKEN)
def test_it_streams(case: Callable[[Tensor, Tensor], Tensor]) -> None:
    assert_streams(Coded(case))


OTHERS = {
    "scaled by frequency": lambda x, t: F.embedding(x.argmax(1), t, scale_grad_by_freq=True),
    "a table of maps": lambda x, t: x.transpose(0, 1)[x[:, :, 0, 0].argmax(1)],
}


@by_name(OTHERS)
def test_what_does_not_stream_is_that_of_plain_pytorch_too(case: Callable[[Tensor, Tensor], Tensor]) -> None:
    net = after_convolution(Coded(case))
    assert verify(net, SHAPE, tile=TILE).max_error < 1e-9
    assert all(each.remedy for each in streamability(net, SHAPE).obstacles)


def balanced(logits: Tensor, target: Tensor) -> Tensor:
    """Losses weighted by class, as by ``weights[target]``."""
    weights = torch.linspace(0.5, 2, CLASSES, dtype=logits.dtype)
    return (F.cross_entropy(logits, target, reduction="none") * weights[target]).mean()


def test_losses_are_weighted_by_class_in_tiles() -> None:
    image, target = an_image(), some_classes()
    streamed, plain, model = both(WithLoss(balanced).double(), image, target)
    assert_equal(streamed, plain)
    assert model.plan(tuple(image.shape), inputs=(target,)).residents == ()


@by_name({"embedding": lambda t, i: F.embedding(i, t), "index": lambda t, i: t[i]})
def test_an_index_out_of_bounds_is_an_error_as_in_plain_pytorch(case: Callable[..., Tensor]) -> None:
    net = after_convolution(Coded(lambda x, t: case(t, x.argmax(1) + 1))).double()
    with pytest.raises(IndexError):
        net(torch.randn(SHAPE).double())
    with pytest.raises(IndexError):
        StreamingModel(net, tile=TILE)(torch.randn(SHAPE).double())
