"""One value written where a mask says, ``x[mask] = value``: ignored labels, hidden tokens, small scores."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from operator_cases import SHAPE, TILE, WIDTH, after_convolution, assert_streams, by_name
from test_losses import CLASSES, WithLoss, an_image, assert_equal, both, some_classes
from torch import Tensor, nn

from streamcnn import verify


class Hiding(nn.Module):
    """Writes a vector that is learned, or one of its values, into a map."""

    def __init__(self, function: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.hidden = nn.Parameter(torch.linspace(-1, 2, WIDTH))
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x * 1, self.hidden)


def written(x: Tensor, mask: object, value: object) -> Tensor:
    x[mask] = value  # type: ignore[index, assignment]
    return x * 2


def among_tokens(x: Tensor, v: Tensor) -> Tensor:
    first = v.expand(x.shape[0], 1, -1)
    tokens = torch.cat((first, x.flatten(2).transpose(1, 2)), 1) * 1
    return written(tokens, tokens[..., 0] > 0.2, v).mean(1)


def in_a_part(x: Tensor, v: Tensor) -> Tensor:
    x[:, 0][x[:, 1] > 0] = v[0]
    return x * 2


WRITTEN = {
    "a number": lambda x, v: written(x, x < 0.1, 0.5) * v[:, None, None],
    "minus infinity": lambda x, v: written(x, x < 0, -math.inf).flatten(2).softmax(2) * v[:, None],
    "a value that is learned": lambda x, v: written(x, x < 0.1, v[1]),
    "a vector for each position": lambda x, v: written(x.permute(0, 2, 3, 1), x[:, 0] > 0.1, v),
    "a vector for each token": lambda x, v: written(
        x.flatten(2).transpose(1, 2), (x[:, 0] > 0.1).flatten(1), v[None]
    ),
    "a vector for each of some positions": lambda x, v: written(
        x, (slice(None), slice(None), x[0, 0] > 0), v[:, None]
    ),
    "tokens and others": among_tokens,
    "a channel": in_a_part,
    "whole images": lambda x, v: written(x, torch.tensor([True, False]), v.mean()),
    "known channels": lambda x, v: written(x, (slice(None), torch.arange(WIDTH) % 2 == 0), v.mean()),
}


@by_name(WRITTEN)
def test_it_streams(case: Callable[[Tensor, Tensor], Tensor]) -> None:
    assert_streams(Hiding(case))


def other_values(x: Tensor, v: Tensor) -> Tensor:
    """As many values as there are positions where the mask is true."""
    mask = torch.arange(x.shape[2]) % 4 == 0
    x[:, :, mask] = x[:, :, ~mask][:, :, : int(mask.sum())].sin()
    return x * 2


OTHERS = {
    "several values": other_values,
    "added": lambda x, v: torch.index_put(x, (x > 0,), v[0], accumulate=True),
}


@by_name(OTHERS)
def test_what_is_no_choice_is_that_of_plain_pytorch_too(case: Callable[[Tensor, Tensor], Tensor]) -> None:
    assert verify(after_convolution(Hiding(case)), SHAPE, tile=TILE).max_error < 1e-9


def hard_examples(logits: Tensor, target: Tensor) -> Tensor:
    """The mean over pixels whose class is not certain, with ignored labels overwritten, as OCRNet has it."""
    known = target.clone()
    known[known == 2] = 0
    losses = F.cross_entropy(logits, target, ignore_index=2, reduction="none")
    certainty = logits.softmax(1).gather(1, known.unsqueeze(1)).squeeze(1)
    is_hard = (target != 2) & (certainty < 1.5 / CLASSES)
    return (losses * is_hard).sum() / is_hard.sum()


@pytest.mark.parametrize("num_images", [1, 2])
def test_ignored_labels_are_overwritten_in_tiles(num_images: int) -> None:
    image, target = an_image()[:num_images], some_classes()[:num_images]
    streamed, plain, model = both(WithLoss(hard_examples).double(), image, target)
    assert_equal(streamed, plain)
    assert model.plan(tuple(image.shape), inputs=(target,)).residents == ()
