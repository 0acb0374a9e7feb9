"""The network designed for UltraMNIST: one small trunk looks at the image at every octave of scale."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

FIELD = 36
"""Pixels of a level that one feature looks at, from edge to edge."""
WIDTHS = (16, 32, 48, 64)
"""Channels after the stem and after each of three convolutions."""


class ScalePyramid(nn.Module):
    """Features of the same meaning at every scale, so that a digit of any size looks like a small one.

    The image (N, C, H, W) is halved again and again. Each level goes through the same trunk, whose stem takes
    pieces of 4 x 4 pixels: at full resolution, where nearly all positions are, there is no map wider than a
    quarter of the image. Of each feature, the largest over all positions and levels and the sum of the
    levels' means are classified by two fully connected layers. With seven levels, a feature of the last looks
    at 2304 pixels.

    Parameters
    ----------
    num_classes, num_channels
        Of the logits (N, num_classes) and of the image.
    num_levels
        Octaves; an image has to be ``4 * 2**num_levels`` pixels wide and high at least.
    widths
        Channels after the stem and after each of three convolutions.
    """

    def __init__(
        self,
        num_classes: int,
        num_channels: int = 1,
        num_levels: int = 5,
        widths: tuple[int, int, int, int] = WIDTHS,
    ) -> None:
        super().__init__()
        self.num_levels = num_levels
        self.trunk = make_trunk(widths, num_channels)
        self.head = nn.Sequential(nn.Linear(2 * widths[-1], 100), nn.ReLU(), nn.Linear(100, num_classes))

    def forward(self, image: Tensor) -> Tensor:
        """Logits (N, num_classes)."""
        largest: Tensor | None = None
        total: Tensor | None = None
        for level in range(self.num_levels):
            features = self.trunk(image if level == 0 else F.avg_pool2d(image, 2**level))
            peak, average = features.amax((2, 3)), features.mean((2, 3))
            largest = peak if largest is None else torch.maximum(largest, peak)
            total = average if total is None else total + average
        assert largest is not None
        assert total is not None
        return self.head(torch.cat([largest, total], 1))


def scale_pyramid(num_classes: int, size: int) -> ScalePyramid:
    """For images of ``size`` pixels, with as many levels as let a feature look at half of the image."""
    num_levels = 1
    while 2 * FIELD * 2 ** (num_levels - 1) < size:
        num_levels += 1
    return ScalePyramid(num_classes, num_levels=num_levels)


def make_trunk(widths: tuple[int, int, int, int], num_channels: int = 1) -> nn.Sequential:
    """What a level goes through: from (N, C, H, W) to (N, the last of ``widths``, H / 8, W / 8)."""
    stem, first, second, last = widths
    return nn.Sequential(
        *_convolution(num_channels, stem, kernel=4, stride=4),
        *_convolution(stem, first, kernel=3),
        *_convolution(first, second, kernel=3, stride=2),
        *_convolution(second, last, kernel=3),
    )


def _convolution(before: int, after: int, *, kernel: int, stride: int = 1) -> tuple[nn.Module, ...]:
    padding = 0 if kernel == stride else kernel // 2
    return (
        nn.Conv2d(before, after, kernel, stride, padding, bias=False),
        nn.BatchNorm2d(after),
        nn.ReLU(),
    )
