"""Operators and functions of the user's own: what they overwrite, and what else they return."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers import TOLERANCE, assert_streamed_equals_plain
from torch import Tensor, nn
from torch.autograd import Function
from torch.library import custom_op

from streamcnn import StreamingModel
from streamcnn.errors import UnsupportedModel
from streamcnn.verification import relative_errors


def _move(average: Tensor, x: Tensor) -> None:
    average.mul_(0.9).add_(x.mean((0, 2, 3)), alpha=0.1)


def _averaged(x: Tensor, average: Tensor) -> None:
    _move(average, x)


def _averaged_and_pooled(x: Tensor, average: Tensor) -> Tensor:
    _move(average, x)
    return x.amax((2, 3))


def _averaged_and_two(x: Tensor, average: Tensor) -> tuple[Tensor, Tensor]:
    _move(average, x)
    return x.amax((2, 3)), x.amin((2, 3))


def _averaged_and_ranged(x: Tensor, average: Tensor, more: list[Tensor]) -> Tensor:
    _move(average, x)
    more[0].copy_(x.amax((0, 2, 3)))
    more[1].add_(1)
    return x.amax((2, 3))


def _named(function: Callable[..., Any], schema: str, *more: str) -> Any:
    name = f"streamcnn_tests::{function.__name__.strip('_')}"
    return custom_op(name, function, mutates_args=("average", *more), schema=schema)


averaged = _named(_averaged, "(Tensor x, Tensor(a!) average) -> ()")
averaged_and_pooled = _named(_averaged_and_pooled, "(Tensor x, Tensor(a!) average) -> Tensor")
averaged_and_two = _named(_averaged_and_two, "(Tensor x, Tensor(a!) average) -> (Tensor, Tensor)")

averaged_and_ranged = _named(
    _averaged_and_ranged, "(Tensor x, Tensor(a!) average, Tensor(b!)[] more) -> Tensor", "more"
)


@averaged_and_ranged.register_fake
def _(x: Tensor, average: Tensor, more: list[Tensor]) -> Tensor:
    return x.new_empty(x.shape[:2])


@averaged_and_pooled.register_fake
def _(x: Tensor, average: Tensor) -> Tensor:
    return x.new_empty(x.shape[:2])


@averaged_and_two.register_fake
def _(x: Tensor, average: Tensor) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape[:2]), x.new_empty(x.shape[:2])


@custom_op("streamcnn_tests::copy_", mutates_args=("average",))
def copy_(average: Tensor, x: Tensor) -> None:
    """Named as an operator of ATen's that does something else."""
    _move(average, x)


def _named_as_another(net: Net, x: Tensor) -> Tensor:
    copy_(net.average, x.detach())
    return x - net.average[:, None, None]


def _nothing_returned(net: Net, x: Tensor) -> Tensor:
    before = x - net.average[:, None, None]
    averaged(x.detach(), net.average)
    return before * 2 - net.average[:, None, None]


def _one_returned(net: Net, x: Tensor) -> Tensor:
    pooled = averaged_and_pooled(x.detach(), net.average)
    return x * pooled[:, :, None, None] - net.average[:, None, None]


def _two_returned(net: Net, x: Tensor) -> Tensor:
    largest, least = averaged_and_two(x.detach(), net.average)
    return x * (largest - least)[:, :, None, None] - net.average[:, None, None]


def _several_written(net: Net, x: Tensor) -> Tensor:
    before = x - net.largest[:, None, None]
    pooled = averaged_and_ranged(x.detach(), net.average, [net.largest, net.count])
    return before * pooled[:, :, None, None] * net.count - (net.average + net.largest)[:, None, None]


class Scaled(Function):
    """A function that also says by how much, and nothing."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, factor: int) -> tuple[Tensor, int, None]:
        ctx.factor = factor
        return x * factor, factor + 1, None

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return gradients[0] * ctx.factor, None


def _with_number(net: Net, x: Tensor) -> Tensor:
    scaled, number, nothing = Scaled.apply(x, 3)
    assert nothing is None
    return scaled * number


class Net(nn.Module):
    def __init__(self, middle: Callable[[Net, Tensor], Tensor], *, is_guarded: bool) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.register_buffer("average", torch.ones(4))
        self.register_buffer("largest", torch.zeros(4))
        self.register_buffer("count", torch.zeros(()))
        self.average: Tensor
        self.largest: Tensor
        self.count: Tensor
        self.middle = middle
        self.is_guarded = is_guarded

    def forward(self, x: Tensor) -> Tensor:
        if not self.is_guarded:
            time.perf_counter()  # Dynamo does not follow it.
        return self.middle(self, self.conv(x))


MIDDLES = (
    *(_nothing_returned, _one_returned, _two_returned, _several_written, _with_number),
    _named_as_another,
)


def _passes(model: nn.Module, net: Net) -> dict[str, dict[str, Tensor]]:
    found: dict[str, dict[str, Tensor]] = {}
    for number in range(3):
        generator = torch.Generator().manual_seed(number)
        image = torch.randn((2, 3, 29, 37), generator=generator, dtype=torch.float64, requires_grad=True)
        output = model(image)
        output.square().sum().backward()
        found[f"pass {number}"] = {
            "output": output.detach(),
            **{name: buffer.clone() for name, buffer in net.named_buffers()},
            **{f"gradient of {name}": p.grad for name, p in net.named_parameters() if p.grad is not None},
        }
        net.zero_grad()
    return found


@pytest.mark.parametrize("middle", MIDDLES)
@pytest.mark.parametrize("is_guarded", [True, False])
def test_what_the_users_operators_write_and_return(
    middle: Callable[[Net, Tensor], Tensor], is_guarded: bool
) -> None:
    plain, streamed = (Net(middle, is_guarded=is_guarded).double() for _ in range(2))
    streamed.load_state_dict(plain.state_dict())
    model = StreamingModel(streamed, tile=16)
    model.resident_tail = False
    errors, _ = relative_errors(_passes(plain, plain), _passes(model, streamed))
    assert max(errors.values()) < TOLERANCE, errors


def test_a_function_that_returns_numbers_beside_a_map_is_streamed() -> None:
    net = Net(_with_number, is_guarded=False)
    assert_streamed_equals_plain(net, (2, 3, 29, 37), tile=16, resident=None)


def _two_in_one_memory(net: Net, x: Tensor) -> Tensor:
    pooled = averaged_and_ranged(x.detach(), net.average, [net.average.view(4), net.count])
    return x * pooled[:, :, None, None]


def test_operators_that_overwrite_a_memory_twice_are_refused() -> None:
    model = StreamingModel(Net(_two_in_one_memory, is_guarded=True).double(), tile=16)
    with pytest.raises(UnsupportedModel, match=r"overwrites several tensors .* in the same memory"):
        model(torch.randn(2, 3, 29, 37, dtype=torch.float64))


def _quantised() -> nn.Module:
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 2, 3), nn.AdaptiveAvgPool2d(1))
    net.qconfig = torch.ao.quantization.get_default_qat_qconfig("fbgemm")  # type: ignore[assignment]
    prepared: nn.Module = torch.ao.quantization.prepare_qat(net)
    return prepared


@pytest.mark.filterwarnings("ignore:.*quantization", "ignore:.*reduce_range")
def test_quantisation_aware_training_of_observers_that_have_been_called() -> None:
    plain = _quantised()
    image = torch.randn(2, 3, 29, 37, generator=torch.Generator().manual_seed(0))
    with pytest.raises(UnsupportedModel, match="call the module itself on a small image once"):
        StreamingModel(copy.deepcopy(plain), tile=16)(image)
    plain(image[..., :9, :9])
    streamed = copy.deepcopy(plain)
    for model in (plain, StreamingModel(streamed, tile=16)):
        model(image).square().sum().backward()
    for (name, expected), found in zip(plain.named_parameters(), streamed.parameters(), strict=True):
        torch.testing.assert_close(found.grad, expected.grad, rtol=1e-4, atol=1e-5, msg=name)
    for (name, expected), found in zip(plain.named_buffers(), streamed.buffers(), strict=True):
        torch.testing.assert_close(found, expected, msg=name)


def _observed(observer: Any, **options: Any) -> nn.Sequential:
    torch.manual_seed(0)
    fake = torch.ao.quantization.FakeQuantize(observer, **options)
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.SiLU(), fake, nn.Conv2d(4, 2, 3), nn.SiLU())
    return net


_PER_CHANNEL = {"ch_axis": 1, "dtype": torch.quint8, "qscheme": torch.per_channel_affine}


@pytest.mark.filterwarnings("ignore:.*quantization", "ignore:.*reduce_range")
@pytest.mark.parametrize("is_first", [True, False])
@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("MinMaxObserver", {}),
        ("MovingAverageMinMaxObserver", {"qscheme": torch.per_tensor_symmetric, "dtype": torch.qint8}),
        ("PerChannelMinMaxObserver", _PER_CHANNEL),
        ("MovingAveragePerChannelMinMaxObserver", _PER_CHANNEL),
    ],
)
def test_observers_of_the_minimum_and_maximum(name: str, options: dict[str, Any], is_first: bool) -> None:
    """The first of three images has the largest range: what an observer keeps is another thing for each."""
    quantised = {"quant_min": -128, "quant_max": 127} if options.get("dtype") == torch.qint8 else {}
    plain = _observed(getattr(torch.ao.quantization, name), **options, **quantised)
    generator = torch.Generator().manual_seed(1)
    images = [scale * torch.randn(2, 3, 29, 37, generator=generator) for scale in (2, 1, 0.5)]
    if is_first and "PerChannel" in name:
        with pytest.raises(UnsupportedModel, match="call the module itself on a small image once"):
            StreamingModel(plain)(images[0])
        return
    if not is_first:
        plain(images[0][..., :9, :9])
    streamed = copy.deepcopy(plain)
    model = StreamingModel(streamed, tile=16)
    model.resident_tail = False
    for image in images:
        for net in (plain, model):
            net(image).square().sum().backward()
        for (key, expected), found in zip(plain.named_buffers(), streamed.buffers(), strict=True):
            torch.testing.assert_close(found, expected, msg=key)
    for (key, weight), found in zip(plain.named_parameters(), streamed.parameters(), strict=True):
        torch.testing.assert_close(found.grad, weight.grad, rtol=1e-4, atol=1e-4, msg=key)
    assert sum(phase.num_tiles for phase in model.plan((2, 3, 29, 37)).phases) > 2


@pytest.mark.filterwarnings("ignore:.*quantization", "ignore:.*reduce_range")
def test_an_observer_that_decides_by_values_is_refused_by_name() -> None:
    net = _observed(torch.ao.quantization.HistogramObserver)
    with pytest.raises(UnsupportedModel, match=r"'2\.activation_post_process' \(HistogramObserver\) decides"):
        StreamingModel(net, tile=16)(torch.randn(2, 3, 29, 37))
