"""Convolutions and pooling of one image (C, H, W), without a batch axis, as plain PyTorch allows."""

from __future__ import annotations

import pytest
import torch
from helpers import assert_streamed_equals_plain
from torch import Tensor, nn
from torch.nn import functional as F


class EachImage(nn.Module):
    """The layers on one image after the other."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.down = nn.Conv2d(3, 6, 3, padding=1), nn.Conv2d(6, 4, 3, stride=2, groups=2)
        self.up, self.same = nn.ConvTranspose2d(4, 5, 2, stride=2), nn.Conv2d(5, 5, 3, padding="same")

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([self.one(image) for image in x.unbind(0)])

    def one(self, image: Tensor) -> Tensor:
        y = self.same(self.up(self.down(self.first(image).sin()))).tanh()
        values, _ = F.max_pool2d(y, 2, return_indices=True)
        pooled = (F.max_pool2d(y, 2) + F.avg_pool2d(y, 2) * values).mean((1, 2))
        return torch.cat(
            (pooled, F.adaptive_avg_pool2d(y, 1).flatten(), F.adaptive_max_pool2d(y, 2).flatten())
        )


class First(EachImage):
    """Maps of the first image alone, beside those of all."""

    def forward(self, x: Tensor) -> Tensor:
        return self.first(x) * self.first(x[0]).sin() + self.same(self.up(self.down(self.first(x[0])))).mean()


@pytest.mark.parametrize("kind", [EachImage, First])
@pytest.mark.parametrize("count", [1, 2])
def test_one_image_without_a_batch(kind: type[nn.Module], count: int) -> None:
    torch.manual_seed(0)
    assert_streamed_equals_plain(kind(), (count, 3, 22, 18), tile=(8, 7))
