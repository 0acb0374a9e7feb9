"""Convolutions, norms and padding of tokens and windows, streamed and plain."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from einops import rearrange
from helpers import randomized, streaming_plan
from operator_cases import TILE, WIDTH, Applied, after_convolution, assert_streams, by_name
from torch import Tensor, nn
from torch.nn import functional as F

SHAPE = (2, 3, 22, 18)
"""A shape whose extents windows of two positions divide."""


def tokens(x: Tensor) -> Tensor:
    """A map as tokens (N, C, H * W)."""
    return x.flatten(2)


def tokens_last(x: Tensor) -> Tensor:
    """The same, whose map has its channels last, as (N, H * W, C) seen from the other side."""
    return x.permute(0, 2, 3, 1).flatten(1, 2).transpose(1, 2)


def turned_tokens(x: Tensor) -> Tensor:
    """Tokens column by column."""
    return x.transpose(2, 3).flatten(2)


def windows(x: Tensor) -> Tensor:
    """Windows of two rows and two columns, each an image of the batch."""
    return rearrange(x, "n c (h p) (w q) -> (n h w) c p q", p=2, q=2)


def patches(x: Tensor) -> Tensor:
    """The same places of all windows together (N, C, 4, H * W / 4), as in MobileViT."""
    return rearrange(x, "n c (h p) (w q) -> n c (p q) (h w)", p=2, q=2)


def scores(x: Tensor) -> Tensor:
    """Of each token for five keys, by two channels each (N, heads, H * W, 5), as in ResT."""
    heads = tokens(x).unflatten(1, (3, 2)).transpose(2, 3)
    return (heads @ torch.linspace(-1, 1, 10).to(x).view(2, 5)).softmax(-1)


def upright(x: Tensor) -> Tensor:
    """Stripes of two columns, each an image of the batch, as in CSWin."""
    return rearrange(x, "n c h (w q) -> (n w) c h q", q=2)


def lying(x: Tensor) -> Tensor:
    """Stripes of two rows, turned on their sides."""
    return rearrange(x, "n c (h p) w -> (h n) c w p", p=2)


def rows(x: Tensor) -> Tensor:
    return rearrange(x, "n c h w -> (n h) c w")


def columns(x: Tensor) -> Tensor:
    return rearrange(x, "n c h w -> (w n) c h")


def chain(*layers: nn.Module | Callable[[Tensor], Tensor]) -> nn.Module:
    """Functions and layers in a row, with a state that shows errors."""
    modules = [each if isinstance(each, nn.Module) else Applied(each) for each in layers]
    return randomized(nn.Sequential(*modules))


IMAGES: dict[str, Callable[[], nn.Module]] = {
    "group norm of tokens": lambda: chain(tokens, nn.GroupNorm(2, WIDTH), torch.sin),
    "group norm of tokens, channels last": lambda: chain(tokens_last, nn.GroupNorm(3, WIDTH), torch.sin),
    "group norm of turned tokens": lambda: chain(turned_tokens, nn.GroupNorm(1, WIDTH), torch.sin),
    "group norm of one image": lambda: chain(lambda x: tokens(x[:1]), nn.GroupNorm(2, WIDTH), torch.sin),
    "group norm of patches": lambda: chain(patches, nn.GroupNorm(2, WIDTH), torch.sin),
    "group norm of windows": lambda: chain(windows, nn.GroupNorm(2, WIDTH), torch.sin),
    "instance norm of tokens": lambda: chain(tokens_last, nn.InstanceNorm1d(WIDTH, affine=True), torch.sin),
    "instance norm with a running mean": lambda: chain(
        tokens, nn.InstanceNorm1d(WIDTH, track_running_stats=True), torch.sin
    ),
    "instance norm of patches": lambda: chain(patches, nn.InstanceNorm2d(WIDTH, affine=True), torch.sin),
    "instance norm of scores": lambda: chain(scores, nn.InstanceNorm2d(3), torch.sin),
    "instance norm of windows": lambda: chain(windows, nn.InstanceNorm2d(WIDTH), torch.sin),
    "batch norm of tokens": lambda: chain(tokens_last, nn.BatchNorm1d(WIDTH), torch.sin),
    "batch norm of windows": lambda: chain(windows, nn.BatchNorm2d(WIDTH), torch.sin),
    "batch norm of patches": lambda: chain(patches, nn.BatchNorm2d(WIDTH), torch.sin),
    "channels of tokens mixed": lambda: chain(
        tokens_last, nn.Conv1d(WIDTH, 4, 1, groups=2), nn.Conv1d(4, 2, 1, bias=False, padding="same")
    ),
    "channels of patches mixed": lambda: chain(
        patches, nn.Conv2d(WIDTH, 4, 1), torch.sin, nn.Conv2d(4, 2, 1)
    ),
    "convolutions of windows": lambda: chain(
        windows,
        nn.Conv2d(WIDTH, 4, 3, padding=1),
        nn.ReflectionPad2d(1),
        nn.ConvTranspose2d(4, 3, 2),
        nn.MaxPool2d(2, 1),
        nn.AvgPool2d(2),
    ),
    "windows made finer": lambda: chain(
        windows, nn.Upsample(scale_factor=2, mode="bilinear"), nn.PixelUnshuffle(4)
    ),
    "windows pooled and made finer": lambda: chain(
        windows,
        nn.Upsample(5, mode="bicubic"),
        nn.AdaptiveAvgPool2d(2),
        lambda x: F.interpolate(x, (3, 1), mode="bilinear", antialias=True),
    ),
    "convolutions along windows": lambda: chain(
        windows, nn.Flatten(2), nn.Conv1d(WIDTH, 4, 3, padding=1), nn.AvgPool1d(2), nn.MaxPool1d(2)
    ),
    "convolutions of upright stripes": lambda: chain(
        upright,
        nn.Conv2d(WIDTH, 4, 3, padding=1),
        torch.sin,
        nn.Conv2d(4, 4, (4, 2), (2, 1), (1, 0), groups=2),
    ),
    "convolutions of lying stripes": lambda: chain(
        lying, nn.Conv2d(WIDTH, 4, (3, 1), 2, dilation=2, bias=False), nn.Conv2d(4, 2, 3, padding="same")
    ),
    "convolutions of one image's stripes": lambda: chain(
        lambda x: upright(x[:1]), nn.Conv2d(WIDTH, 4, 3, padding=1), torch.sin
    ),
    "convolutions of rows": lambda: chain(
        rows,
        nn.Conv1d(WIDTH, 4, 3, 2, 1),
        nn.Conv1d(4, 4, 1),
        torch.sin,
        nn.Conv1d(4, 4, 3, padding="same", groups=2),
    ),
    "convolutions of columns": lambda: chain(
        columns, nn.Conv1d(WIDTH, 4, 4, dilation=2, bias=False), torch.sin
    ),
    "convolutions of one image's columns": lambda: chain(
        lambda x: columns(x[:1]), nn.Conv1d(WIDTH, 4, 3, padding=2), torch.sin
    ),
    "a mean of tokens": lambda: chain(lambda x: tokens_last(x).square(), nn.AdaptiveAvgPool1d(1)),
    "a mean of windows": lambda: chain(windows, nn.Flatten(2), nn.AdaptiveAvgPool1d(1), torch.sin),
    "a frame around channels": lambda: chain(
        lambda x: F.pad(tokens(x).transpose(1, 2), (1, 2), value=0.7), torch.sin
    ),
    "a frame around columns": lambda: chain(
        lambda x: F.pad(rearrange(x, "n c h w -> (n h) w c"), (-1, 0, 1, 3), value=0.7), torch.sin
    ),
}


@pytest.mark.parametrize("train", [True, False])
@by_name(IMAGES)
def test_images_with_merged_axes_stream(case: Callable[[], nn.Module], train: bool) -> None:
    assert_streams(case().train(train), SHAPE)


WHOLE: dict[str, tuple[str, Callable[[], nn.Module]]] = {
    "group norm of rows": (
        "aten.group_norm: it is not applied to images or tokens",
        lambda: chain(rows, nn.GroupNorm(2, WIDTH)),
    ),
    "group norm with positions as channels": (
        "aten.group_norm: it is not applied to images or tokens",
        lambda: chain(lambda x: tokens(x).transpose(1, 2), nn.GroupNorm(11, 22 * 18)),
    ),
    "instance norm of windows that moves statistics": (
        "aten.instance_norm: it is not applied to images or tokens",
        lambda: chain(windows, nn.InstanceNorm2d(WIDTH, track_running_stats=True)),
    ),
    "instance norm of scores that moves statistics": (
        "aten.instance_norm: it is not applied to images or tokens",
        lambda: chain(scores, nn.InstanceNorm2d(3, track_running_stats=True)),
    ),
    "convolution along positions": (
        "aten.conv1d: it works along merged axes of space",
        lambda: chain(tokens, nn.Conv1d(WIDTH, 2, 3)),
    ),
    "convolution with a stride": (
        "aten.conv1d: it works along merged axes of space",
        lambda: chain(tokens, nn.Conv1d(WIDTH, 2, 1, stride=2)),
    ),
    "convolution of positions as channels": (
        "aten.conv1d: it is not applied to images or tokens",
        lambda: chain(lambda x: tokens(x).transpose(1, 2), nn.Conv1d(22 * 18, 2, 1)),
    ),
    "pooling along positions": (
        "aten.avg_pool1d: it works along merged axes of space",
        lambda: chain(tokens, nn.AvgPool1d(3)),
    ),
    "tokens reflected": (
        "aten.pad: it works along merged axes of space",
        lambda: chain(lambda x: F.pad(tokens(x), (1, 0), mode="reflect")),
    ),
}


@by_name(WHOLE)
def test_other_images_with_merged_axes_are_whole(case: tuple[str, Callable[[], nn.Module]]) -> None:
    reason, build = case
    (resident,) = streaming_plan(after_convolution(build()), SHAPE, TILE)[1].residents
    assert resident.startswith(reason)
    assert_streams(build(), SHAPE, resident=True)
