"""Streaming that begins again after an operator on whole maps."""

from __future__ import annotations

import pytest
import torch
from helpers import assert_streamed_equals_plain, traced
from torch import Tensor, nn

from streamcnn.graph.program import Kind, on_whole_maps

HEAVY = ("conv2d", "conv_transpose2d", "linear", "upsample")


def conv(before: int, after: int, stride: int = 1) -> nn.Module:
    return nn.Sequential(nn.Conv2d(before, after, 3, stride, 1, bias=False), nn.BatchNorm2d(after), nn.ReLU())


class Rows(nn.Module):
    """Norms of columns are bounded: each position depends on a whole column, and there is no rule."""

    def forward(self, x: Tensor) -> Tensor:
        return x.renorm(2, 3, 9.0).sin()


class ChannelsLast(nn.Linear):
    """A linear layer of each position."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


AFTER = {
    "convolution": lambda: nn.Sequential(conv(6, 6), conv(6, 4)),
    "transposed": lambda: nn.ConvTranspose2d(6, 4, 2, stride=2),
    "upsampled": lambda: nn.Sequential(nn.Upsample(scale_factor=2, mode="bilinear"), conv(6, 4)),
    "channels last": lambda: nn.Sequential(ChannelsLast(6, 6), conv(6, 4)),
    "twice": lambda: nn.Sequential(conv(6, 6), Rows(), conv(6, 4)),
}


def interrupted(kind: str) -> nn.Module:
    """Convolutions before and after an operator on whole maps."""
    return nn.Sequential(conv(3, 6, stride=2), Rows(), AFTER[kind](), nn.AdaptiveAvgPool2d(1))


@pytest.mark.parametrize("kind", AFTER)
def test_what_follows_is_streamed_and_exact(kind: str) -> None:
    net = interrupted(kind)
    assert_streamed_equals_plain(net, (2, 3, 46, 38), tile=8, resident=True)
    program, _ = traced(net, (2, 3, 46, 38))
    whole = {node.name for node in on_whole_maps(program)}
    heavy = [node for node in program.nodes.values() if node.name.startswith(HEAVY)]
    assert len(heavy) >= 2
    assert not whole.intersection(node.name for node in heavy)


def test_small_grids_stay_whole() -> None:
    program, _ = traced(interrupted("convolution"), (1, 3, 14, 14))
    assert "conv2d_1" in {node.name for node in on_whole_maps(program)}


class Gated(nn.Module):
    """A gate made of means over whole maps: convolutions of one position."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.gate = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        return (x * torch.sigmoid(self.gate(x.renorm(2, 3, 9.0).mean((2, 3), keepdim=True)))).mean((2, 3))


def test_one_position_is_no_map() -> None:
    program, _ = traced(Gated(), (1, 3, 40, 40))
    assert program.nodes["conv2d_1"].kind is Kind.GLOBAL
