"""On a CUDA device: code that makes tensors on the host, or moves them, within its forward pass."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from gpu_cases import GPU, assert_same, update
from helpers import all_in_tiles
from torch import Tensor, nn

from streamcnn import StreamingModel

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("gpu_left_clean")]

WIDTH = 6
_VALUES = [1.0, 2.0, 3.0, 4.0, 5.0, 6.0]


def _coordinates(x: Tensor) -> Tensor:
    n, _, h, w = x.shape
    rows = torch.arange(h).view(1, 1, h, 1).expand(n, 1, h, w).to(x.dtype).to(x.device) / h
    columns = torch.arange(w).view(1, 1, 1, w).expand(n, 1, h, w).type_as(x) / w
    return torch.cat([x[:, :-2], rows, columns], 1)


def _filled(x: Tensor) -> Tensor:
    frame = torch.zeros(x.shape[-2:], dtype=torch.bool)
    frame[:3] = True
    return x.masked_fill(frame.to(x.device), 0)


def _blurred(x: Tensor) -> Tensor:
    kernel = torch.tensor([[1.0, 2.0, 1.0], [2.0, 4.0, 2.0], [1.0, 2.0, 1.0]]) / 16
    return F.conv2d(x, kernel[None, None].repeat(x.shape[1], 1, 1, 1).to(x), padding=1, groups=x.shape[1])


CODE: dict[str, Callable[[Tensor], Tensor]] = {
    "made on the device": lambda x: x * torch.arange(x.shape[-1], device=x.device),
    "made on the host and moved": lambda x: x + torch.linspace(0, 1, x.shape[-1]).to(x.device),
    "coordinates": _coordinates,
    "values": lambda x: x * torch.tensor(_VALUES, device=x.device)[:, None, None],
    "values, moved": lambda x: x * torch.tensor(_VALUES).to(x)[:, None, None],
    "values, computed with on the host": lambda x: (
        x * (torch.arange(WIDTH) * torch.tensor(_VALUES)).to(x)[:, None, None]
    ),
    "a frame on the host": _filled,
    "a kernel of values": _blurred,
    "a number as a tensor": lambda x: x * torch.tensor(0.3) + torch.tensor(2),
    "numbers of channels on the host": lambda x: x[:, torch.tensor([5, 4, 3, 2, 1, 0])],
    "there and back": lambda x: (x.cpu() * 2).to(x.device),
    "a branch on the device": lambda x: x * 2 if x.is_cuda else x * 3,
}


class Net(nn.Module):
    """A convolution, a norm, code, and the mean of each channel."""

    def __init__(self, code: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, WIDTH, 3)
        self.norm = nn.BatchNorm2d(WIDTH)
        self.code = code

    def forward(self, x: Tensor) -> Tensor:
        return torch.sigmoid(self.code(self.norm(self.conv(x)))).mean((2, 3))


def assert_streams(net: nn.Module) -> None:
    """Two passes of an image, and one of another size."""
    plain = copy.deepcopy(net).double().to(GPU)
    model = all_in_tiles(net.double().to(GPU))
    for shape in ((2, 3, 40, 37), (2, 3, 40, 37), (1, 3, 33, 50)):
        image = torch.randn(shape, dtype=torch.float64, device=GPU)
        model.zero_grad()
        plain.zero_grad()
        assert_same(update(model, image), update(plain, image), 1e-10)


@pytest.mark.parametrize("code", CODE.values(), ids=CODE.keys())
def test_code(code: Callable[[Tensor], Tensor]) -> None:
    assert_streams(Net(code))


class Keeps(Net):
    """A layer that keeps a tensor which is none of its buffers, and starts on the host."""

    def __init__(self, change: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__(self._shifted)
        self.change = change
        self.kept = torch.linspace(0, 1, WIDTH)[:, None, None]

    def _shifted(self, x: Tensor) -> Tensor:
        self.kept = self.change(self.kept, x)
        return x - self.kept.to(x)


def _means(x: Tensor) -> Tensor:
    return 0.1 * x.detach().mean((0, 2, 3))[:, None, None]


KEPT: dict[str, Any] = {
    "in the type of a map": lambda kept, x: kept.type_as(x),
    "an average on the device": lambda kept, x: kept.to(x) * 0.9 + _means(x),
    "an average on the host": lambda kept, x: kept * 0.9 + _means(x).cpu(),
}


@pytest.mark.parametrize("change", KEPT.values(), ids=KEPT.keys())
def test_what_is_kept(change: Callable[[Tensor, Tensor], Tensor]) -> None:
    net = Keeps(change)
    assert_streams(net)
    assert not net.kept.requires_grad
    model = StreamingModel(net, tile=16)
    plan = model.plan((1, 3, 40, 40), torch.float64)
    assert not plan.residents
