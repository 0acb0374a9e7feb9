"""Scripted modules and functions inside a model: gradients pass through them, whatever has run before."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

import pytest
import torch
from failure_cases import assert_unchanged, everything_of
from helpers import TOLERANCE, all_in_tiles
from torch import Tensor, nn

from streamcnn import UnsupportedModel
from streamcnn.verification import relative_errors

# PyTorch's own: TorchScript is on its way out.
pytestmark = [
    pytest.mark.filterwarnings(f"ignore:.torch.jit.* is deprecated:{kind}")
    for kind in ("DeprecationWarning", "FutureWarning")
]

SHAPE = (2, 3, 29, 37)


class Gate(nn.Module):
    """Enough operators in a row for TorchScript to give them a gradient of their own."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 3, padding=1)

    def forward(self, x: Tensor, scale: float = 2.0) -> Tensor:
        gate = torch.sigmoid(self.conv(x))
        return (torch.tanh(x) * gate + x * scale) * torch.relu(gate)


class Counts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.n = 0

    def forward(self, x: Tensor) -> Tensor:
        self.n += 1
        return torch.tanh(torch.sigmoid(x) * float(self.n))


class Forks(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(4, 4, 3)
        self.second = nn.Conv2d(4, 4, 3)

    def forward(self, x: Tensor) -> Tensor:
        waiting = torch.jit.fork(self.first, x)
        return torch.jit.wait(waiting) * torch.sigmoid(self.second(x))


class Reassigns(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("average", torch.zeros(4))

    def forward(self, x: Tensor) -> Tensor:
        self.average = self.average * 0.9 + x.detach().mean((0, 2, 3))
        return torch.tanh(x) - self.average[:, None, None]


class Branches(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(x) if bool(x.mean() > 0) else x


class WithoutGradient(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            gate = torch.sigmoid(x)
        return gate * x


class Net(nn.Module):
    """A convolution, the script, and a head."""

    def __init__(self, script: Any) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.script = script
        self.head = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.script(self.conv(x)).mean((2, 3)))


class WithKeyword(Net):
    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.script(self.conv(x), scale=0.5).mean((2, 3)))


def _swish(x: Tensor) -> Tensor:
    return torch.tanh(x * torch.sigmoid(x)) * x


class Function(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.function: Final = torch.jit.script(_swish)

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


def _scripted(module: nn.Module) -> Any:
    return torch.jit.script(module)


NETS: dict[str, Callable[[], nn.Module]] = {
    "module": lambda: Net(_scripted(Gate())),
    "a keyword and a default": lambda: WithKeyword(_scripted(Gate())),
    "batch norm": lambda: Net(_scripted(nn.Sequential(nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4), nn.SiLU()))),
    "traced": lambda: Net(torch.jit.trace(Gate().double(), torch.rand(1, 4, 9, 9, dtype=torch.float64))),
    "function": lambda: Net(Function()),
    "counter": lambda: Net(_scripted(Counts())),
    "fork": lambda: Net(_scripted(Forks())),
    "the whole net": lambda: _scripted(nn.Sequential(nn.Conv2d(3, 4, 3), nn.Sigmoid(), nn.Tanh(), nn.ReLU())),
}


def _image(shape: tuple[int, ...]) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(shape[2]), dtype=torch.float64)


def _passes(model: nn.Module, states: nn.Module) -> dict[str, dict[str, Tensor]]:
    """Outputs, gradients and buffers of five passes: TorchScript compiles what has run twice."""
    found: dict[str, dict[str, Tensor]] = {}
    for number in range(5):
        image = _image((2, 3, 29 + number % 2, 37)).requires_grad_()
        output = model(image)
        output.square().sum().backward()
        gradients = {name: each.grad for name, each in (*states.named_parameters(), ("image", image))}
        found[f"pass {number} output"] = {"output": output.detach()}
        found[f"pass {number} gradients"] = {n: g for n, g in gradients.items() if g is not None}
        found[f"pass {number} buffers"] = {name: b.clone() for name, b in states.named_buffers()}
        states.zero_grad()
    return found


@pytest.mark.parametrize("make", NETS.values(), ids=NETS.keys())
def test_gradients_pass_through_scripts_at_each_pass(make: Callable[[], nn.Module]) -> None:
    plain, streamed = make().double(), make().double()
    streamed.load_state_dict(plain.state_dict())
    expected = _passes(plain, plain)
    found = _passes(all_in_tiles(streamed), streamed)
    assert {name: set(group) for name, group in found.items()} == {n: set(g) for n, g in expected.items()}
    errors, _ = relative_errors(expected, found)
    assert max(errors.values()) < TOLERANCE, errors


def test_scripts_are_as_they_were_after_a_capture() -> None:
    calls = [vars(kind)["__call__"] for kind in (torch._C.ScriptMethod, torch._C.ScriptFunction)]
    all_in_tiles(Net(_scripted(Gate())).double())(_image(SHAPE))
    assert [vars(kind)["__call__"] for kind in (torch._C.ScriptMethod, torch._C.ScriptFunction)] == calls
    assert torch._C._get_graph_executor_optimize()


def test_a_script_that_assigns_a_tensor_is_refused_and_keeps_what_it_had() -> None:
    net = Net(_scripted(nn.Sequential(Counts(), Reassigns()))).double()
    model = all_in_tiles(net)
    before = everything_of(model)
    with pytest.raises(UnsupportedModel, match=r"script of 'script\.1' .* attribute 'average': overwrite"):
        model(_image(SHAPE))
    assert_unchanged(before, everything_of(model))
    assert net.script[0].n == 0


def test_a_script_that_branches_on_values_is_refused_with_its_line() -> None:
    model = all_in_tiles(Net(_scripted(Branches())).double())
    with pytest.raises(UnsupportedModel, match=r"a script in 'return torch\.tanh.*it reads a value of"):
        model(_image(SHAPE))


def test_a_script_that_switches_gradients_off_is_refused() -> None:
    model = all_in_tiles(Net(_scripted(WithoutGradient())).double())
    with pytest.raises(UnsupportedModel, match=r"a script of the model uses no_grad, .* use it outside"):
        model(_image(SHAPE))
