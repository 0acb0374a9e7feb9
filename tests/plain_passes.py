"""The passes of ``triton_passes`` in plain operators, and a patch that makes a CPU use them as a GPU does."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from streamcnn.execution.steps import Steps
from streamcnn.graph.ops import channel_kernels
from streamcnn.graph.ops.activations import IDENTITY, Activation
from streamcnn.runtime import plan_cache
from streamcnn.stores import memory

ACTIVATIONS = (
    IDENTITY,
    Activation("relu"),
    Activation("hardtanh", -0.5, 1.5),
    Activation("leaky_relu", 0.1),
    Activation("silu"),
    Activation("hardswish"),
)


def operands(shape: tuple[int, ...], dtype: torch.dtype, generator: torch.Generator) -> tuple[Tensor, ...]:
    """A map far from zero, a gradient of it, another map, and a mean, a scale and a shift.

    No normalised value is so close to a kink of an activation that rounding could take it across.
    """
    x, gradient, summand = (torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(3))
    x, summand = ((4 * each).round() / 4 for each in (3 + x, summand))
    maps = (each.to(dtype, memory_format=torch.channels_last) for each in (x, gradient, summand))
    statistics = torch.promote_types(dtype, torch.float32)
    scale = torch.randint(-1, 2, (shape[1],), generator=generator).to(statistics).exp2()
    return (*maps, torch.full_like(scale, 3.25), scale, torch.full_like(scale, 0.1))


def normalised(
    x: Tensor, mean: Tensor, scale: Tensor, shift: Tensor, activation: Activation, summand: Tensor | None
) -> Tensor:
    value = (x - _channels(mean)) * _channels(scale) + _channels(shift)
    return activated(value if summand is None else value + summand, activation).to(x.dtype)


def gradients(
    x: Tensor, gradient: Tensor, mean: Tensor, scale: Tensor, shift: Tensor, activation: Activation
) -> tuple[Tensor, Tensor, Tensor]:
    centred = x - _channels(mean)
    value = (centred * _channels(scale) + _channels(shift)).detach().requires_grad_()
    with torch.enable_grad():
        (sent,) = torch.autograd.grad(activated(value, activation), value, gradient.to(value.dtype))
    result = (sent * _channels(scale)).to(x.dtype)
    return result, sent.sum((0, 2, 3)), (sent * centred).sum((0, 2, 3))


def moments(x: Tensor) -> tuple[Tensor, Tensor]:
    variance, mean = torch.var_mean(x, (0, 2, 3), correction=0)
    return mean, variance


def plus_line(total: Tensor, x: Tensor, mean: Tensor, slope: Tensor, offset: Tensor) -> Tensor:
    return (total + _channels(slope) * (x - _channels(mean)) + _channels(offset)).to(x.dtype)


def activated(value: Tensor, activation: Activation) -> Tensor:
    match activation.kind:
        case "identity":
            return value * 1
        case "relu" | "silu" | "hardswish" as kind:
            function: Callable[[Tensor], Tensor] = getattr(F, kind)
            return function(value)
        case "hardtanh":
            return F.hardtanh(value, activation.low, activation.high)
        case "leaky_relu":
            return F.leaky_relu(value, activation.low)
    raise AssertionError(activation)


def _channels(value: Tensor) -> Tensor:
    return value[:, None, None]


def take_passes(passes: ModuleType, setattr: Callable[[Any, str, Any], None] = setattr) -> None:
    """Make a CPU store maps and compute with them as a GPU does, by ``passes``."""
    setattr(memory, "_keeps_tiles", lambda device, zeroed: True)
    setattr(plan_cache, "Steps", lambda program, plan, fuses: Steps(program, plan, fuses=True))
    setattr(channel_kernels, "fits", lambda x: x.is_floating_point() and channel_kernels.is_channels_last(x))
    setattr(channel_kernels, "_own", lambda x: passes)


class Block(nn.Module):
    """A residual block, with its norms before the sum in either order."""

    def __init__(self, inside: int, outside: int, stride: int, activation: nn.Module, *, swaps: bool) -> None:
        super().__init__()
        self.first = nn.Conv2d(inside, outside, 3, stride, 1, bias=False)
        self.norm = nn.BatchNorm2d(outside)
        self.activation = activation
        self.second = nn.Conv2d(outside, outside, 3, padding=1, bias=False)
        self.last = nn.BatchNorm2d(outside)
        self.aside = nn.Conv2d(inside, outside, 1, stride, bias=False)
        self.norm_aside = nn.BatchNorm2d(outside, affine=False)
        self.swaps = swaps

    def forward(self, x: Tensor) -> Tensor:
        y = self.last(self.second(self.activation(self.norm(self.first(x)))))
        aside = self.norm_aside(self.aside(x))
        return torch.relu(aside + y) if self.swaps else torch.relu_(y.add_(aside))


class Plain(nn.Module):
    """A residual block that adds its own input."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.norm(self.conv(x)) + x)


def make_net() -> nn.Module:
    """A net with every form that is fused, and some that only look like one."""
    torch.manual_seed(0)
    return nn.Sequential(
        *(nn.Conv2d(3, 6, 3, 2, 1), nn.BatchNorm2d(6), nn.ReLU6(inplace=True)),
        Block(6, 8, 1, nn.LeakyReLU(0.1), swaps=False),
        Plain(8),
        Block(8, 8, 2, nn.SiLU(inplace=True), swaps=True),
        *(nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8, momentum=None), nn.Hardswish()),
        *(nn.Conv2d(8, 8, 1), nn.InstanceNorm2d(8, affine=True), nn.ReLU()),
        *(nn.Conv2d(8, 8, 1), nn.GroupNorm(2, 8), nn.SiLU()),
        *(nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8), nn.ReLU()),
        *(nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8), nn.GELU()),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 3)),
    )
