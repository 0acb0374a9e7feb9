"""Blocks, unpooling, volumes and softmax over positions, streamed and plain."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from helpers import streaming_plan
from operator_cases import SHAPE, TILE, WIDTH, Applied, Function, after_convolution, assert_streams, by_name
from torch import Tensor, nn
from torch.nn import functional as F

from streamcnn import StreamingModel


class Unpooling(nn.Module):
    """Max pooling, and its values changed and put back."""

    def __init__(self, *window: int | tuple[int, int], ceil: bool = False) -> None:
        super().__init__()
        self.window, self.ceil = window, ceil

    def forward(self, x: Tensor) -> Tensor:
        kernel, stride, padding = self.window
        y, places = F.max_pool2d(x, *self.window, ceil_mode=self.ceil, return_indices=True)
        back = F.max_unpool2d(y.sin() + y, places, kernel, stride, padding, output_size=x.shape[2:])
        return back * x + back.cos()


def unpooled_elsewhere(y: Tensor, places: Tensor, x: Tensor) -> Tensor:
    """Values put back one column to the right."""
    return F.max_unpool2d(y, places + 1, 2, output_size=x.shape[2:])


def slices(x: Tensor) -> Tensor:
    """A map as a volume of one slice."""
    return x.unsqueeze(2)


def columns(x: Tensor) -> Tensor:
    """A convolution written as a product with blocks."""
    weight = torch.linspace(-1, 1, 4 * WIDTH * 9).reshape(4, -1).to(x)
    return (weight @ F.unfold(x, 3, padding=1)).view(len(x), 4, *x.shape[2:])


def columns_last(x: Tensor) -> Tensor:
    """The same with blocks as tokens, put together by a fold of single positions."""
    weight = torch.linspace(-1, 1, 4 * WIDTH * 9).reshape(-1, 4).to(x)
    blocks = F.unfold(x, 3, padding=1, stride=2).transpose(1, 2) @ weight
    return F.fold(blocks.transpose(1, 2), (11, 9), 1)


STREAMED: dict[str, nn.Module | Function] = {
    "unpooling": Unpooling(2, 2, 0),
    "unpooling with gaps": Unpooling((2, 1), (3, 2), 0),
    "unpooling with padding": Unpooling((2, 3), (2, 3), (1, 0), ceil=True),
    "places of maxima": lambda x: F.max_pool2d(x, 3, 2, 1, return_indices=True)[1] * x[..., ::2, ::2],
    "a convolution of a slice": nn.Sequential(Applied(slices), nn.Conv3d(WIDTH, 4, 3, padding=1)),
    "a strided convolution of slices": nn.Sequential(
        Applied(lambda x: torch.stack((x, x.sin(), x.cos()), 2)),
        nn.Conv3d(WIDTH, 4, (2, 3, 2), (1, 2, 3), (1, 0, 4), (2, 1, 3)),
    ),
    "a convolution by blocks": columns,
    "a convolution by blocks, channels last": columns_last,
    "blocks put together": lambda x: F.fold(
        F.unfold(x, (3, 2), 2, 3, (2, 1)).sin(), (21, 17), (3, 2), 2, 3, (2, 1)
    ),
    "blocks put together with gaps": lambda x: F.fold(
        F.unfold(x, 2, stride=3).sin(), (21, 17), 2, stride=3
    ).cos(),
    "softmax over rows": lambda x: x.softmax(2) * x.log_softmax(3),
    "softmax over positions": lambda x: x * x.flatten(2).softmax(-1).view_as(x) * 100,
    "log-softmax over everything": lambda x: x.flatten(1).log_softmax(1).square(),
    "log of a sum of exponentials": lambda x: (
        x.logsumexp((2, 3)) * x.flatten(2).logsumexp(-1) + x.sum((2, 3))
    ),
    "log of a sum of rows": lambda x: x.logsumexp((1, 2)).sin(),
    "a context of all positions": lambda x: (
        x + (x.flatten(2) @ x.mean(1).flatten(1).softmax(1)[..., None])[..., None]
    ),
    "attention over pairs of positions": lambda x: (
        (x.flatten(2).mT @ x.flatten(2)).flatten(1).softmax(1).view(2, 21 * 17, 21 * 17) @ x.flatten(2).mT
    ),
}


@by_name(STREAMED)
def test_streams(case: nn.Module | Function) -> None:
    assert_streams(case)


WHOLE: dict[str, tuple[str, Callable[[], nn.Module]]] = {
    "unpooling of windows that overlap": (
        "aten.max_unpool2d: its windows overlap",
        lambda: Unpooling(3, 2, 1),
    ),
    "unpooling to another size": (
        "aten.max_unpool2d: its places are those of another size",
        lambda: Applied(lambda x: F.max_unpool2d(*F.max_pool2d(x[..., :16], 2, return_indices=True), 2)),
    ),
    "unpooling to places worked out": (
        "aten.max_unpool2d: its places are not as max pooling gave them",
        lambda: Applied(lambda x: unpooled_elsewhere(*F.max_pool2d(x, 2, return_indices=True), x)),
    ),
    "sampling at a grid": (
        "aten.grid_sampler: where it reads depends on values",
        lambda: Applied(lambda x: F.grid_sample(x, torch.tanh(x[:, :2]).movedim(1, -1), align_corners=False)),
    ),
    "blocks of another grid": (
        "aten.col2im: it is not applied to images or tokens",
        lambda: Applied(lambda x: F.fold(x.flatten(2), (17, 21), 1)),
    ),
    "same padding that is uneven": (
        "aten.conv3d: it pads other axes than the spatial ones unevenly",
        lambda: nn.Sequential(Applied(slices), nn.Conv3d(WIDTH, 2, (2, 1, 1), padding="same")),
    ),
}


@by_name(WHOLE)
# Plain PyTorch says that it copies its input; streaming does not.
@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel:UserWarning")
def test_is_whole(case: tuple[str, Callable[[], nn.Module]]) -> None:
    reason, build = case
    (resident,) = streaming_plan(after_convolution(build()), SHAPE, TILE)[1].residents
    assert resident.startswith(reason)
    assert_streams(build(), resident=True)


@pytest.mark.parametrize("dilation", [1, 2])
def test_places_in_windows_of_minus_infinity(dilation: int) -> None:
    class Net(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            y = torch.where(x > 0.9, x, -math.inf)
            return F.max_pool2d(y, 3, 1, 1, dilation, return_indices=True)[1]

    image = torch.rand(2, 3, 19, 15)
    model = StreamingModel(Net(), tile=5)
    model.resident_tail = False
    assert torch.equal(model(image), Net()(image))


def test_softmax_over_positions_in_half_precision() -> None:
    class Net(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return (x * 9).flatten(2).softmax(-1) * 100

    image = torch.rand(2, 3, 19, 15).bfloat16()
    model = StreamingModel(Net(), tile=5)
    model.resident_tail = False
    found = model(image)
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found, Net()(image))
