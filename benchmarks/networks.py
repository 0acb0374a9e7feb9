"""Networks that timm does not have, for benchmarks and tests."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor, nn


class _Twice(nn.Sequential):
    """Two convolutions with batch norm."""

    def __init__(self, before: int, after: int) -> None:
        layers: list[nn.Module] = []
        for width in (before, after):
            layers += [
                nn.Conv2d(width, after, 3, padding=1, bias=False),
                nn.BatchNorm2d(after),
                nn.ReLU(inplace=True),
            ]
        super().__init__(*layers)


class UNet(nn.Module):
    """Three scales with skips; the result is as large as the image, whatever its size."""

    def __init__(self, width: int = 24, *, channels: int = 3, classes: int = 2) -> None:
        super().__init__()
        widths = (width, 2 * width, 3 * width, 4 * width)
        self.pool = nn.MaxPool2d(2, ceil_mode=True)
        self.down = nn.ModuleList(_Twice(a, b) for a, b in zip((channels, *widths), widths, strict=False))
        self.up = nn.ModuleList(nn.ConvTranspose2d(b, a, 2, stride=2) for a, b in pairwise(widths))
        self.join = nn.ModuleList(_Twice(2 * a, a) for a in widths[:-1])
        self.head = nn.Conv2d(width, classes, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Class scores (N, classes, H, W) of an image (N, channels, H, W)."""
        skips: list[Tensor] = []
        for block in self.down:
            x = block(self.pool(x) if skips else x)
            skips.append(x)
        for skip, up, join in zip(reversed(skips[:-1]), reversed(self.up), reversed(self.join), strict=True):
            x = up(x)[..., : skip.shape[2], : skip.shape[3]]
            x = join(torch.cat((skip, x), dim=1))
        return self.head(x)
