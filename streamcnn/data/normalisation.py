"""Pixels as the floats that a model takes."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Normalise:
    """Pixels of any type as float32, from which ``mean`` is taken and which are divided by ``std``.

    Integers are first divided by the largest number of their type; bool is 0 and 1. The defaults take bytes
    to -1 to 1, as in the UltraMNIST paper.

    Raises
    ------
    ValueError
        If ``std`` is not positive.
    """

    mean: float = 0.5
    std: float = 0.5

    def __post_init__(self) -> None:
        if not self.std > 0:
            raise ValueError(f"std={self.std}: allowed are positive numbers")

    def __call__(self, tile: Tensor) -> Tensor:
        """A tile of the same shape."""
        is_scaled = not tile.is_floating_point() and tile.dtype != torch.bool
        scale = float(torch.iinfo(tile.dtype).max) if is_scaled else 1.0
        # In place on a copy: two more tiles would be held at a time.
        pixels = tile.to(torch.float32, copy=True)
        return pixels.sub_(self.mean * scale).div_(self.std * scale)
