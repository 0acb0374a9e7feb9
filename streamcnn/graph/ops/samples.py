"""Building blocks of test modules for families of operators; see :class:`.rules.Sample`."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class _Chain(nn.Module):
    """Layers in a row, then something whose gradient differs at every position."""

    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.layers = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.layers(x)
        return (y * torch.tanh(y)).mean((2, 3))


def chain(*layers: nn.Module) -> nn.Module:
    """A test module: ``layers`` in a row and a curved spatial mean."""
    return _Chain(*layers)
