"""Normalisation and reductions, streamed and plain."""

from __future__ import annotations

import copy
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from helpers import assert_streamed_equals_plain, randomized
from operator_cases import SHAPE, TILE, WIDTH, Applied, Function, assert_streams, by_name
from operator_counts import count_operators
from torch import Tensor, nn
from torch.nn import functional as F

from streamcnn import StreamingModel
from streamcnn.graph.ops import norm_pass

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
    assert_streamed_equals_plain(normalized(norm).train(train), SHAPE, tile=TILE)


@by_name({name: NORMS[name] for name in ("batch, not affine", "instance", "group of one")})
def test_gradients_of_weight_and_bias_are_made_like_a_weight(
    monkeypatch: pytest.MonkeyPatch, case: Callable[[], nn.Module]
) -> None:
    """As on a card, whose kernel ends in an error where they are asked for and there is none."""
    called: list[bool] = []

    def backward(gradient: Tensor, x: Tensor, weight: Tensor | None, *args: Any) -> tuple[Tensor, ...]:
        *_, wanted = args
        called.append(weight is not None or not (wanted[1] or wanted[2]))
        return torch.ops.aten.native_batch_norm_backward(gradient, x, weight, *args)

    monkeypatch.setattr(norm_pass, "aten", SimpleNamespace(native_batch_norm_backward=backward))
    assert_streamed_equals_plain(normalized(case()), SHAPE, tile=TILE)
    assert called
    assert all(called)


def test_a_tile_is_normalised_by_few_operators() -> None:
    """Deviations, scales and gradients of statistics are global values: a tile gives its two sums."""
    x = torch.randn(SHAPE, requires_grad=True)
    mean = torch.randn(SHAPE[1])
    scale, shift = (torch.rand(SHAPE[1], requires_grad=True) for _ in range(2))
    found: list[Tensor] = []
    forward = count_operators(
        lambda: found.append(norm_pass.normalize(x, mean, scale, shift)),
    )
    assert forward == {"full_like": 1, "native_batch_norm": 1}
    sent = torch.randn(SHAPE)
    backward = count_operators(lambda: torch.autograd.grad(found, (x, scale, shift), sent))
    assert backward == {"full_like": 1, "native_batch_norm_backward": 1}


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


@pytest.mark.parametrize("num_images", [1, 2])
def test_a_gradient_with_its_axes_in_another_order(num_images: int) -> None:
    # ATen's own batch and instance norm give other values there than for the same gradient in one piece.
    net = nn.Sequential(nn.GroupNorm(2, WIDTH), Applied(lambda x: x.permute(2, 3, 0, 1).sin()))
    assert_streams(net, (num_images, *SHAPE[1:]))


def test_statistics_of_the_shape_of_a_part_of_a_map() -> None:
    def norm(x: Tensor) -> Tensor:
        part = x[0, :, 0, 0]
        return F.batch_norm(x, torch.zeros_like(part), torch.full_like(part, 2.0))

    assert_streamed_equals_plain(normalized(Applied(norm)), SHAPE, tile=TILE, resident=True)


@pytest.mark.parametrize(
    "norm",
    [
        nn.BatchNorm2d(3),
        nn.BatchNorm2d(3, momentum=None),
        nn.InstanceNorm2d(3, affine=True, track_running_stats=True),
    ],
)
@pytest.mark.parametrize("tile", [8, 16])
def test_one_norm_used_several_times(norm: nn.Module, tile: int) -> None:
    """In tiles, and where running statistics of one use enter another on whole values."""
    layers = [nn.Conv2d(3, 3, 3, bias=False), norm, nn.Tanh()]
    net = nn.Sequential(*layers * 4, nn.AdaptiveAvgPool2d(2), *layers[1:] * 2)
    assert_streamed_equals_plain(randomized(net), (2, 3, 30, 30), tile=tile, resident=None)


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


@by_name(
    {
        "of a map": lambda: normalized(nn.BatchNorm2d(WIDTH, momentum=None)),
        "of vectors": lambda: nn.Sequential(
            nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.BatchNorm1d(4, momentum=None)
        ),
    }
)
def test_cumulative_average_over_several_updates(case: Callable[[], nn.Module]) -> None:
    plain, twin = case().double(), case().double()
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
    "deviation of zeros": lambda x: F.relu(x - 100).std((2, 3)) + x.sum((2, 3)),
    "variance of channels": lambda x: x.var(1, keepdim=True) * x,
    "softmax of a mean": lambda x: torch.softmax(x.mean((2, 3)), 1),
    "other reductions of channels": lambda x: x.logsumexp(1, keepdim=True) * x.prod(1, keepdim=True),
    "extremes of whole numbers": lambda x: (
        x.mean((2, 3)) + (x.clamp(0, 1) * 255).byte().amin((2, 3)),
        (x * 1000).clamp(-128, 127).to(torch.int8).amin((0, 2, 3)),
        (x > -1).amin((2, 3)),
    ),
    "positions of channels": lambda x: x * (x.argmax(1, keepdim=True) + (x > 0).any(1, keepdim=True)),
    "largest and smallest of all": lambda x: (x / (x.max() + 1), x - F.interpolate(x, scale_factor=2).min()),
    "of all, in half the bits": lambda x: (
        x * x.float().max() + x.float().sum((2, 3), dtype=torch.float64).mean()
    ),
    "any and all": lambda x: (
        x * ((x > 3).any() + 2 * (x < 9).all()),
        (x > 1).any(2).any(2) * (x.mean((2, 3)) + x.bool().all((0, 2, 3))),
        x * (x > 0.5).any(3, keepdim=True) * (x > -1).all((1, 2), keepdim=True),
    ),
    "any over no axes": lambda x: x * torch.any(x > 0.3, dim=()),
    "any of bytes": lambda x: (x.mean((2, 3)), (x * 9).clamp(0, 9).byte().any(), (x * 9).byte().all(1)),
    "how many are not zero": lambda x: (
        x * torch.count_nonzero(x > 0),
        x.mean((2, 3)) * torch.count_nonzero(F.relu(x), (2, 3)),
        x * torch.count_nonzero(x > 0, 1)[:, None],
    ),
    "largest magnitude": lambda x: (
        x / torch.linalg.vector_norm(x, torch.inf),
        torch.linalg.vector_norm(F.interpolate(x, scale_factor=2), -torch.inf, (2, 3)),
        torch.linalg.vector_norm(x, torch.inf, 1),
    ),
    "count": lambda x: x.sum((2, 3)) / (x > 0.1).sum((2, 3)),
    "masked mean": lambda x: (x * (x > 0)).sum((2, 3)) / (x > 0).to(x.dtype).mean((2, 3)),
    "two of the same map": lambda x: torch.cat((x.mean((2, 3)), x.amax((2, 3)), x.var((2, 3))), 1),
    "one after another": lambda x: (x - x.mean((2, 3), keepdim=True)).abs().amax((2, 3)),
    "channels last": lambda x: x.permute(0, 2, 3, 1).mean((1, 2)),
    "mean of rows": lambda x: x * x.mean(2, keepdim=True),
    "mean of columns, axis dropped": lambda x: x.mean(3),
    "mean of columns and channels": lambda x: x * x.mean((1, 3), keepdim=True),
    "sum of columns over the batch": lambda x: x.sum((0, -1)).sin(),
    "count of rows": lambda x: x.sum(2) / (x > 0.1).sum(2).clamp(min=1),
    "maximum of rows of equal values": lambda x: F.interpolate(x, scale_factor=2).amax(2),
    "minimum of columns, channels last": lambda x: x.permute(0, 2, 3, 1).amin((0, 2)),
    "norm of rows": lambda x: torch.linalg.vector_norm(x, 3, (1, 2)),
    "rows of columns": lambda x: x * x.mean(3).mean(2)[:, :, None, None],
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


def test_a_norm_over_no_values_is_planned() -> None:
    # As in networks whose width is divided until nothing is left.
    assert_streams(lambda x: x + F.layer_norm(x.mean((2, 3))[:, :0], (0,)).sum())


def volumes(x: Tensor) -> Tensor:
    """Three slices of each map, along the last axis."""
    return torch.stack((x, x.sin(), x.cos()), -1)


RESIDENT = {
    "matrix product of rows": lambda x: x @ x.transpose(2, 3),
    "rolled into other rows": lambda x: x.roll(3),
    "channels last shuffled": lambda x: F.channel_shuffle(x[:, :, 1:].permute(0, 2, 3, 1), 2),
    "channels last into rows": lambda x: F.pixel_unshuffle(x[:, :, 1:, 1:].permute(0, 2, 3, 1), 2),
    "rows into channels last": lambda x: F.pixel_shuffle(x[:, :, 1:].permute(0, 2, 3, 1), 2),
    "channels last pooled": lambda x: F.adaptive_avg_pool2d(x.permute(0, 2, 3, 1), (3, 2)),
    "largest of channels last": lambda x: F.adaptive_max_pool2d(x.permute(0, 2, 3, 1), 1),
    "layer norm of volumes": lambda x: F.layer_norm(volumes(x), volumes(x).shape[2:]),
    "row by row": lambda x: x[:, :, 3] * x[:, :, 5],
    "rows of bounded norm": lambda x: x.renorm(2, 2, 9.0),
}


@by_name(RESIDENT)
def test_resident_operator(case: Function) -> None:
    assert_streams(case, resident=True)


VOLUMES: dict[str, Function] = {
    "batch norm": lambda x: F.batch_norm(volumes(x), None, None, training=True),
    "group norm": lambda x: F.group_norm(volumes(x), 2),
    "instance norm": lambda x: F.instance_norm(volumes(x)),
}


@by_name(VOLUMES)
def test_norms_of_volumes(case: Function) -> None:
    assert_streams(case)


LINES: dict[str, Function] = {
    "largest of columns": lambda x: x.max(2)[0],
    "largest of rows, smallest of columns": lambda x: (
        x * x.max(3, keepdim=True)[0] + x.min(2, keepdim=True)[0]
    ),
    "largest of equal values": lambda x: x.relu() + x.relu().max(-1, keepdim=True).values,
    "places": lambda x: x * x.argmax(2, keepdim=True).sin() + x.min(3, keepdim=True).indices,
    "places without axes": lambda x: x.argmin(-1)[..., None] * x,
    "variance of rows": lambda x: x * x.var(3, keepdim=True),
    "deviation of columns": lambda x: x * x.std(2)[:, :, None],
    "of columns and channels": lambda x: x + x.var((1, 2), keepdim=True, unbiased=False),
    "mean and variance": lambda x: sum(torch.var_mean(x, 2, keepdim=True)) * x,
}


@by_name(LINES)
def test_statistics_of_lines(case: Function) -> None:
    assert_streams(case)


def test_the_largest_of_a_line_of_whole_numbers() -> None:
    assert_streams(lambda x: x * (x * 100).long().max(2, keepdim=True)[0], resident=False)
