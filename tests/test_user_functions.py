"""The user's own Functions: streamed where every position is treated alike, else run on whole maps."""

from __future__ import annotations

import gc
import operator
from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers import assert_streamed_equals_plain
from operator_cases import SHAPE, TILE, WIDTH, by_name
from torch import Tensor, fx, nn
from torch.autograd import Function

from streamcnn import StreamingModel
from streamcnn.graph.recorded_function import RecordedFunction, num_results_wanted, with_first_results

Backward = Callable[[Any, Tensor], Any]


def function(forward: Callable[..., Tensor], backward: Backward) -> type[Function]:
    """A Function of ``forward``, which saves all that it is given."""

    class Made(Function):
        @staticmethod
        def forward(ctx: Any, *operands: Tensor) -> Tensor:
            ctx.save_for_backward(*operands)
            return forward(*operands)

        @staticmethod
        def backward(ctx: Any, *gradients: Tensor) -> Any:
            return backward(ctx.saved_tensors, gradients[0])

    return Made


class Applied(nn.Module):
    """Convolutions before and behind a Function of a map and of weights."""

    def __init__(self, made: type[Function], *weights: Tensor, channels: int = WIDTH, last: bool = False):
        super().__init__()
        self.before = nn.Conv2d(3, WIDTH, 3, padding=1)
        self.weights = nn.ParameterList(weights)
        self.behind = nn.Conv2d(channels, 2, 3)
        self.made, self.last = made, last

    def forward(self, x: Tensor) -> Tensor:
        x = self.before(x)
        weights = [self.weights[place] for place in range(len(self.weights))]
        if self.last:
            return self.behind(self.made.apply(x.permute(0, 2, 3, 1), *weights).permute(0, 3, 1, 2))
        return self.behind(self.made.apply(x, *weights))


class LayerNorm(Function):
    """The norm of each pixel's channels, as restoration networks have it (NAFNet)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, eps: float = 1e-6) -> Tensor:
        channels = x.size(1)
        mean = x.mean(1, keepdim=True)
        var = (x - mean).pow(2).mean(1, keepdim=True)
        y = (x - mean) / (var + eps).sqrt()
        ctx.eps = eps
        ctx.save_for_backward(y, var, weight)
        return weight.view(1, channels, 1, 1) * y + bias.view(1, channels, 1, 1)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        (gradient,) = gradients
        y, var, weight = ctx.saved_tensors
        scaled = gradient * weight.view(1, gradient.size(1), 1, 1)
        of_mean, of_scale = scaled.mean(1, keepdim=True), (scaled * y).mean(1, keepdim=True)
        to_x = 1.0 / torch.sqrt(var + ctx.eps) * (scaled - y * of_scale - of_mean)
        to_weight = (gradient * y).sum(dim=3).sum(dim=2).sum(dim=0)
        return to_x, to_weight, gradient.sum(dim=3).sum(dim=2).sum(dim=0), None


class LastNorm(Function):
    """The norm of the last axis, with the weights' gradients from flat sums."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        scale = x.square().mean(-1, keepdim=True).add(1e-6).rsqrt()
        ctx.save_for_backward(x, scale, weight)
        return x * scale * weight

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        (gradient,) = gradients
        x, scale, weight = ctx.saved_tensors
        scaled = gradient * weight
        to_x = scale * (scaled - x * scale * scale * (scaled * x).mean(-1, keepdim=True))
        return to_x, (gradient * x * scale).sum((0, 1, 2))


def _cut(saved: Any, gradient: Tensor) -> Any:
    x, limit = saved
    inside = (x < limit) & (x > 0)
    return gradient * inside, (gradient * (x >= limit)).sum().reshape(1)


def _quantised(x: Tensor, step: Tensor) -> Tensor:
    return (x / step).clamp(-4, 3).round() * step


def _of_step(saved: Any, gradient: Tensor) -> Any:
    x, step = saved
    share = (x / step).clamp(-4, 3)
    inside = (share > -4) & (share < 3)
    to_step = torch.where(inside, share.round() - share, share.round()) * gradient * 0.1
    # The gradient of an operand that was broadcast: autograd sums it.
    return torch.where(inside, gradient, 0.0), to_step


def _softmax(saved: Any, gradient: Tensor) -> Tensor:
    shares = saved[0].softmax(1)
    return shares * (gradient - (gradient * shares).sum(1, keepdim=True))


def _channel() -> Tensor:
    return torch.linspace(0.5, 1.5, WIDTH)


def _position() -> Tensor:
    return torch.linspace(-1, 1, SHAPE[2] * SHAPE[3]).reshape(1, 1, *SHAPE[2:])


ALIKE: dict[str, Callable[[], nn.Module]] = {
    "a norm of channels": lambda: Applied(LayerNorm, _channel(), _channel() - 1),
    "a norm of the last axis": lambda: Applied(LastNorm, _channel(), last=True),
    "clipped at a learned limit": lambda: Applied(
        function(lambda x, limit: x.clamp(min=0).minimum(limit), _cut), torch.tensor([0.3])
    ),
    "quantised by a learned step": lambda: Applied(
        function(_quantised, _of_step), _channel().reshape(1, -1, 1, 1) / 8
    ),
    "softmax of channels": lambda: Applied(function(lambda x: x.softmax(1), _softmax)),
    "two maps, one of them twice": lambda: Applied(
        function(lambda x, y: x * y.sin(), lambda saved, g: (g * saved[1], 3 * g * saved[0])), _position()
    ),
    "rows alone": lambda: Applied(
        function(lambda x, y: x * y, lambda saved, g: (g * saved[1], g * saved[0])), _position()[..., :1]
    ),
    "zeros where it is negative": lambda: Applied(
        function(torch.relu, lambda saved, g: torch.where(saved[0] > 0, g, torch.zeros_like(g)))
    ),
    "zeros for the weights": lambda: Applied(
        function(_weighted, lambda saved, g: (g, torch.zeros_like(saved[1]))), _channel()
    ),
    "a number of positions": lambda: Applied(
        function(lambda x: x * x.shape[2], lambda saved, g: g * 7 / saved[0].shape[3])
    ),
    "a number of positions in one row": lambda: Applied(
        function(lambda x: x * x[0, 0, 0].numel(), lambda saved, g: g / g[0, 0].numel())
    ),
}


@by_name(ALIKE)
def test_what_treats_every_position_alike_is_streamed(case: Callable[[], nn.Module]) -> None:
    torch.manual_seed(0)
    unused = frozenset({"weights.0"}) if case is ALIKE["zeros for the weights"] else frozenset()
    assert_streamed_equals_plain(case(), SHAPE, tile=TILE, zeros=unused)


def _plain(saved: Any, gradient: Tensor) -> Tensor:
    return gradient


def _weighted(x: Tensor, weight: Tensor) -> Tensor:
    return x * weight.view(1, -1, 1, 1)


def _of_weight(total: Callable[[Tensor], Tensor]) -> Backward:
    return lambda saved, g: (g * saved[1].view(1, -1, 1, 1), total(g * saved[0]))


MIXING: dict[str, Callable[[], nn.Module]] = {
    "a mean of positions": lambda: Applied(function(lambda x: x - x.mean((2, 3), keepdim=True), _plain)),
    "neighbours": lambda: Applied(function(lambda x: x + x.roll(1, 3), _plain)),
    "rows turned into columns and back": lambda: Applied(
        function(lambda x: (x.flatten(2) * 2).view_as(x), _plain)
    ),
    "a mean of gradients": lambda: Applied(
        function(lambda x: x.sin(), lambda saved, g: g - g.mean((2, 3), keepdim=True))
    ),
    "a mean for the weights": lambda: Applied(
        function(_weighted, _of_weight(lambda products: products.mean((0, 2, 3)))), _channel()
    ),
    "the weights' gradient is clipped": lambda: Applied(
        function(_weighted, _of_weight(lambda products: products.sum((0, 2, 3)).clamp(-1, 1))), _channel()
    ),
    "the weights' gradient is scaled by its norm": lambda: Applied(
        function(_weighted, _of_weight(lambda p: p.sum((0, 2, 3)) / p.sum((0, 2, 3)).norm())), _channel()
    ),
    "the weights' gradient is squared": lambda: Applied(
        function(_weighted, _of_weight(lambda products: products.square().sum((0, 2, 3)))), _channel()
    ),
    "a sum goes back to positions": lambda: Applied(
        function(lambda x: x.sin(), lambda saved, g: g + g.sum((2, 3), keepdim=True) / 99)
    ),
    "a gradient of ones": lambda: Applied(
        function(_weighted, lambda saved, g: (g, torch.ones_like(saved[1]))), _channel()
    ),
    "no more zeros": lambda: Applied(
        function(torch.relu, lambda saved, g: torch.where(saved[0] > 0, g, torch.zeros_like(g).add_(0.1)))
    ),
    "random numbers": lambda: Applied(function(lambda x: x + torch.rand_like(x), _plain)),
    "a table of positions": lambda: Applied(
        function(lambda x: x * torch.linspace(0, 1, x.shape[3], dtype=x.dtype), _plain)
    ),
    "the shape of the map": lambda: Applied(
        function(lambda x: x.sin(), lambda saved, g: (g * 2).expand((*saved[0].shape[:2], 21, 17)))
    ),
}


@by_name(MIXING)
def test_what_mixes_positions_runs_on_whole_maps(case: Callable[[], nn.Module]) -> None:
    torch.manual_seed(0)
    assert_streamed_equals_plain(case(), SHAPE, tile=TILE, resident=True)


def test_the_reason_names_the_operator() -> None:
    module = MIXING["the weights' gradient is clipped"]()
    found = assert_streamed_equals_plain(module, SHAPE, tile=TILE, resident=True)
    assert "not linear in the one that arrives: aten.clamp" in found.residents[0]


class Exponential(Function):
    """A Function that saves what it returns, and what it has computed on the way."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        doubled = 2 * x
        ctx.result = doubled.exp()
        ctx.doubled = doubled
        ctx.save_for_backward(x)
        return ctx.result

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return gradients[0] * ctx.result * (ctx.doubled / x)


@pytest.mark.parametrize("is_whole", [False, True])
def test_what_tiles_save_is_gone_with_them(is_whole: bool) -> None:
    """Without waiting for Python to look for reference cycles."""
    mixing = function(lambda x: x - x.mean((2, 3), keepdim=True), _plain)
    behind = Applied(mixing) if is_whole else Applied(LayerNorm, _channel(), _channel())
    first = Applied(Exponential)
    first.behind = nn.Conv2d(WIDTH, 3, 3)
    model = StreamingModel(nn.Sequential(first, behind), tile=16)
    model.resident_tail = False

    def update() -> int:
        model(torch.randn(1, 3, 60, 60)).sum().backward()
        return sum(isinstance(each, Tensor) for each in gc.get_objects())

    update()
    gc.collect()
    gc.disable()
    try:
        assert update() == update()
    finally:
        gc.enable()


def test_results_that_nothing_reads_are_not_made() -> None:
    """Dynamo of PyTorch 2.11 returns intermediate values as results, too."""

    def forward(x: Tensor) -> Any:
        doubled = 2 * x
        return (doubled.exp(), doubled, x.sin()), (x, doubled)

    def backward(first: Tensor, second: Tensor, third: Tensor, x: Tensor, doubled: Tensor) -> Any:
        return (first * doubled + second * x,)

    bodies = fx.symbolic_trace(forward), fx.symbolic_trace(backward)
    outer = fx.Graph()
    call = outer.call_function(RecordedFunction.apply, (outer.placeholder("x"),))
    assert num_results_wanted(bodies, call) == 2  # the gradient of the second is read
    outer.call_function(operator.getitem, (call, 2))
    assert num_results_wanted(bodies, call) is None

    x = torch.randn(4, dtype=torch.float64, requires_grad=True)
    results = RecordedFunction.apply(with_first_results(bodies, 2), [], x)
    (gradient,) = torch.autograd.grad(sum(results).sum(), x)
    assert len(results) == 2
    torch.testing.assert_close(gradient, 2 * x + x)
