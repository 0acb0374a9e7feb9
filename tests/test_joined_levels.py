"""Levels of a pyramid that are joined along their anchors, as detectors do: they stay in parts."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch
from helpers import assert_streamed_equals_plain
from operator_cases import by_name
from torch import Tensor, nn
from torch.nn import functional as F

SHAPE = (2, 3, 20, 16)
TILE = (8, 7)
CHANNELS = 8
Head = Callable[[Sequence[Tensor]], object]


class Detector(nn.Module):
    """Three levels, one head for all, and a function of its results."""

    def __init__(self, function: Head) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 6, 3, padding=1)
        self.down = nn.ModuleList([nn.Conv2d(6, 6, 3, stride=2, padding=1) for _ in range(2)])
        self.head = nn.Conv2d(6, CHANNELS, 3, padding=1)
        self.function = function

    def forward(self, x: Tensor) -> object:
        levels = [self.first(x).relu()]
        for layer in self.down:
            levels.append(layer(levels[-1]).relu())
        return self.function([self.head(each) for each in levels])


def anchors_last(levels: Sequence[Tensor]) -> Tensor:
    """Two anchors of four numbers at each position: (N, anchors, 4)."""
    shapes = [(len(x), -1, 4, *x.shape[2:]) for x in levels]
    parts = [x.view(shape).permute(0, 3, 4, 1, 2) for x, shape in zip(levels, shapes, strict=True)]
    return torch.cat([part.reshape(len(part), -1, 4) for part in parts], 1)


def places(levels: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """The positions (1, anchors, 2) of all levels in order, and their strides (1, anchors, 1)."""
    grids, strides = [], []
    for index, x in enumerate(levels):
        rows, cols = torch.meshgrid(*map(torch.arange, x.shape[2:]), indexing="ij")
        grids.append(torch.stack((cols, rows), 2).view(1, -1, 2))
        strides.append(torch.full((1, rows.numel(), 1), 2**index))
    return torch.cat(grids, 1).to(levels[0]), torch.cat(strides, 1).to(levels[0])


def decoded(levels: Sequence[Tensor]) -> Tensor:
    """Boxes and scores (YOLOX)."""
    out = torch.cat([x.flatten(start_dim=2) for x in levels], dim=2).permute(0, 2, 1)
    grids, strides = places(levels)
    centres = (out[..., :2] + grids) * strides
    return torch.cat((centres, out[..., 2:4].exp() * strides, out[..., 4:].sigmoid()), -1)


def decoded_in_place(levels: Sequence[Tensor]) -> Tensor:
    out = torch.cat([x.flatten(2) for x in levels], 2).permute(0, 2, 1).contiguous() * 1
    grids, strides = places(levels)
    out[..., :2] = (out[..., :2] + grids) * strides
    out[..., 2:4] = out[..., 2:4].exp() * strides
    out[..., 4:5] = strides
    return out


def one_level_in_place(levels: Sequence[Tensor]) -> Tensor:
    tokens = levels[0].flatten(2).transpose(1, 2).sin()
    tokens[..., 1:3] = tokens[..., 3:5] * 2 - tokens[..., :1]
    return tokens


def losses(levels: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """A focal loss (RetinaNet) and others, against targets of all anchors."""
    out = anchors_last(levels)
    target = torch.linspace(-9, 9, out.numel()).sin().view(out.shape).to(out)
    hard = (target > 0.3).to(out)
    entropy = F.binary_cross_entropy_with_logits(out, hard, reduction="none")
    focal = (entropy * (1 - torch.exp(-entropy)) ** 2).sum() / hard.sum()
    return (
        focal,
        F.binary_cross_entropy_with_logits(out, hard) + F.mse_loss(out, target),
        F.smooth_l1_loss(out, target, reduction="sum") + F.l1_loss(out, target),
        F.l1_loss(levels[0].flatten(2), target.new_ones(levels[0].flatten(2).shape)),
    )


def scores(levels: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """The best class of each anchor, and sums over anchors (FCOS)."""
    classes = torch.cat([x[:, :4].flatten(2).transpose(1, 2) for x in levels], 1)
    boxes = torch.cat([x[:, 4:].permute(0, 2, 3, 1).flatten(1, 2).relu() for x in levels], 1)
    best, index = classes.max(-1)
    chances = classes.softmax(-1) * classes.sigmoid().amax(-1, keepdim=True) + best[..., None]
    chosen = classes.gather(2, index[..., None]) * F.one_hot(index, 4)
    return chances, boxes.sum(1) * chosen.mean(1), index


def apart_again(levels: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Cut into levels again."""
    boxes, classes = anchors_last(levels).split([2, 2], -1)
    parts = boxes.split([2 * x.shape[2] * x.shape[3] for x in levels], 1)
    means = torch.stack([part.sin().mean(1) for part in parts]).sum(0)
    return means, classes.mean(1), parts[0]


STREAMED: dict[str, Head] = {
    each.__name__: each
    for each in (decoded, decoded_in_place, one_level_in_place, losses, scores, apart_again)
}


@by_name(STREAMED)
def test_levels_in_parts(case: Head) -> None:
    torch.manual_seed(0)
    assert_streamed_equals_plain(Detector(case), SHAPE, tile=TILE)


WHOLE: dict[str, Head] = {
    "the best anchors": lambda levels: anchors_last(levels).amax(-1).topk(5, 1)[0],
    "maxima over anchors": lambda levels: anchors_last(levels).relu().amax(1),
    "a range inside a level": lambda levels: anchors_last(levels)[:, 3:9].sin(),
}


@pytest.mark.parametrize("case", WHOLE.values(), ids=WHOLE.keys())
def test_levels_that_meet(case: Head) -> None:
    torch.manual_seed(0)
    assert_streamed_equals_plain(Detector(case), SHAPE, tile=TILE, resident=True)
