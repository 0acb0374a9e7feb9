"""Each operator and each peculiarity of how networks use them, streamed and plain."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers import Shape, assert_streamed_equals_plain, randomized, streaming_plan
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules import activation

from streamcnn import StreamingModel
from streamcnn.graph.ops import samples
from streamcnn.graph.ops.rules import Sample

SHAPE = (2, 3, 21, 17)
TILE = (8, 7)
WIDTH = 6
"""Channels of the map that most cases work on."""

Function = Callable[..., Any]


class Applied(nn.Module):
    """A function of a map as a module."""

    def __init__(self, function: Function) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Any:
        return self.function(x)


def after_convolution(operator: Function | nn.Module) -> nn.Module:
    """A convolution to ``WIDTH`` channels of the image's extents, then ``operator``."""
    module = operator if isinstance(operator, nn.Module) else Applied(operator)
    return nn.Sequential(nn.Conv2d(3, WIDTH, 3, padding=1), module)


def assert_streams(operator: Function | nn.Module, shape: Shape = SHAPE, **options: Any) -> None:
    """Raise unless ``operator`` streams exactly, in train mode."""
    assert_streamed_equals_plain(after_convolution(operator), shape, **{"tile": TILE, **options})


def by_name(cases: dict[str, Any]) -> pytest.MarkDecorator:
    """Parametrise over the values of ``cases``, their keys being the tests' names."""
    return pytest.mark.parametrize("case", cases.values(), ids=cases.keys())


# --- every family's own samples ----------------------------------------------------------------------


@pytest.mark.parametrize("sample", samples(), ids=lambda sample: sample.name)
# Plain PyTorch says that it copies its input; streaming does not.
@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel:UserWarning")
def test_sample(sample: Sample) -> None:
    net = sample.build().train(sample.train)
    assert_streamed_equals_plain(net, sample.shape, tile=(16, 13), resident=sample.resident)


# --- windows ------------------------------------------------------------------------------------------

CONVOLUTIONS = {
    "1x1": nn.Conv2d(WIDTH, 4, 1),
    "1x1, stride 3": nn.Conv2d(WIDTH, 4, 1, stride=3),
    "kernel smaller than stride": nn.Conv2d(WIDTH, 4, 2, stride=5),
    "even kernel": nn.Conv2d(WIDTH, 4, 4, padding=1),
    "even kernel, stride 2, padding 2": nn.Conv2d(WIDTH, 4, (2, 4), stride=2, padding=(1, 2)),
    "asymmetric kernel and padding": nn.Conv2d(WIDTH, 4, (1, 5), padding=(2, 0)),
    "asymmetric stride and dilation": nn.Conv2d(WIDTH, 4, 3, stride=(1, 3), dilation=(3, 1), padding=(3, 1)),
    "padding wider than the kernel": nn.Conv2d(WIDTH, 4, 3, padding=6),
    "same": nn.Conv2d(WIDTH, 4, (3, 5), padding="same", dilation=(2, 1)),
    "same, even kernel": nn.Conv2d(WIDTH, 4, (4, 2), padding="same"),
    "valid": nn.Conv2d(WIDTH, 4, 3, padding="valid"),
    "padding on one side": nn.Sequential(nn.ZeroPad2d((0, 1, 2, 0)), nn.Conv2d(WIDTH, 4, 3, stride=2)),
    "grouped": nn.Conv2d(WIDTH, 9, 3, groups=3, bias=False),
    "depthwise with multiplier": nn.Conv2d(WIDTH, 2 * WIDTH, 3, groups=WIDTH, padding=1, stride=2),
    "as large as the map": nn.Conv2d(WIDTH, 4, (21, 17)),
    "larger than the map": nn.Conv2d(WIDTH, 4, 23, padding=3),
}


@by_name(CONVOLUTIONS)
# Plain PyTorch says that it copies its input; streaming does not.
@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel:UserWarning")
def test_convolution(case: nn.Module) -> None:
    # Where every output reads the whole map, there is one output and so one tile.
    assert_streams(case, one_tile=True)


TRANSPOSED = {
    "stride 2": nn.ConvTranspose2d(WIDTH, 4, 2, stride=2),
    "kernel smaller than stride": nn.ConvTranspose2d(WIDTH, 4, 2, stride=3),
    "kernel larger than stride": nn.ConvTranspose2d(WIDTH, 4, 5, stride=2, padding=1),
    "stride 1": nn.ConvTranspose2d(WIDTH, 4, 3, padding=2),
    "output padding": nn.ConvTranspose2d(WIDTH, 4, 3, stride=4, padding=1, output_padding=(3, 2)),
    "dilated beyond the stride": nn.ConvTranspose2d(WIDTH, 4, 3, stride=2, dilation=3, padding=(4, 1)),
    "asymmetric": nn.ConvTranspose2d(WIDTH, 4, (1, 4), stride=(3, 1), padding=(0, 2), bias=False),
    "grouped": nn.ConvTranspose2d(WIDTH, 9, 3, stride=2, groups=3),
}


@by_name(TRANSPOSED)
def test_transposed_convolution(case: nn.Module) -> None:
    assert_streams(nn.Sequential(case, nn.Conv2d(case.out_channels, 3, 2)))


@pytest.mark.parametrize("mode", ["zeros", "reflect", "replicate", "circular"])
def test_padding_mode(mode: str) -> None:
    assert_streams(nn.Conv2d(WIDTH, 4, 3, padding=(4, 2), padding_mode=mode, stride=2))


PADS = {
    "reflect, one side": lambda x: F.pad(x, (3, 0, 0, 5), mode="reflect"),
    "replicate, far": lambda x: F.pad(x, (11, 1, 25, 0), mode="replicate"),
    "circular, one side": lambda x: F.pad(x, (0, 6, 2, 0), mode="circular"),
    "constant": lambda x: F.pad(x, (1, 2, 30, 4), value=0.6),
    "crop": lambda x: F.pad(x, (-1, -2, -3, 4)),
    "rows alone": lambda x: F.pad(x, (0, 0, 1, 2), value=-1.0),
}


@by_name(PADS)
def test_padding(case: Function) -> None:
    assert_streams(nn.Sequential(Applied(case), nn.Conv2d(WIDTH, 2, 3, stride=2)))


POOLS = {
    "max": nn.MaxPool2d(2),
    "max, overlapping": nn.MaxPool2d(3, 2, 1),
    "max, ceil mode": nn.MaxPool2d(3, 2, ceil_mode=True),
    "max, ceil mode and padding": nn.MaxPool2d((3, 4), (2, 3), (1, 2), ceil_mode=True),
    "max, dilated": nn.MaxPool2d(3, 1, 1, dilation=2),
    "max, gaps": nn.MaxPool2d(2, 5),
    "average": nn.AvgPool2d(2),
    "average, gaps": nn.AvgPool2d((2, 1), (3, 4)),
    **{
        f"average, ceil mode {ceil}, count padding {count}": nn.AvgPool2d(
            (3, 4), (2, 3), (1, 2), ceil_mode=ceil, count_include_pad=count
        )
        for ceil in (False, True)
        for count in (False, True)
    },
    "average, own divisor": nn.AvgPool2d(3, 2, 1, divisor_override=5, ceil_mode=True),
    "power average": nn.LPPool2d(2, 3, 2),
}


@by_name(POOLS)
def test_pooling(case: nn.Module) -> None:
    assert_streams(nn.Sequential(case, nn.Conv2d(WIDTH, 2, 1)))


def test_max_pooling_of_equal_values() -> None:
    # Which of several equal values gets the gradient must not depend on the tile.
    assert_streams(nn.Sequential(nn.ReLU(), nn.MaxPool2d(4, 3, 1), nn.Conv2d(WIDTH, 2, 1)))


ADAPTIVE = {
    "average to 1": (nn.AdaptiveAvgPool2d(1), False),
    "maximum to 1": (nn.AdaptiveMaxPool2d(1), False),
    "maximum to 1 of equal values": (
        nn.Sequential(nn.Upsample(scale_factor=2), nn.AdaptiveMaxPool2d(1)),
        False,
    ),
    "average to 3 x 2": (nn.AdaptiveAvgPool2d((3, 2)), True),
    "average to rows": (nn.AdaptiveAvgPool2d((None, 1)), True),
    "maximum to 4": (nn.AdaptiveMaxPool2d(4), True),
}


@by_name(ADAPTIVE)
def test_adaptive_pooling(case: tuple[nn.Module, bool]) -> None:
    module, resident = case
    assert_streams(module, resident=resident)


# --- grids --------------------------------------------------------------------------------------------

RESIZES: dict[str, dict[str, Any]] = {
    "nearest, factor 3": {"scale_factor": 3},
    "nearest, factor 2.5": {"scale_factor": 2.5},
    "nearest, factors that round to whole ones": {"scale_factor": (3.04, 1.04)},
    "nearest, two factors": {"scale_factor": (2.0, 1.0)},
    "nearest, size": {"size": (30, 40)},
    "nearest, smaller": {"size": (5, 9)},
    "nearest, factor 0.4": {"scale_factor": 0.4},
    "bilinear, factor 2": {"scale_factor": 2, "mode": "bilinear"},
    "bilinear, factor 4": {"scale_factor": 4, "mode": "bilinear"},
    "bilinear, factor 2.5": {"scale_factor": 2.5, "mode": "bilinear"},
    "bilinear, factor recomputed": {
        "scale_factor": 2.03,
        "mode": "bilinear",
        "recompute_scale_factor": True,
    },
    "bilinear, factors that round to whole ones": {"scale_factor": (3.04, 1.04), "mode": "bilinear"},
    "bilinear, one factor": {"scale_factor": (1.0, 3.0), "mode": "bilinear"},
    "bilinear, size": {"size": (30, 40), "mode": "bilinear"},
    "bilinear, smaller": {"size": (5, 9), "mode": "bilinear"},
    "bilinear, corners, factor 2": {"scale_factor": 2, "mode": "bilinear", "align_corners": True},
    "bilinear, corners, size": {"size": (40, 30), "mode": "bilinear", "align_corners": True},
    "bilinear, corners, one row": {"size": (1, 30), "mode": "bilinear", "align_corners": True},
}


@by_name(RESIZES)
def test_resizing(case: dict[str, Any]) -> None:
    assert_streams(
        nn.Sequential(Applied(lambda x: F.interpolate(x, **case)), nn.Conv2d(WIDTH, 2, 3, padding=1)),
        one_tile=True,
    )


def test_bicubic_resizing_is_resident() -> None:
    assert_streams(lambda x: F.interpolate(x, scale_factor=2, mode="bicubic"), resident=True)


REGRIDDED = {
    "pixel shuffle": nn.Sequential(nn.Conv2d(WIDTH, 18, 1), nn.PixelShuffle(3), nn.Conv2d(2, 2, 2)),
    "pixel unshuffle": nn.Sequential(nn.ZeroPad2d((0, 1, 0, 1)), nn.PixelUnshuffle(2), nn.Conv2d(24, 2, 2)),
    "slices that stride": Applied(lambda x: x[..., 1::2, 2:-1:3]),
    "slices from the end": Applied(lambda x: x[:, -3:, -9:, :-4] * 2),
    "focus": Applied(
        lambda x: torch.cat((x[..., :-1:2, :-1:2], x[..., 1::2, :-1:2], x[..., 1::2, 1::2]), 1).sin()
    ),
    "narrow": Applied(lambda x: x.narrow(2, 3, 11).narrow(3, -8, 7).narrow(1, 2, 3)),
}


@by_name(REGRIDDED)
def test_regridding(case: nn.Module) -> None:
    assert_streams(case)


# --- normalisation ------------------------------------------------------------------------------------


def normalized(norm: nn.Module) -> nn.Module:
    """A convolution without bias, whose true gradient would be zero, ``norm``, and a convolution."""
    return randomized(nn.Sequential(nn.Conv2d(3, WIDTH, 3, bias=False), norm, nn.Conv2d(WIDTH, 2, 3)))


NORMS: dict[str, Callable[[], nn.Module]] = {
    "batch": lambda: nn.BatchNorm2d(WIDTH),
    "batch, own momentum": lambda: nn.BatchNorm2d(WIDTH, momentum=0.37, eps=0.01),
    "batch, cumulative": lambda: nn.BatchNorm2d(WIDTH, momentum=None),
    "batch, no running statistics": lambda: nn.BatchNorm2d(WIDTH, track_running_stats=False),
    "batch, not affine": lambda: nn.BatchNorm2d(WIDTH, affine=False),
    "instance": lambda: nn.InstanceNorm2d(WIDTH),
    "instance, affine": lambda: nn.InstanceNorm2d(WIDTH, affine=True),
    "instance, running statistics": lambda: nn.InstanceNorm2d(WIDTH, affine=True, track_running_stats=True),
    "group": lambda: nn.GroupNorm(2, WIDTH),
    "group of one": lambda: nn.GroupNorm(WIDTH, WIDTH, affine=False),
    "layer, over the image": lambda: nn.LayerNorm((WIDTH, 19, 15)),
    "local response": lambda: nn.LocalResponseNorm(3),
}


@pytest.mark.parametrize("train", [True, False])
@by_name(NORMS)
def test_normalization(case: Callable[[], nn.Module], train: bool) -> None:
    norm = case()
    assert_streamed_equals_plain(
        normalized(norm).train(train), SHAPE, tile=TILE, resident=isinstance(norm, nn.LocalResponseNorm)
    )


class NormOfGlobalValue(nn.Module):
    """Normalises what has no spatial extent any more, spread over a few positions."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, WIDTH, 3), norm

    def forward(self, x: Tensor) -> Tensor:
        y = F.adaptive_avg_pool2d(self.conv(x), 1) * torch.arange(15.0).view(3, 5).to(x)
        return self.norm(y).square().sum((2, 3))


@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize("tracks", [True, False])
def test_instance_norm_of_a_global_value(tracks: bool, train: bool) -> None:
    norm = nn.InstanceNorm2d(WIDTH, affine=True, track_running_stats=tracks)
    assert_streamed_equals_plain(randomized(NormOfGlobalValue(norm)).train(train), SHAPE, tile=TILE)


def test_instance_norm_with_statistics_in_the_resident_tail() -> None:
    net = nn.Sequential(nn.Conv2d(3, WIDTH, 3), nn.InstanceNorm2d(WIDTH, track_running_stats=True))
    plain, image = copy.deepcopy(net), torch.rand(SHAPE)
    torch.testing.assert_close(StreamingModel(net)(image), plain(image))
    torch.testing.assert_close(dict(net.named_buffers()), dict(plain.named_buffers()))


def test_frozen_affine_part() -> None:
    net = normalized(nn.BatchNorm2d(WIDTH))
    net[1].requires_grad_(False)
    assert_streamed_equals_plain(net, SHAPE, tile=TILE)


def test_frozen_statistics_in_train_mode() -> None:
    net = normalized(nn.Sequential(nn.BatchNorm2d(WIDTH), nn.ReLU(), nn.BatchNorm2d(WIDTH)))
    net[1][0].eval()
    assert_streamed_equals_plain(net, SHAPE, tile=TILE)


@pytest.mark.parametrize("frozen", [(0,), (0, 1), (2,), (0, 2)])
def test_partly_frozen_net(frozen: tuple[int, ...]) -> None:
    net = normalized(nn.BatchNorm2d(WIDTH))
    for index in frozen:
        net[index].requires_grad_(False)
    assert_streamed_equals_plain(net, SHAPE, tile=TILE)


def test_cumulative_average_over_several_updates() -> None:
    plain = normalized(nn.BatchNorm2d(WIDTH, momentum=None)).double()
    twin = normalized(nn.BatchNorm2d(WIDTH, momentum=None)).double()
    twin.load_state_dict(plain.state_dict())
    streamed = StreamingModel(twin, tile=TILE)
    for _ in range(3):
        image = torch.randn(SHAPE, dtype=torch.float64)
        plain(image)
        streamed(image)
    torch.testing.assert_close(dict(twin.named_buffers()), dict(plain.named_buffers()), rtol=1e-12, atol=0)


class ChannelNorm(nn.Module):
    """Layer norm of each position's channels, with them last."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.mix = nn.Linear(WIDTH, 4)

    def forward(self, x: Tensor) -> Tensor:
        return F.gelu(self.mix(self.norm(x.permute(0, 2, 3, 1)))).permute(0, 3, 1, 2)


PER_POSITION = {
    "layer norm of channels": ChannelNorm(),
    "rms norm of channels": nn.Sequential(Applied(lambda x: x.movedim(1, -1)), nn.RMSNorm(WIDTH)),
    "linear on the last axis": nn.Sequential(Applied(lambda x: x.permute(0, 2, 3, 1)), nn.Linear(WIDTH, 4)),
    "normalised channels": Applied(lambda x: F.normalize(x, dim=1) * 3),
}


@by_name(PER_POSITION)
def test_per_position(case: nn.Module) -> None:
    assert_streams(case)


# --- reductions ---------------------------------------------------------------------------------------

REDUCTIONS = {
    "mean": lambda x: x.mean((2, 3)),
    "mean, kept": lambda x: x.mean((2, 3), keepdim=True),
    "mean, negative axes": lambda x: x.mean((-1, -2)),
    "mean over the batch too": lambda x: x.mean((0, 2, 3)),
    "mean of all": lambda x: x.mean(),
    "sum": lambda x: x.sum((2, 3)),
    "sum, kept": lambda x: x.sum((1, 2, 3), keepdim=True),
    "sum of all": lambda x: x.sum(),
    "sum of channels": lambda x: x.sum(1) * x.mean(1),
    "maximum": lambda x: x.amax((2, 3)),
    "maximum, kept": lambda x: x.amax((2, 3), keepdim=True),
    "maximum of equal values": lambda x: F.interpolate(x, scale_factor=2).amax((1, 2, 3)),
    "maximum of equal channels": lambda x: torch.cat((x, x), 1).max(1)[0] + torch.cat((x, x), 1).amax(1),
    "minimum": lambda x: x.amin((0, 2, 3)),
    "maximum of channels": lambda x: x.amax(1, keepdim=True) * x,
    "maximum of channels with positions": lambda x: x.max(1, keepdim=True)[0] * x,
    "maximum of channels, axis dropped": lambda x: torch.max(x, dim=1).values.sin(),
    "minimum of channels with positions": lambda x: torch.min(x, 1, keepdim=True)[0] + x,
    "norm": lambda x: torch.linalg.vector_norm(x, dim=(2, 3)),
    "norm, kept": lambda x: x.norm(p=2, dim=(2, 3), keepdim=True),
    "norm of order 1": lambda x: torch.linalg.vector_norm(x, 1, (2, 3)),
    "norm of order 2.5": lambda x: torch.linalg.vector_norm(x, 2.5, (1, 2, 3)),
    "norm of zeros": lambda x: torch.linalg.vector_norm(F.relu(x - 100), 2, (2, 3)) + x.mean((2, 3)),
    "norm of channels": lambda x: torch.linalg.vector_norm(x, 2, 1, keepdim=True) * x,
    "variance": lambda x: x.var((2, 3)),
    "biased variance": lambda x: x.var((2, 3), unbiased=False, keepdim=True),
    "deviation": lambda x: x.std((0, 2, 3), correction=2),
    "deviation and mean": lambda x: torch.std_mean(x, (1, 2, 3)),
    "variance of channels": lambda x: x.var(1, keepdim=True) * x,
    "softmax of a mean": lambda x: torch.softmax(x.mean((2, 3)), 1),
    "other reductions of channels": lambda x: x.logsumexp(1, keepdim=True) * x.prod(1, keepdim=True),
    "positions of channels": lambda x: x * (x.argmax(1, keepdim=True) + (x > 0).any(1, keepdim=True)),
    "count": lambda x: x.sum((2, 3)) / (x > 0.1).sum((2, 3)),
    "masked mean": lambda x: (x * (x > 0)).sum((2, 3)) / (x > 0).to(x.dtype).mean((2, 3)),
    "two of the same map": lambda x: torch.cat((x.mean((2, 3)), x.amax((2, 3)), x.var((2, 3))), 1),
    "one after another": lambda x: (x - x.mean((2, 3), keepdim=True)).abs().amax((2, 3)),
    "channels last": lambda x: x.permute(0, 2, 3, 1).mean((1, 2)),
}


@by_name(REDUCTIONS)
def test_reduction(case: Function) -> None:
    assert_streams(case)


def test_reduction_of_the_image_itself() -> None:
    def standardized(x: Tensor) -> Tensor:
        return (x - x.mean((2, 3), keepdim=True)) / x.std((1, 2, 3), keepdim=True)

    net = nn.Sequential(Applied(standardized), nn.Conv2d(3, 2, 3))
    assert_streamed_equals_plain(net, SHAPE, tile=TILE)


def test_mean_is_exact_where_it_is_large_against_the_deviation() -> None:
    net = nn.Sequential(Applied(lambda x: x + 1e5), nn.BatchNorm2d(3), nn.Conv2d(3, 2, 1))
    assert_streamed_equals_plain(net, SHAPE, tile=TILE)


RESIDENT = {
    "mean of rows": lambda x: x * x.mean(2, keepdim=True),
    "flattened": lambda x: x.flatten(1).sin(),
    "attention": lambda x: torch.softmax(x.flatten(2).transpose(1, 2) @ x.flatten(2), -1),
    "matrix product": lambda x: torch.einsum("nchw,ndhw->ncd", x, x),
    "rolled": lambda x: x.roll((2, -3), (2, 3)),
    "transposed and joined along space": lambda x: torch.cat((x, x[:, :, :4]), 2),
    "row by row": lambda x: x[:, :, 3] * x[:, :, 5],
    "maximum of rows": lambda x: x.max(2)[0],
    "cumulative sum of rows": lambda x: x.cumsum(2),
}


@by_name(RESIDENT)
def test_resident_operator(case: Function) -> None:
    assert_streams(case, resident=True)


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
    "repeated channels": lambda x: x.repeat(1, 2, 1, 1).sin() + x.repeat_interleave(2, 1),
    "expanded": lambda x: x[:, :1].expand(-1, WIDTH, -1, -1) * x,
    "expanded as": lambda x: x[:, :1].expand_as(x) * x.mean((2, 3), keepdim=True).expand_as(x),
    "batch and channels merged": lambda x: x.reshape(-1, 1, *x.shape[2:]).sin().view_as(x) * x,
    "joined along the batch": lambda x: torch.cat((x, 2 * x), 0).cos(),
    "joined with a constant": lambda x: torch.cat((x, x.new_ones(2, 1, *x.shape[2:])), 1).sin(),
    "joined with positions": lambda x: torch.cat(
        (x, torch.linspace(-1, 1, x.shape[3], dtype=x.dtype).expand(2, 1, *x.shape[2:])), 1
    ),
}


@by_name(MOVED)
def test_channels_moved(case: Function | nn.Module) -> None:
    assert_streams(case)


# --- how networks are put together --------------------------------------------------------------------


class SharedAtTwoScales(nn.Module):
    """One block with batch norm, used on the image's grid and on a coarser one."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, WIDTH, 3, bias=False)
        self.block = nn.Sequential(
            nn.Conv2d(WIDTH, WIDTH, 3, padding=1, bias=False), nn.BatchNorm2d(WIDTH), nn.ReLU()
        )

    def forward(self, x: Tensor) -> Tensor:
        fine = self.block(self.stem(x))
        coarse = self.block(F.avg_pool2d(fine, 2))
        return fine.mean((2, 3)) + coarse.amax((2, 3))


class Pyramid(nn.Module):
    """A map used at several scales, and several results."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, WIDTH, 3, stride=2, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(WIDTH)
        self.lateral = nn.ModuleList(nn.Conv2d(WIDTH, 4, 1) for _ in range(3))
        self.smooth = nn.Conv2d(4, 2, 3, padding=1)

    def forward(self, x: Tensor) -> dict[str, Any]:
        first = F.relu(self.norm(self.stem(x)))
        maps = [first, F.max_pool2d(first, 3, 2, 1), F.avg_pool2d(first, 4, 3, ceil_mode=True)]
        fine, middle, coarse = (lateral(m) for lateral, m in zip(self.lateral, maps, strict=True))
        middle = middle + F.interpolate(coarse, size=middle.shape[2:], mode="nearest")
        fine = fine + F.interpolate(middle, size=fine.shape[2:], mode="bilinear", align_corners=False)
        return {"dense": self.smooth(fine), "others": (middle.mean((2, 3)), [coarse]), "pooled": first.amax()}


class PositionalParameters(nn.Module):
    """Parameters with spatial extent, in every shape that broadcasts."""

    def __init__(self) -> None:
        super().__init__()
        shapes = [
            (1, WIDTH, 21, 17),
            (21, 17),
            (WIDTH, 1, 1),
            (21, 1),
            (1, 1, 1, 17),
            (2, 1, 21, 17),
            (1,),
            (),
        ]
        self.terms = nn.ParameterList(torch.randn(shape) for shape in shapes)

    def forward(self, x: Tensor) -> Tensor:
        for index, term in enumerate(self.terms):
            x = x + term if index % 2 else (x * term).tanh()
        return x


class Standardized(nn.Conv2d):
    """A convolution whose weight is standardised first."""

    def forward(self, x: Tensor) -> Tensor:
        mean = self.weight.mean((1, 2, 3), keepdim=True)
        deviation = self.weight.std((1, 2, 3), keepdim=True)
        return F.conv2d(x, (self.weight - mean) / (deviation + 1e-5), self.bias, padding=1)


class Conditional(nn.Module):
    """A convolution whose weight depends on the image, by the grouping trick of CondConv."""

    def __init__(self) -> None:
        super().__init__()
        self.router = nn.Linear(WIDTH, 3)
        self.experts = nn.Parameter(torch.randn(3, 4 * WIDTH * 9) * 0.2)

    def forward(self, x: Tensor) -> Tensor:
        n, c, h, w = x.shape
        weight = torch.sigmoid(self.router(x.mean((2, 3)))) @ self.experts
        result = F.conv2d(x.reshape(1, n * c, h, w), weight.view(n * 4, c, 3, 3), padding=1, groups=n)
        return result.view(n, 4, h, w)


class Tied(nn.Module):
    """Two layers with one weight, and a bias that is used elsewhere too."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(WIDTH, WIDTH, 3, padding=1)
        self.second = nn.Conv2d(WIDTH, WIDTH, 3, padding=1, stride=2)
        self.second.weight = self.first.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.second(F.relu(self.first(x))) * self.first.bias.sum()


class Buffers(nn.Module):
    """Buffers read and written, persistent or not, and constants made in forward."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("scale", torch.linspace(1, 2, WIDTH).reshape(1, -1, 1, 1))
        self.register_buffer("kernel", torch.ones(WIDTH, 1, 3, 3) / 9, persistent=False)
        self.register_buffer("seen", torch.zeros(WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        self.seen.mul_(0.9).add_(x.detach().mean((0, 2, 3)), alpha=0.1)
        x = F.conv2d(F.pad(x, (1, 1, 1, 1), mode="reflect"), self.kernel, groups=WIDTH, stride=2)
        return x * self.scale + torch.tensor(0.3) + torch.eye(WIDTH)[2].reshape(1, -1, 1, 1)


class SqueezeExcite(nn.Module):
    """Channels weighted by their means."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Sequential(
            nn.AdaptiveAvgPool2d(1),
            nn.Conv2d(WIDTH, 3, 1),
            nn.ReLU(),
            nn.Conv2d(3, WIDTH, 1),
            nn.Hardsigmoid(),
        )

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gate(x)


class ResponseNorm(nn.Module):
    """Global response norm, channels last, as in ConvNeXt V2."""

    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.randn(WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        x = x.permute(0, 2, 3, 1)
        norm = x.norm(p=2, dim=(1, 2), keepdim=True)
        return x + self.gain * x * (norm / (norm.mean(-1, keepdim=True) + 1e-6))


class BlockAttention(nn.Module):
    """Channel and spatial attention, as in CBAM."""

    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Sequential(nn.Linear(WIDTH, 3), nn.ReLU(), nn.Linear(3, WIDTH))
        self.spatial = nn.Conv2d(2, 1, 7, padding=3)

    def forward(self, x: Tensor) -> Tensor:
        gate = self.mix(x.mean((2, 3))) + self.mix(F.adaptive_max_pool2d(x, 1).flatten(1))
        x = x * torch.sigmoid(gate)[:, :, None, None]
        summary = torch.cat((x.mean(1, keepdim=True), x.max(1, keepdim=True)[0]), 1)
        return x * torch.sigmoid(self.spatial(summary))


class GatedAttentionHead(nn.Module):
    """Attention over positions written with 1x1 convolutions; the softmax over space is resident."""

    def __init__(self) -> None:
        super().__init__()
        self.value, self.gate = nn.Conv2d(WIDTH, 4, 1), nn.Conv2d(WIDTH, 4, 1)
        self.score = nn.Conv2d(4, 1, 1)
        self.classify = nn.Linear(WIDTH, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(F.avg_pool2d(x, 2))
        score = self.score(torch.tanh(self.value(x)) * torch.sigmoid(self.gate(x)))
        weight = torch.softmax(score.flatten(1), 1).view_as(score)
        return self.classify((x * weight).sum((2, 3)))


class Broadcasting(nn.Module):
    """A map of one row and one of a single position, read by every position of a larger one."""

    def __init__(self) -> None:
        super().__init__()
        self.row = nn.Conv2d(WIDTH, WIDTH, (21, 3), padding=(0, 1))
        self.point = nn.Conv2d(WIDTH, 1, (21, 17))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.row(x).sigmoid() + self.point(x) * x.sin()


STRUCTURES: dict[str, Callable[[], nn.Module]] = {
    "positional parameters": PositionalParameters,
    "weight standardisation": lambda: Standardized(WIDTH, 4, 3),
    "weights from the image": Conditional,
    "tied parameters": Tied,
    "buffers and constants": Buffers,
    "squeeze-excite": SqueezeExcite,
    "global response norm": ResponseNorm,
    "block attention": BlockAttention,
    "one row and one position": Broadcasting,
}


@by_name(STRUCTURES)
def test_structure(case: Callable[[], nn.Module]) -> None:
    assert_streams(nn.Sequential(nn.Tanh(), case()))


def test_gated_attention_head() -> None:
    assert_streams(GatedAttentionHead(), resident=True)


@pytest.mark.parametrize(("batch", "train"), [(1, True), (3, False)])
@pytest.mark.parametrize("build", [SharedAtTwoScales, Pyramid])
def test_several_scales(build: Callable[[], nn.Module], train: bool, batch: int) -> None:
    assert_streamed_equals_plain(randomized(build()).train(train), (batch, 3, 37, 29), tile=(11, 13))


RESULTS = {
    "tuple": lambda x: (x.mean((2, 3)), x * 2),
    "list in dict": lambda x: {"a": [x.sin(), x.amax()], "b": x[:, :2]},
    "the same twice": lambda x: (x, x),
    "with nothing and numbers": lambda x: (x.sin(), None, 3),
}


@by_name(RESULTS)
def test_results(case: Function) -> None:
    assert_streams(case, resident=None)


def test_results_keep_their_structure() -> None:
    net = after_convolution(RESULTS["list in dict"])
    found = StreamingModel(net, tile=TILE)(torch.randn(SHAPE))
    assert {key: type(value) for key, value in found.items()} == {"a": list, "b": Tensor}
    assert found["a"][0].shape == (2, WIDTH, 21, 17)


def test_results_without_gradient() -> None:
    net = after_convolution(lambda x: (x.sin(), x > 0, x.argmax(1))).double()
    image = torch.randn(SHAPE, dtype=torch.float64)
    found, expected = StreamingModel(net, tile=TILE)(image), net(image)
    for value, reference in zip(found, expected, strict=True):
        torch.testing.assert_close(value, reference)
        assert value.requires_grad == reference.requires_grad


def test_the_image_as_a_result() -> None:
    net = Applied(lambda x: (x, x.sin()))
    assert_streamed_equals_plain(net, SHAPE, tile=TILE)


# Gradients that reach a stored map from later phases only, since its own phase stops or ignores them.
STOPPED = {
    "detached and reduced": lambda x, y: y * y.detach().mean((2, 3), keepdim=True),
    "compared and reduced": lambda x, y: y * (y > 0).to(y.dtype).mean((2, 3), keepdim=True),
    "compared, beside a reduction": lambda x, y: y * (y > 0).double().mean() * x.mean((2, 3), keepdim=True),
    "rounded and normalised": lambda x, y: F.instance_norm(y.detach()) * y,
    "normalised, residual": lambda x, y: F.instance_norm(y) + F.conv2d(y, y.new_ones(2, WIDTH, 3, 3)).mean(),
}


@by_name(STOPPED)
def test_gradients_stopped(case: Function) -> None:
    class Stopped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(WIDTH, WIDTH, 3)
            self.last = nn.Conv2d(WIDTH, 2, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.last(case(x, self.conv(x)))

    assert_streams(Stopped())


# --- shapes -------------------------------------------------------------------------------------------


def small_net() -> nn.Module:
    """Two strided blocks with batch norm and a mean."""
    return randomized(
        nn.Sequential(
            nn.Conv2d(3, WIDTH, 3, stride=2, padding=1, bias=False),
            nn.BatchNorm2d(WIDTH),
            nn.ReLU(),
            nn.Conv2d(WIDTH, WIDTH, 3, stride=3, padding=1, groups=2, bias=False),
            nn.BatchNorm2d(WIDTH),
            nn.SiLU(),
            SqueezeExcite(),
            nn.AdaptiveAvgPool2d(1),
        )
    )


@pytest.mark.parametrize(
    ("batch", "size"), [(1, (23, 29)), (3, (1, 47)), (2, (47, 1)), (1, (2, 31)), (3, (5, 80)), (1, (48, 32))]
)
def test_image_size(batch: int, size: tuple[int, int]) -> None:
    assert_streamed_equals_plain(small_net(), (batch, 3, *size), tile=(7, 8))


@pytest.mark.parametrize("tile", [1, 3, (2, 29), (23, 5), (1000, 4)])
def test_tile_size(tile: int | tuple[int, int]) -> None:
    assert_streamed_equals_plain(small_net(), (2, 3, 23, 29), tile=tile)


def test_image_smaller_than_the_tile() -> None:
    assert_streamed_equals_plain(small_net(), (2, 3, 23, 29), tile=64, one_tile=True)


def test_no_padding_at_all() -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 5, stride=2), nn.MaxPool2d(2), nn.Conv2d(4, 2, 3))
    assert_streamed_equals_plain(net, (1, 3, 41, 37), tile=(6, 10))


def test_channels_last_image() -> None:
    plain, twin = small_net().double(), small_net().double()
    twin.load_state_dict(plain.state_dict())
    image = torch.randn(2, 3, 23, 29, dtype=torch.float64)
    last = image.clone(memory_format=torch.channels_last)
    torch.testing.assert_close(StreamingModel(twin, tile=8)(last), plain(image), rtol=1e-12, atol=1e-14)


def test_channels_last_inside() -> None:
    assert_streams(lambda x: x.contiguous(memory_format=torch.channels_last).sin())


# --- chance -------------------------------------------------------------------------------------------


def _run(net: nn.Module, image: Tensor, tile: int | None, seed: int) -> tuple[Tensor, Tensor]:
    """Output and image gradient, streamed where a tile is given."""
    model = net if tile is None else StreamingModel(net, tile=tile)
    if isinstance(model, StreamingModel):
        model.resident_tail = False
    leaf = image.clone().requires_grad_()
    torch.manual_seed(seed)
    output = model(leaf)
    (gradient,) = torch.autograd.grad(output, leaf, torch.ones_like(output))
    return output.detach(), gradient


class DropPath(nn.Module):
    """Stochastic depth as timm draws it."""

    def forward(self, x: Tensor) -> Tensor:
        mask = x.new_empty((x.shape[0], 1, 1, 1)).bernoulli_(0.6)
        mask.div_(0.6)
        return x * mask


@pytest.mark.parametrize("module", [DropPath(), nn.Dropout2d(0.4)], ids=["stochastic depth", "channels"])
def test_small_draws_are_those_of_plain_pytorch(module: nn.Module) -> None:
    net = nn.Sequential(
        nn.Conv2d(3, WIDTH, 3),
        module,
        nn.BatchNorm2d(WIDTH),
        nn.Conv2d(WIDTH, 4, 3),
        module,
        nn.Conv2d(4, 2, 3),
    ).double()
    image = torch.randn(5, 3, 23, 19, dtype=torch.float64)
    torch.testing.assert_close(_run(net, image, 8, 3), _run(net, image, None, 3), rtol=1e-9, atol=1e-12)
    assert not torch.equal(_run(net, image, 8, 3)[0], _run(net, image, 8, 4)[0])


IMAGE = torch.linspace(0.5, 1.5, 2 * 3 * 40 * 33, dtype=torch.float64).reshape(2, 3, 40, 33)
"""Without zeros, so that a dropped element shows."""


@pytest.mark.parametrize("probability", [0.1, 0.5, 0.9])
def test_dropout_keeps_its_share_and_the_mean(probability: float) -> None:
    output, gradient = _run(nn.Dropout(probability), IMAGE, 9, 0)
    kept = (output != 0).double().mean().item()
    deviation = (probability * (1 - probability) / output.numel()) ** 0.5
    assert abs(kept - (1 - probability)) < 4 * deviation
    torch.testing.assert_close(output, IMAGE * gradient)
    torch.testing.assert_close(gradient[output != 0].unique(), torch.tensor([1 / (1 - probability)]).double())


def test_dropout_of_everything() -> None:
    output, gradient = _run(nn.Dropout(1.0), IMAGE, 9, 0)
    assert not output.any()
    assert not gradient.any()


def test_dropout_depends_on_the_seed_alone() -> None:
    net = nn.Dropout(0.5)
    first = _run(net, IMAGE, 9, 0)
    for tile in (9, 16, 40):
        torch.testing.assert_close(_run(net, IMAGE, tile, 0), first, rtol=0, atol=0)
    other = _run(net, IMAGE, 9, 1)[0]
    agreement = ((other != 0) == (first[0] != 0)).double().mean().item()
    assert 0.47 < agreement < 0.53


def test_dropout_layers_draw_apart() -> None:
    net = Applied(lambda x: torch.cat((F.dropout(x, 0.5), F.dropout(x, 0.5)), 1))
    first, second = (_run(net, IMAGE, 9, 0)[0] != 0).chunk(2, 1)
    agreement = (first == second).double().mean().item()
    assert 0.47 < agreement < 0.53


def test_dropout_has_no_pattern() -> None:
    kept = (_run(nn.Dropout(0.5), IMAGE, 9, 0)[0] != 0).double() * 2 - 1
    for dim in range(4):
        neighbours = (kept * kept.roll(1, dim)).mean().item()
        assert abs(neighbours) < 4 / kept.numel() ** 0.5


@pytest.mark.parametrize("tiles", [(7, 40), (13, 22)])
def test_dropout_inside_a_net_is_the_same_for_any_tiling(tiles: tuple[int, int]) -> None:
    # Halos read the mask of their neighbours, and the backward pass draws it again.
    net = nn.Sequential(
        nn.Conv2d(3, WIDTH, 3, padding=1, bias=False),
        nn.BatchNorm2d(WIDTH),
        nn.ReLU(),
        nn.Dropout(0.3),
        nn.Conv2d(WIDTH, 4, 5, stride=2),
        nn.Dropout(0.4),
        nn.Conv2d(4, 2, 3),
    ).double()
    first, second = (_run(net, IMAGE, tile, 5) for tile in tiles)
    torch.testing.assert_close(first, second, rtol=1e-9, atol=1e-12)


def test_gradient_is_that_of_the_mask_that_was_drawn() -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Dropout(0.5), nn.Conv2d(4, 2, 3)).double()
    direction = torch.randn_like(IMAGE)
    _, gradient = _run(net, IMAGE, 9, 2)
    # The net is linear, so one step of any length gives the derivative.
    change = (_run(net, IMAGE + direction, 9, 2)[0] - _run(net, IMAGE, 9, 2)[0]).sum()
    torch.testing.assert_close((gradient * direction).sum(), change)


def test_dropout_of_small_values_draws_as_plain_pytorch() -> None:
    net = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(0.5), nn.Linear(8, 3)
    ).double()
    torch.testing.assert_close(_run(net, IMAGE, 9, 2), _run(net, IMAGE, None, 2))


def test_operators_without_a_rule_say_so() -> None:
    net = after_convolution(lambda x: x.roll((1, 2), (2, 3)))
    (resident,) = streaming_plan(net, SHAPE, TILE)[1].residents
    assert resident.startswith("aten.roll: it has no rule")
