"""Elementwise operators and those that move channels, streamed and plain."""

from __future__ import annotations

import copy
import inspect
from typing import Any

import pytest
import torch
from helpers import assert_streamed_equals_plain
from operator_cases import SHAPE, TILE, WIDTH, Function, after_convolution, assert_streams, by_name
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules import activation

# --- elementwise --------------------------------------------------------------------------------------


ARGUMENTS: dict[str, tuple[Any, ...]] = {
    "Threshold": (0.1, 0.5),
    "GLU": (1,),
    "Softmax": (1,),
    "Softmin": (1,),
    "LogSoftmax": (1,),
}
"""What an activation must be given; none of them is for the others."""
ACTIVATIONS = {
    **{
        name: getattr(nn, name)(*ARGUMENTS.get(name, ()))
        for name in activation.__all__
        if name not in ("MultiheadAttention", "RReLU")
    },
    "GELU by tanh": nn.GELU("tanh"),
    "PReLU per channel": nn.PReLU(WIDTH),
    "Hardtanh, narrow": nn.Hardtanh(-0.3, 0.2),
    "Softplus, sharp": nn.Softplus(30, 2),
}


class InPlace(nn.Module):
    """An activation that changes its operand: one that is made for it alone, and one that is normalised."""

    def __init__(self, activation: nn.Module) -> None:
        super().__init__()
        self.plain, self.changing = activation, copy.deepcopy(activation)
        self.changing.inplace = True
        self.convolution, self.norm = nn.Conv2d(WIDTH, WIDTH, 1, bias=False), nn.BatchNorm2d(WIDTH)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = self.plain(x)
        return y * 2, self.changing(self.norm(self.changing(self.convolution(y))))


@by_name(ACTIVATIONS)
def test_activation(case: nn.Module) -> None:
    has_option = "inplace" in inspect.signature(type(case)).parameters
    assert_streams(InPlace(case) if has_option else case)


def test_random_slopes_in_eval_mode() -> None:
    assert_streamed_equals_plain(after_convolution(nn.RReLU()).eval(), SHAPE, tile=TILE, resident=None)


def in_place(x: Tensor) -> Tensor:
    """Several changes in place, each read afterwards."""
    y = x * 2
    y += x
    y.mul_(x).clamp_(-2, 2)
    z = y.add_(1)
    return z * x + y


ELEMENTWISE = {
    "python scalars": lambda x: 2 * x + 1 - x / 3,
    "scalar first": lambda x: 1 - x + 3 / (x * x + 1),
    "powers": lambda x: x**2 + x.abs() ** 1.5 + 2**x,
    "absolute value and sign": lambda x: x.abs().sqrt() * x.sign(),
    "exponential and logarithm": lambda x: x.exp() + x.square().log1p() + torch.expm1(x),
    "trigonometric": lambda x: x.sin() * x.cos() + x.atan(),
    "error function": lambda x: torch.erf(x) * torch.sigmoid(x),
    "reciprocal square root": lambda x: (x * x + 1).rsqrt() + (x * x + 2).reciprocal(),
    "clamp": lambda x: x.clamp(-0.3, 0.4) * x.clamp(min=0) + x.clamp_max(0.2),
    "clamp by tensors": lambda x: x.clamp(x.mean((2, 3), keepdim=True), x.amax((2, 3), keepdim=True)),
    "maximum of two": lambda x: torch.maximum(x, -0.2 * x) + torch.minimum(x, x * x),
    "max of two": lambda x: torch.max(x, x.sin()),
    "where": lambda x: torch.where(x > 0, x, x * 0.1),
    "where with scalars": lambda x: torch.where(x > 0, x, 0.0) * torch.where(x < 0.3, 1.0, x),
    "masked fill": lambda x: x.masked_fill(x < 0, 0.5) * x,
    "comparisons": lambda x: x * (x >= 0) + (x == x) * x * (x != 0),
    "logic": lambda x: x * ((x > 0.3) | ~(x > -0.3)),
    "floor": lambda x: x - x.floor() + x.round() * x + x.frac(),
    "remainder": lambda x: torch.remainder(x, 0.7) * x,
    "addcmul": lambda x: torch.addcmul(x, x, x.sin(), value=0.3) + torch.addcdiv(x, x, x * x + 1),
    "lerp": lambda x: torch.lerp(x, x.sin(), 0.3),
    "hypot": lambda x: torch.hypot(x, x + 1),
    "casts": lambda x: x.float().double() * x + x.to(torch.float32),
    "of the same kind": lambda x: torch.ones_like(x) * x + torch.zeros_like(x) + torch.full_like(x, 2.0),
    "detached": lambda x: x * x.detach() + x.detach().sin(),
    "detached gate": lambda x: x * x.detach().mean((2, 3), keepdim=True),
    "channel vectors": lambda x: x * x.new_ones(WIDTH, 1, 1) + torch.arange(WIDTH).reshape(1, -1, 1, 1),
    "in place": in_place,
    "softmax of channels": lambda x: x.softmax(1) + torch.log_softmax(x, -3),
    "softmax of groups": lambda x: x.unflatten(1, (2, 3)).softmax(1).flatten(1, 2) * x,
    "cumulative sum of channels": lambda x: x.cumsum(1),
    "other scans of channels": lambda x: (
        x.cumprod(1) + x.logcumsumexp(1) + x.cummax(1)[0] + x.diff(dim=1, prepend=x[:, :1])
    ),
    "largest channels": lambda x: x.topk(3, 1)[0] * x.topk(2, dim=1, largest=False)[0][:, :1],
    "channels in order": lambda x: (
        x.sort(1)[0] * x.argsort(1, descending=True) + x.kthvalue(2, 1, keepdim=True)[0]
    ),
    "channels gathered by order": lambda x: x.sin().gather(1, x.sort(dim=1, descending=True).indices[:, :4]),
    "middle channel": lambda x: x.median(1)[0] * x.movedim(1, -1).median(-1, keepdim=True).values.squeeze(-1),
    "channels without NaN": lambda x: (
        torch.cat((x.abs(), x.where(x > 0, torch.nan)), 1).nanmean(1) * x.where(x > 0, torch.nan).nansum(1)
    ),
    "products of channels": lambda x: torch.einsum("nchw,nchw->nhw", x, x.sin()),
    "products of all images' channels": lambda x: torch.einsum("nchw,mchw->nmhw", x, x.cos()),
    "product with a matrix, channels last": lambda x: x.movedim(1, -1) @ torch.eye(WIDTH).to(x)[:, :4],
    "product of a matrix with channels": lambda x: (
        torch.ones(3, WIDTH).to(x).cumsum(1) @ x.permute(2, 3, 1, 0)
    ),
    "matrices at each position": lambda x: x.permute(2, 3, 0, 1) @ x.permute(2, 3, 1, 0).sin(),
    "attention at each position": lambda x: F.scaled_dot_product_attention(
        *x.permute(0, 2, 3, 1).unflatten(-1, (3, 2)).chunk(1),
        x.permute(0, 2, 3, 1).unflatten(-1, (3, 2)).sin(),
        x.permute(0, 2, 3, 1).unflatten(-1, (3, 2)).cos(),
        torch.ones(3, 3).to(x),
    ),
    "attention to a table": lambda x: F.scaled_dot_product_attention(
        x.permute(0, 2, 3, 1).unflatten(-1, (3, 2)),
        torch.eye(2).to(x),
        torch.ones(2, 4).to(x).cumsum(0),
        scale=0.3,
    ),
    "made of a map's shape": lambda x: x * torch.empty_like(x).fill_(2.0),
    "aliases": lambda x: torch.subtract(torch.multiply(x, 2), x.negative()) * torch.less(x, 0.5),
}


@by_name(ELEMENTWISE)
def test_elementwise(case: Function) -> None:
    assert_streams(case)


# --- channels moved -----------------------------------------------------------------------------------


def shuffled(x: Tensor) -> Tensor:
    """ShuffleNet's channel shuffle."""
    n, c, h, w = x.shape
    return x.view(n, 2, c // 2, h, w).transpose(1, 2).contiguous().view(n, c, h, w)


def split_and_joined(x: Tensor) -> Tensor:
    """All ways to cut channels apart."""
    a, b = x.split((2, 4), 1)
    c, d = x.chunk(2, dim=1)
    e = x.unbind(1)[2].unsqueeze(1)
    f = x[:, -1:] * x[:, 1:4:2]
    return torch.cat((b * 2, a.sin(), c * d, e, f, x[:, None, 3]), 1)


def axes_moved(x: Tensor) -> Tensor:
    """A map with its axes in other orders, several dropped and added."""
    y = x.permute(2, 0, 3, 1).sin().transpose(0, 1)
    return y.movedim(-1, 1).unsqueeze(2).squeeze(2) * x + x[:, 0].unsqueeze(1)


MOVED = {
    "channel shuffle": shuffled,
    "channel shuffle, built in": nn.ChannelShuffle(3),
    "split, chunk, unbind, slices": split_and_joined,
    "axes moved": axes_moved,
    "stack": lambda x: torch.stack((x, x.sin(), x.cos()), 2).mean(2) + torch.stack((x, x), 1)[:, 0],
    "flip of channels": lambda x: x.flip(1) * x,
    "flip of rows": lambda x: x.flip(2) * x,
    "flip of columns, channels and the batch": lambda x: x.flip(3, 1, 0) * x,
    "flip of both, of another grid": lambda x: F.pad(x[..., ::2, 1:], (0, 3, 2, 0)).flip(-1, -2).sin(),
    "roll of channels": lambda x: x.roll(2, 1) * x.roll((1, -1), (0, 1)),
    "roll of positions": lambda x: x.roll((2, -3), (2, 3)) * x.roll(5, -1) + x.roll((1, 4, 3), (1, 2, 2)),
    "channels chosen": lambda x: x.index_select(1, torch.tensor([4, 0, 0])) * x[:, torch.tensor([1, 3, 5])],
    "channels chosen by a table": lambda x: x[:, torch.tensor([[4, 0], [1, 1], [5, 2]])].sum(2),
    "batch chosen": lambda x: x * x[torch.tensor([1, 0])],
    "channels chosen, channels last": lambda x: x.movedim(1, 3)[..., torch.tensor([2, -1])].sin(),
    "repeated channels": lambda x: x.repeat(1, 2, 1, 1).sin() + x.repeat_interleave(2, 1),
    "expanded": lambda x: x[:, :1].expand(-1, WIDTH, -1, -1) * x,
    "expanded as": lambda x: x[:, :1].expand_as(x) * x.mean((2, 3), keepdim=True).expand_as(x),
    "batch and channels merged": lambda x: x.reshape(-1, 1, *x.shape[2:]).sin().view_as(x) * x,
    "joined along the batch": lambda x: torch.cat((x, 2 * x), 0).cos(),
    "joined with a constant": lambda x: torch.cat((x, x.new_ones(2, 1, *x.shape[2:])), 1).sin(),
    "joined with nothing": lambda x: torch.cat(
        (torch.tensor([]), x.float(), x.new_zeros(0).float()), 1
    ).sin(),
    "joined with nothing, of another type": lambda x: torch.cat((x.float().sin(), x.new_zeros(0)), -3),
    "joined with positions": lambda x: torch.cat(
        (x, torch.linspace(-1, 1, x.shape[3], dtype=x.dtype).expand(2, 1, *x.shape[2:])), 1
    ),
}


@by_name(MOVED)
def test_channels_moved(case: Function | nn.Module) -> None:
    assert_streams(case)


class _OldSwish(torch.autograd.Function):
    """EfficientNet's activation as old copies have it, by the old name of what is saved."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x * torch.sigmoid(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        x: Tensor = ctx.saved_variables[0]
        share = torch.sigmoid(x)
        return gradients[0] * (share * (1 + x * (1 - share)))


@pytest.mark.filterwarnings("ignore:'saved_variables' is deprecated")
def test_the_old_name_of_saved_tensors_is_known() -> None:
    assert_streams(_OldSwish.apply)
