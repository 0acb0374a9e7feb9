"""Models in bfloat16 and float16: as exact as plain PyTorch in the same type, though cut into tiles."""

from __future__ import annotations

import copy
import operator
from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers import all_in_tiles, randomized, traced
from operator_counts import count_operators
from torch import Tensor, nn

from streamcnn import StreamingModel
from streamcnn.graph.costs import casts_of

SHAPE = (3, 3, 33, 29)
TILE = (11, 10)
WIDTH = 6
ALLOWED = 2.0
"""Error of a streamed pass over that of plain PyTorch in the same type."""
LOW = [torch.bfloat16, torch.float16]


class Standardized(nn.Module):
    """A map less its mean over its deviation."""

    def forward(self, x: Tensor) -> Tensor:
        return (x - x.mean((2, 3), keepdim=True)) / (x.std((2, 3), keepdim=True) + 0.5)


NORMS: dict[str, Callable[[], nn.Module]] = {
    "batch": lambda: nn.BatchNorm2d(WIDTH),
    "batch, cumulative": lambda: nn.BatchNorm2d(WIDTH, momentum=None),
    "batch, no running statistics": lambda: nn.BatchNorm2d(WIDTH, track_running_stats=False),
    "batch, not affine": lambda: nn.BatchNorm2d(WIDTH, affine=False),
    "instance": lambda: nn.InstanceNorm2d(WIDTH),
    "instance, running statistics": lambda: nn.InstanceNorm2d(WIDTH, affine=True, track_running_stats=True),
    "group": lambda: nn.GroupNorm(2, WIDTH),
    "group, not affine": lambda: nn.GroupNorm(3, WIDTH, affine=False),
    "layer, over the image": lambda: nn.LayerNorm((WIDTH, 31, 27)),
    "layer, over the image, not affine": lambda: nn.LayerNorm((WIDTH, 31, 27), elementwise_affine=False),
    "by hand": Standardized,
}


def _network(norm: nn.Module) -> nn.Module:
    return randomized(
        nn.Sequential(
            nn.Conv2d(3, WIDTH, 3, bias=False), norm, nn.SiLU(), nn.Conv2d(WIDTH, 4, 3, stride=2), nn.Tanh()
        )
    )


def _pass(model: nn.Module, image: Tensor, casts: torch.dtype | None = None) -> dict[str, Tensor]:
    """Output, gradients and buffers in float64."""
    image = image.clone().requires_grad_()
    with torch.autocast("cpu", casts, enabled=casts is not None):
        output = model(image)
    weights = torch.linspace(-1, 1, output.numel()).sin().reshape(output.shape)
    output.backward(weights.to(output.dtype))
    found = {"output": output.detach(), "image": image.grad}
    found |= {name: parameter.grad for name, parameter in model.named_parameters()}
    found |= {name: buffer for name, buffer in model.named_buffers() if buffer.is_floating_point()}
    return {name.removeprefix("module."): value.double() for name, value in found.items()}


def _errors(found: dict[str, Tensor], true: dict[str, Tensor]) -> dict[str, float]:
    return {name: float((found[name] - value).norm() / value.norm()) for name, value in true.items()}


def assert_as_exact_as_plain(
    net: nn.Module, dtype: torch.dtype, *, casts: torch.dtype | None = None, allowed: float = ALLOWED
) -> None:
    """Raise if a streamed pass in ``dtype`` has errors beyond those of a plain pass in it."""
    image = torch.randn(SHAPE).to(dtype)
    low = copy.deepcopy(net).to(dtype)
    true = _pass(copy.deepcopy(low).double(), image.double())
    streamed = copy.deepcopy(low)
    model = StreamingModel(streamed, tile=TILE)
    model.resident_tail = False
    plain = _errors(_pass(low, image, casts), true)
    found = _pass(model, image, casts)
    assert max(phase.num_tiles for phase in model.plan(SHAPE, dtype).phases) > 1
    for name, error in _errors({key: found[key] for key in true}, true).items():
        # What both have exactly is compared with the rounding of the type itself.
        floor = torch.finfo(casts or dtype).eps / 4
        assert error <= allowed * max(plain[name], floor), f"{name}: {error}, plain {plain[name]}"
    for name, value in streamed.state_dict().items():
        assert value.dtype == low.state_dict()[name].dtype, name


@pytest.mark.parametrize("dtype", LOW, ids=str)
@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize("case", NORMS.values(), ids=NORMS.keys())
def test_norm(case: Callable[[], nn.Module], train: bool, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    assert_as_exact_as_plain(_network(case()).train(train), dtype)


@pytest.mark.parametrize("case", NORMS.values(), ids=NORMS.keys())
def test_norm_under_autocast(case: Callable[[], nn.Module]) -> None:
    torch.manual_seed(0)
    assert_as_exact_as_plain(_network(case()), torch.float32, casts=torch.bfloat16)


@pytest.mark.parametrize("dtype", LOW, ids=str)
def test_norm_kept_in_float32(dtype: torch.dtype) -> None:
    torch.manual_seed(0)

    class Mixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = _network(nn.BatchNorm2d(WIDTH))

        def to(self, dtype: torch.dtype) -> Mixed:  # type: ignore[override]
            super().to(dtype)
            if dtype != torch.float64:
                self.net[1].float()
            return self

        def forward(self, x: Tensor) -> Tensor:
            return self.net(x)

    assert_as_exact_as_plain(Mixed(), dtype)


class Shared(nn.Module):
    """A convolution that is applied twice, and one in a block without autocast."""

    def __init__(self) -> None:
        super().__init__()
        self.twice = nn.Conv2d(3, 3, 3, padding=1)
        self.once = nn.Conv2d(3, 4, 1)
        self.exact = nn.Conv2d(3, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.twice(torch.tanh(self.twice(x)))
        with torch.autocast("cpu", enabled=False):
            exact = self.exact(x.to(self.exact.weight.dtype))
        return self.once(x) + exact


@pytest.mark.parametrize("dtype", LOW, ids=str)
@pytest.mark.parametrize("value", [0.1, 3000.0])
def test_average_pooling_divides_sums_in_float32(value: float, dtype: torch.dtype) -> None:
    """A sum in half precision is rounded, or beyond float16."""
    image = torch.full((1, 2, 37, 45), value, dtype=dtype)
    for pool in (
        nn.AvgPool2d(7, 2, 3, count_include_pad=False),
        nn.AvgPool2d(5, 2, ceil_mode=True),
        nn.AdaptiveAvgPool2d((11, 10)),
    ):
        assert (all_in_tiles(pool)(image) == image[0, 0, 0, 0]).all()


def test_a_parameter_is_cast_once_a_phase() -> None:
    """Only where one operator reads it: gradients of several are added in float32."""

    def casts(tile: int) -> int:
        model = StreamingModel(_network(nn.BatchNorm2d(WIDTH)).eval(), tile=tile)
        image = torch.randn(1, 3, 33, 33)

        def call() -> None:
            with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
                model(image)

        call()
        return count_operators(call)["_to_copy"]

    # Beside the image's pixels, tile by tile: two weights and a bias.
    assert (casts(33), casts(11)) == (1 + 3, 9 + 3)


def test_gradients_of_a_shared_parameter_are_added_in_float32() -> None:
    torch.manual_seed(0)
    net = Shared()
    plain, image = copy.deepcopy(net).double(), torch.randn(1, 3, 24, 24)
    found = _pass(StreamingModel(net, tile=8), image, torch.bfloat16)
    true = _pass(plain, image.double())
    errors = _errors(found, true)
    assert max(errors.values()) < 0.02
    with torch.autocast("cpu"):
        program, _ = traced(Shared(), (1, 3, 24, 24))
    cast = casts_of(program, program.nodes)
    assert {program.states[name] for name in cast} == {"once.weight", "once.bias"}


CHANGES: dict[str, Callable[[Tensor, Tensor], Any]] = {
    "x += y": operator.iadd,
    "x /= y": operator.itruediv,
    "x.mul_(y)": Tensor.mul_,
    "x[:, :2] -= y": lambda x, y: x[:, :2].sub_(y),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES.keys())
def test_what_autocast_has_cast_stays_so_when_it_is_changed_in_place(
    change: Callable[[Tensor, Tensor], Any],
) -> None:
    class Changed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, WIDTH, 3)

        def forward(self, image: Tensor) -> Tensor:
            x = self.conv(image)
            change(x, image[:, :1, 1:-1, 1:-1].exp() + 1)
            return x

    torch.manual_seed(0)
    net, image = Changed(), torch.randn(SHAPE)
    with torch.autocast("cpu", torch.bfloat16):
        found, expected = StreamingModel(net, tile=TILE)(image), net(image)
    assert found.dtype == expected.dtype == torch.bfloat16
    torch.testing.assert_close(found, expected)
