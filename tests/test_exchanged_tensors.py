"""Parameters and buffers that forward puts in each other's places, in code with guards and without."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers import TOLERANCE, all_in_tiles
from torch import Tensor, nn

from streamcnn import UnsupportedModel
from streamcnn.verification import relative_errors

pytestmark = [
    pytest.mark.filterwarnings(f"ignore:.torch.jit.* is deprecated:{kind}")
    for kind in ("DeprecationWarning", "FutureWarning")
]


class Net(nn.Module):
    def __init__(self, change: Callable[[Any, Tensor], None], *, is_guarded: bool) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.first = nn.Conv2d(4, 4, 1, bias=False)
        self.second = nn.Conv2d(4, 4, 1, bias=False)
        self.register_buffer("old", torch.ones(4))
        self.register_buffer("new", torch.full((4,), 2.0))
        self.old: Tensor | None
        self.new: Tensor
        self.change = change
        self.is_guarded = is_guarded

    def forward(self, x: Tensor) -> Tensor:
        if not self.is_guarded:
            time.perf_counter()  # Dynamo does not follow it.
        x = self.conv(x)
        self.change(self, x)
        old = 0.0 if self.old is None else self.old[:, None, None]
        return self.second(self.first(x) * self.new[:, None, None] + old)


def _swapped(net: Any, x: Tensor) -> None:
    net.old, net.new = net.new, net.old


def _two_deep(net: Any, x: Tensor) -> None:
    net.old = net.new
    net.new = x.detach().mean((0, 2, 3))


def _dropped(net: Any, x: Tensor) -> None:
    net.old = None


def _tied(net: Any, x: Tensor) -> None:
    net.second.weight = net.first.weight


def _passes(model: nn.Module, net: Net) -> dict[str, dict[str, Tensor]]:
    found: dict[str, dict[str, Tensor]] = {}
    for number in range(3):
        generator = torch.Generator().manual_seed(number)
        image = torch.randn((2, 3, 29, 37), generator=generator, dtype=torch.float64)
        output = model(image)
        output.square().sum().backward()
        found[f"pass {number}"] = {
            "output": output.detach(),
            **{f"gradient of {name}": p.grad for name, p in net.named_parameters() if p.grad is not None},
            **{name: buffer.clone() for name, buffer in net.named_buffers()},
        }
        net.zero_grad()
    return found


@pytest.mark.parametrize("change", [_swapped, _two_deep, _dropped, _tied])
@pytest.mark.parametrize("is_guarded", [True, False])
def test_what_is_exchanged_stays_so(change: Callable[[Any, Tensor], None], is_guarded: bool) -> None:
    streamed = Net(change, is_guarded=is_guarded).double()
    plain = copy.deepcopy(streamed)
    expected, found = _passes(plain, plain), _passes(all_in_tiles(streamed), streamed)
    assert [group.keys() for group in found.values()] == [group.keys() for group in expected.values()]
    errors, _ = relative_errors(expected, found)
    assert max(errors.values()) < TOLERANCE, errors


class Swaps(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("old", torch.ones(4))
        self.register_buffer("new", torch.full((4,), 2.0))

    def forward(self, x: Tensor) -> Tensor:
        old = self.old
        self.old = self.new
        self.new = old
        return x * self.old[:, None, None]


def test_a_script_that_exchanges_its_buffers_is_refused() -> None:
    script: Any = torch.jit.script(Swaps())
    model = all_in_tiles(nn.Sequential(nn.Conv2d(3, 4, 3), script).double())
    with pytest.raises(UnsupportedModel, match="assigns a tensor to its attribute"):
        model(torch.rand(1, 3, 29, 37, dtype=torch.float64))
    assert script.old.tolist() == [1.0] * 4
