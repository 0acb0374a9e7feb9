"""A small net whose update can be made to fail midway, and the state that such an update must not change."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from streamcnn import (
    StreamingModel,
)

SHAPE = (2, 3, 37, 45)


def make_net() -> nn.Sequential:
    """Two convolutions and a batch norm in float64. Dropout draws random numbers before the first tile."""
    torch.manual_seed(0)
    layers = [
        nn.Conv2d(3, 4, 3, padding=1),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.Dropout2d(0.5),
        nn.Conv2d(4, 5, 3, stride=2),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(5, 3),
    ]
    return nn.Sequential(*layers).double()


def make_image() -> Tensor:
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def make_model(spill: Path | None = None, **options: Any) -> StreamingModel:
    model = StreamingModel(make_net(), tile=16, spill=spill, **options)
    model.resident_tail = False
    return model


def everything_of(model: nn.Module) -> dict[str, Any]:
    """A copy of all that a failed pass must not change."""
    gradients = {f"gradient of {name}": p.grad for name, p in model.named_parameters()}
    found = {**model.state_dict(), **gradients, "random state": torch.get_rng_state()}
    return {name: None if value is None else value.detach().clone() for name, value in found.items()}


def assert_unchanged(before: dict[str, Any], after: dict[str, Any]) -> None:
    assert before.keys() == after.keys()
    for name, value in before.items():
        if value is None:
            assert after[name] is None, name
        else:
            assert torch.equal(value, after[name]), name
