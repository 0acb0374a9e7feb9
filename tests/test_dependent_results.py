"""Results that depend on each other, of passes that change what they train."""

from __future__ import annotations

import copy

import pytest
import torch
from helpers import all_in_tiles
from streaming_cases import TOLERANCE, make_image
from torch import Tensor, nn

WIDTH = 4
SHAPE = (2, 3, 37, 45)


class _Initialising(nn.Module):
    """Sets a parameter at its first pass, as flows do, and returns features beside what depends on them."""

    def __init__(self, *, late: bool) -> None:
        super().__init__()
        self.late = late
        self.conv = nn.Conv2d(3, WIDTH, 3)
        self.last = nn.Conv2d(WIDTH, 2, 3)
        self.shift = nn.Parameter(torch.zeros(1, WIDTH, 1, 1))
        self.register_buffer("initialised", torch.tensor(0))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = self.conv(x)
        features = x.sin() if self.late else self._shifted(x)
        x = self._shifted(features)
        return self.last(x * self.shift.exp()), features

    def _shifted(self, x: Tensor) -> Tensor:
        if self.initialised.item() == 0:
            self.shift.data.copy_(-x.detach().mean((0, 2, 3), keepdim=True))
            self.initialised.fill_(1)
        return (x + self.shift).tanh()


def _passes(model: nn.Module, net: _Initialising) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for index in range(2):
        image = make_image(index, SHAPE).requires_grad_()
        logits, features = model(image)
        (inner,) = torch.autograd.grad(logits.square().sum(), features, retain_graph=True)
        (logits.sin().sum() + features.cos().sum()).backward()
        tensors = {"logits": logits, "features": features, "inner": inner, "image": image.grad}
        found |= {f"{name} {index}": value.detach().clone() for name, value in tensors.items()}
        found |= {f"{name} {index}": value.grad.clone() for name, value in net.named_parameters()}
        found |= {f"state {name} {index}": value.double() for name, value in net.state_dict().items()}
    return found


@pytest.mark.parametrize("late", [False, True])
def test_a_parameter_may_be_set_at_the_first_pass(late: bool) -> None:
    torch.manual_seed(0)
    net = _Initialising(late=late).double()
    plain = copy.deepcopy(net)
    expected, found = _passes(plain, plain), _passes(all_in_tiles(net), net)
    errors = {
        name: float((found[name] - value).norm() / value.norm().clamp_min(1e-12))
        for name, value in expected.items()
    }
    assert max(errors.values()) < TOLERANCE, errors


class _Reconstructing(nn.Module):
    """Returns its image beside what it makes of it, as autoencoders do."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 3, padding=1)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {"image": x, "made": self.conv(x), "view": x[:]}


@pytest.mark.parametrize("trains", [True, False])
def test_a_returned_image_is_the_callers_own(trains: bool) -> None:
    net = _Reconstructing().double()
    image = make_image(0, SHAPE).requires_grad_()
    with torch.set_grad_enabled(trains):
        results = all_in_tiles(net)(image)
    assert results["image"] is image
    assert results["view"] is not image
    if trains:
        (found,) = torch.autograd.grad(results["made"].square().sum(), results["image"])
        (expected,) = torch.autograd.grad(net(image)["made"].square().sum(), image)
        torch.testing.assert_close(found, expected, rtol=TOLERANCE, atol=TOLERANCE)
