"""Tensors outside of the module, in code that is captured without values: read, and written to once."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from helpers import TOLERANCE, all_in_tiles
from torch import Tensor, nn

from streamcnn import UnsupportedModel
from streamcnn.verification import relative_errors

Change = Callable[["Outside", Tensor], Tensor]


class Outside:
    """What neither parameters nor attributes hold."""

    def __init__(self) -> None:
        self.scale = torch.arange(1.0, 5.0, dtype=torch.float64)
        self.order = torch.tensor([2, 0, 3, 1])
        self.table = np.arange(4.0)


class Net(nn.Module):
    """A convolution, a change of what is outside, and what that makes of the map."""

    def __init__(self, change: Change) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.change = change
        self.outside = Outside()

    def forward(self, x: Tensor) -> Tensor:
        time.perf_counter()  # Dynamo does not follow it.
        x = self.conv(x)
        return self.change(self.outside, x)


def _by_channel(x: Tensor, scale: Tensor) -> Tensor:
    return x * scale[:, None, None]


def _averaged(outside: Outside, x: Tensor) -> Tensor:
    outside.scale.mul_(0.9)
    outside.scale.add_(x.detach().mean((0, 2, 3)), alpha=0.1)
    return _by_channel(x, outside.scale)


def _assigned(outside: Outside, x: Tensor) -> Tensor:
    outside.scale[0] = 7.0
    outside.scale[1:3] = x.detach().mean((0, 2, 3))[:2]
    return _by_channel(x, outside.scale)


def _by_view(outside: Outside, x: Tensor) -> Tensor:
    outside.scale.view(2, 2).add_(1.0)
    return _by_channel(x, outside.scale)


def _by_data(outside: Outside, x: Tensor) -> Tensor:
    outside.scale.data.mul_(0.5)
    return _by_channel(x, outside.scale)


def _by_out(outside: Outside, x: Tensor) -> Tensor:
    torch.mul(outside.scale, 0.5, out=outside.scale)
    return _by_channel(x, outside.scale)


def _by_numpy(outside: Outside, x: Tensor) -> Tensor:
    scale = torch.from_numpy(outside.table)
    scale += 1.0
    return _by_channel(x, scale)


class _Weighed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor) -> Tensor:
        ctx.save_for_backward(scale)
        return _by_channel(x, scale)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return _by_channel(gradients[0], *ctx.saved_tensors), None


def _given_to_a_function(outside: Outside, x: Tensor) -> Tensor:
    outside.scale.mul_(0.9)
    weighed: Tensor = _Weighed.apply(x, outside.scale)  # type: ignore[no-untyped-call]
    return weighed


def _read_by_numpy(outside: Outside, x: Tensor) -> Tensor:
    return x * float(outside.scale.numpy().sum())


def _read_as_list(outside: Outside, x: Tensor) -> Tensor:
    return x[:, outside.order.tolist()]


CHANGES: dict[str, Change] = {
    "averaged": _averaged,
    "assigned": _assigned,
    "through a view": _by_view,
    "through data": _by_data,
    "out=": _by_out,
    "in the memory of an array": _by_numpy,
    "given to a function": _given_to_a_function,
    "read by NumPy": _read_by_numpy,
    "read as a list": _read_as_list,
}


def _passes(model: nn.Module, net: Net) -> dict[str, dict[str, Tensor]]:
    found: dict[str, dict[str, Tensor]] = {}
    for number in range(3):
        generator = torch.Generator().manual_seed(number)
        image = torch.randn((2, 3, 29, 37), generator=generator, dtype=torch.float64, requires_grad=True)
        output = model(image)
        output.square().sum().backward()
        gradients: dict[str, Any] = {"image": image.grad, "weight": net.conv.weight.grad}
        found[f"pass {number} output"] = {"output": output.detach()}
        found[f"pass {number} gradients"] = gradients
        found[f"pass {number} outside"] = {
            "scale": net.outside.scale.clone(),
            "table": torch.tensor(net.outside.table),
        }
        net.zero_grad()
    return found


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES.keys())
def test_what_is_outside_is_read_and_changes_as_it_would(change: Change) -> None:
    plain, streamed = Net(change).double(), Net(change).double()
    streamed.load_state_dict(plain.state_dict())
    expected, found = _passes(plain, plain), _passes(all_in_tiles(streamed), streamed)
    errors, _ = relative_errors(expected, found)
    assert max(errors.values()) < TOLERANCE, errors


def test_a_value_that_the_pass_has_changed_is_not_read() -> None:
    def change(outside: Outside, x: Tensor) -> Tensor:
        outside.scale.add_(x.detach().mean((0, 2, 3)))
        return x * outside.scale.sum().item()

    net = Net(change).double()
    with pytest.raises(UnsupportedModel, match="reads a value of a tensor"):
        all_in_tiles(net)(torch.rand(1, 3, 29, 37, dtype=torch.float64))
    assert net.outside.scale.tolist() == [1.0, 2.0, 3.0, 4.0]


def test_two_arrays_in_one_memory_are_refused_where_one_changes() -> None:
    def change(outside: Outside, x: Tensor) -> Tensor:
        first = torch.from_numpy(outside.table)
        second = torch.from_numpy(outside.table)
        first.add_(1.0)
        return _by_channel(x, second)

    with pytest.raises(UnsupportedModel, match=r"a tensor from outside of the module .* shares memory with"):
        all_in_tiles(Net(change).double())(torch.rand(1, 3, 29, 37, dtype=torch.float64))
