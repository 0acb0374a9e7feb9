"""Dropout: its mask is a function of seed and position, and small draws are plain PyTorch's."""

from __future__ import annotations

import itertools
import time
from typing import Any

import pytest
import torch
from helpers import streaming_plan
from operator_cases import WIDTH, Applied
from torch import Tensor, nn
from torch.nn import functional as F

from streamcnn import StreamingModel


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

    def __init__(self, kept: float) -> None:
        super().__init__()
        self.kept = kept

    def forward(self, x: Tensor) -> Tensor:
        mask = x.new_empty((x.shape[0], 1, 1, 1)).bernoulli_(self.kept)
        mask.div_(self.kept)
        return x * mask


class DropConnect(nn.Module):
    """A convolution that drops elements of its weight."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(WIDTH, WIDTH, 3, 3))

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, F.dropout(self.weight, 0.4)[: x.shape[1], : x.shape[1]])


# ATen's own probability is 0.5, which a recorded call leaves out.
@pytest.mark.parametrize(
    "module",
    [DropPath(0.6), DropPath(0.5), nn.Dropout2d(0.4), nn.Dropout2d(0.4, inplace=True), DropConnect()],
    ids=["stochastic depth", "stochastic depth, one half", "channels", "channels, in place", "weights"],
)
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


@pytest.mark.parametrize("resident_tail", [True, False])
@pytest.mark.parametrize(
    "pooling", [nn.AdaptiveAvgPool2d(1), nn.Conv2d(WIDTH, WIDTH, (21, 17))], ids=["pooled", "convolved"]
)
def test_dropout_of_one_position_is_that_of_plain_pytorch(pooling: nn.Module, resident_tail: bool) -> None:
    net = nn.Sequential(nn.Conv2d(3, WIDTH, 3), pooling, nn.Dropout(0.5), nn.Conv2d(WIDTH, 4, 1)).double()
    model = StreamingModel(net, tile=8)
    model.resident_tail = resident_tail
    image = torch.randn(5, 3, 23, 19, dtype=torch.float64)
    torch.manual_seed(3)
    found, after = model(image), torch.rand(1)
    torch.manual_seed(3)
    torch.testing.assert_close(found, net(image), rtol=1e-9, atol=1e-12)
    assert torch.equal(after, torch.rand(1))


@pytest.mark.parametrize("module", [nn.Dropout(0.3, inplace=True), nn.Dropout2d(0.3, inplace=True)])
def test_dropout_in_place_is_streamed(module: nn.Module) -> None:
    plan = streaming_plan(nn.Sequential(nn.Conv2d(3, WIDTH, 3), module), (2, 3, 20, 20), 8)[1]
    assert plan.residents == ()


class Noisy(nn.Module):
    """Numbers drawn of the shape of a map, as DropBlock and noise layers do."""

    def forward(self, x: Tensor) -> Tensor:
        kept = torch.empty_like(x).bernoulli_(0.7)
        return x * kept * torch.rand_like(x) + torch.randn_like(x[:, :1])


def test_draws_of_a_maps_shape_are_those_of_plain_pytorch() -> None:
    net = nn.Sequential(nn.Conv2d(3, WIDTH, 3), Noisy(), nn.Conv2d(WIDTH, 2, 3)).double()
    image = torch.randn(2, 3, 23, 19, dtype=torch.float64)
    torch.testing.assert_close(_run(net, image, 8, 3), _run(net, image, None, 3), rtol=1e-9, atol=1e-12)
    assert streaming_plan(net, (2, 3, 23, 19), 8)[1].residents == ()


@pytest.mark.parametrize("low_high", [(5,), (-2, 3)])
def test_whole_numbers_like_a_map_have_no_gradient(low_high: tuple[int, ...]) -> None:
    drawn = Applied(lambda x: x * torch.randint_like(x, *low_high))
    net = nn.Sequential(nn.Conv2d(3, WIDTH, 3), drawn, nn.Conv2d(WIDTH, 2, 3)).double()
    image = torch.randn(2, 3, 23, 19, dtype=torch.float64)
    torch.testing.assert_close(_run(net, image, 8, 3), _run(net, image, None, 3), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("module", [nn.Dropout(1.0), nn.Dropout2d(1.0)], ids=["elements", "channels"])
def test_dropping_everything_draws_nothing(module: nn.Module) -> None:
    net = nn.Sequential(Applied(lambda x: x + module(x)), nn.Conv2d(3, WIDTH, 3), DropPath(0.6)).double()
    image = torch.randn(5, 3, 23, 19, dtype=torch.float64)
    torch.testing.assert_close(_run(net, image, 8, 3), _run(net, image, None, 3), rtol=1e-9, atol=1e-12)


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


class DroppedTokens(nn.Module):
    """Dropout of tokens, which are a map where they are streamed."""

    def forward(self, x: Tensor) -> Tensor:
        return F.dropout(x.flatten(2).transpose(1, 2), 0.4).transpose(1, 2).reshape(x.shape)


def test_tokens_are_dropped_alike_in_tiles_and_in_the_resident_tail() -> None:
    net = nn.Sequential(nn.Conv2d(3, WIDTH, 3), DroppedTokens(), nn.Conv2d(WIDTH, 2, 3)).double()
    image = torch.randn(2, 3, 23, 19, dtype=torch.float64)
    tiled = _run(net, image, 8, 3)
    whole = StreamingModel(net, "8GiB")
    leaf = image.clone().requires_grad_()
    torch.manual_seed(3)
    output = whole(leaf)
    (gradient,) = torch.autograd.grad(output, leaf, torch.ones_like(output))
    assert not whole.plan(image.shape, image.dtype).phases
    torch.testing.assert_close(tiled, (output.detach(), gradient), rtol=1e-9, atol=1e-12)


# Not a counter in the class: a function that changes one is refused.
_shaken_paths = itertools.count()


class _ShakenPath(torch.autograd.Function):
    """ShakeDrop: one number for each image, others for the gradient than for the value."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        next(_shaken_paths)
        return x * torch.rand(x.shape[0], 1, 1, 1, dtype=x.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return grads[0] * torch.rand(grads[0].shape[0], 1, 1, 1, dtype=grads[0].dtype)


class _Weights(torch.autograd.Function):
    """Numbers that depend on nothing, as those of torch.distributions.Beta."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return torch.rand_like(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return torch.zeros_like(grads[0])


class DrawingInside(nn.Module):
    """Draws in functions of the user's own, and between them."""

    def __init__(self, *, is_guarded: bool) -> None:
        super().__init__()
        self.is_guarded = is_guarded

    def forward(self, x: Tensor) -> Tensor:
        if not self.is_guarded:
            time.perf_counter()  # Dynamo does not follow it.
        weights = _Weights.apply(torch.ones(x.shape[0], 1, 1, 1, dtype=x.dtype))
        others = torch.rand(x.shape[0], 1, 1, 1, dtype=x.dtype)
        x = torch.relu(x - x.mean((2, 3), keepdim=True)) * weights + (1 - weights) * others * x.flip(0)
        return _ShakenPath.apply(x)


@torch.library.custom_op("streamcnn_tests::fill_at_random", mutates_args={"x"})
def _fill_at_random(x: Tensor) -> None:
    x.copy_(torch.rand(x.shape, dtype=x.dtype))


class Filling(nn.Module):
    """Has an operator of another library draw, whose result is needed late."""

    def forward(self, x: Tensor) -> Tensor:
        weights = torch.ones(x.shape[0], 1, 1, 1, dtype=x.dtype)
        _fill_at_random(weights)
        others = torch.rand(x.shape[0], 1, 1, 1, dtype=x.dtype)
        return torch.relu(x - x.mean((2, 3), keepdim=True)) * weights + others * x


class DrawingForEach(nn.Module):
    """Draws under a transform."""

    def forward(self, x: Tensor) -> Tensor:
        scales = torch.vmap(lambda each: each * torch.rand(1), randomness="different")(x.mean((2, 3)))
        return x * scales[:, :, None, None] + torch.rand(x.shape[0], 1, 1, 1)


@pytest.mark.parametrize(
    "module",
    [DrawingInside(is_guarded=True), DrawingInside(is_guarded=False), DrawingForEach(), Filling()],
    ids=["functions", "functions in code without guards", "vmap", "another library"],
)
def test_code_of_the_users_draws_as_it_would(module: nn.Module) -> None:
    net = nn.Sequential(nn.Conv2d(3, WIDTH, 3), module, nn.Conv2d(WIDTH, 2, 3)).double()
    image = torch.randn(5, 3, 23, 19, dtype=torch.float64)
    found, after = _run(net, image, 8, 3), torch.rand(1)
    torch.testing.assert_close(found, _run(net, image, None, 3), rtol=1e-9, atol=1e-12)
    assert torch.equal(after, torch.rand(1))


def test_planning_does_not_run_code_of_the_users() -> None:
    net = nn.Sequential(nn.Conv2d(3, WIDTH, 3), DrawingInside(is_guarded=False))
    model = StreamingModel(net.double(), tile=8)
    before = next(_shaken_paths)
    model.plan((2, 3, 23, 19))
    # Where it cannot be followed it runs once, to be captured.
    assert next(_shaken_paths) == before + 2
