"""A map of a few channels and an operator on it, for tests of operators."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from helpers import Shape, assert_streamed_equals_plain
from torch import Tensor, nn

SHAPE = (2, 3, 21, 17)
TILE = (8, 7)
WIDTH = 6
"""Channels of the map that most cases work on."""
Function = Callable[..., Any]


class Applied(nn.Module):
    """A module that applies a function to a map."""

    def __init__(self, function: Function) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Any:
        return self.function(x)


def after_convolution(operator: Function | nn.Module) -> nn.Module:
    """A convolution to ``WIDTH`` channels of the image's extents, then ``operator``."""
    module = operator if isinstance(operator, nn.Module) else Applied(operator)
    return nn.Sequential(nn.Conv2d(3, WIDTH, 3, padding=1), module)


def assert_streams(operator: Function | nn.Module, shape: Shape = SHAPE, **options: Any) -> None:
    """Raise unless ``operator`` streams exactly, in train mode."""
    assert_streamed_equals_plain(after_convolution(operator), shape, **{"tile": TILE, **options})


def by_name(cases: dict[str, Any]) -> pytest.MarkDecorator:
    """Parametrise over the values of ``cases``, whose keys name the tests."""
    return pytest.mark.parametrize("case", cases.values(), ids=cases.keys())
