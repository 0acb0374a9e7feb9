"""A small net of every kind of layer, streamed and plain, and the comparison of the two."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from streamcnn import StreamingModel

SHAPE = (2, 3, 37, 45)
TILE = 16
TOLERANCE = 1e-9


class Gate(nn.Module):
    """Squeeze-excite: a reduction in the middle of the network."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.fc = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(self.fc(x.mean((2, 3), keepdim=True)))


def make_net(seed: int = 0) -> nn.Sequential:
    """A train-mode float64 classifier with every kind of phase and a bias that has a gradient."""
    torch.manual_seed(seed)
    net = nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1),
        nn.BatchNorm2d(4),
        nn.ReLU(inplace=True),
        nn.MaxPool2d(2),
        nn.Conv2d(4, 5, 3),
        Gate(5),
        nn.SiLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(5, 3),
    )
    return net.double()


def make_image(seed: int = 0, shape: tuple[int, ...] = SHAPE) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def streamed_and_plain(**options: Any) -> tuple[StreamingModel, nn.Module]:
    """A streamed net without a resident tail, all of it in tiles, and its plain twin."""
    net = make_net()
    plain = copy.deepcopy(net)
    model = StreamingModel(net, tile=TILE, **options)
    model.resident_tail = False
    return model, plain


def loss_of(output: Tensor, seed: int = 0) -> Tensor:
    return (output * make_image(seed, tuple(output.shape))).sum()


def error_of(value: Tensor | None, reference: Tensor | None, largest: float = 0.0) -> float:
    """Relative distance; a gradient of less than 1e-6 of the largest counts as noise."""
    assert value is not None
    assert reference is not None
    assert value.shape == reference.shape
    reference = reference.detach().double()
    floor = max(float(reference.norm()), 1e-6 * largest, 1e-300)
    return float((value.detach().double() - reference).norm()) / floor


def assert_same_gradients(streamed: nn.Module, plain: nn.Module, tolerance: float = TOLERANCE) -> None:
    expected = {name: p.grad for name, p in plain.named_parameters()}
    found = {name: p.grad for name, p in streamed.named_parameters()}
    assert found.keys() == expected.keys()
    assert any(grad is not None for grad in expected.values())
    largest = max(float(grad.norm()) for grad in expected.values() if grad is not None)
    for name, grad in expected.items():
        if grad is None:
            assert found[name] is None, name
        else:
            assert error_of(found[name], grad, largest) <= tolerance, name


def assert_same_states(streamed: nn.Module, plain: nn.Module, tolerance: float = TOLERANCE) -> None:
    found, expected = streamed.state_dict(), plain.state_dict()
    assert list(found) == list(expected)
    for name, value in expected.items():
        assert error_of(found[name], value) <= tolerance, name


def assert_identical(first: dict[str, Tensor], second: dict[str, Tensor]) -> None:
    assert first.keys() == second.keys()
    for name, value in first.items():
        assert torch.equal(value, second[name]), name


def everything(model: nn.Module, image: Any) -> dict[str, Tensor]:
    """The output and all gradients of one pass."""
    model.zero_grad()
    output = model(image)
    loss_of(output).backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    assert gradients
    return {"output": output.detach(), **gradients}
