"""Pixels as the floats that a model takes."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from streamcnn.errors import DatasetMismatch

DIVISORS = ("range", "type")


@dataclass(frozen=True, slots=True)
class Normalise:
    """Pixels of any type as float32, from which ``mean`` is taken and which are divided by ``std``.

    Integers are first divided by the largest number that they may be: as the image says, where it uses fewer
    bits than its type has, else that of the type. Bool is 0 and 1. The defaults take bytes to -1 to 1, as in
    the UltraMNIST paper.

    Raises
    ------
    ValueError
        If ``mean`` is not finite, ``std`` is not finite and positive, or there is no such divisor.
    """

    mean: float = 0.5
    std: float = 0.5
    divisor: str = "range"
    """``"type"`` divides by the largest number of the type, whatever images say, as runs from before did."""

    def __post_init__(self) -> None:
        if not math.isfinite(self.mean):
            raise ValueError(f"mean={self.mean}: allowed are finite numbers")
        if not 0 < self.std < math.inf:
            raise ValueError(f"std={self.std}: allowed are positive numbers")
        if self.divisor not in DIVISORS:
            raise ValueError(f"divisor={self.divisor!r}: allowed are {' and '.join(DIVISORS)}")

    def __call__(self, tile: Tensor, *, largest: int | None = None) -> Tensor:
        """A tile of the same shape; ``largest`` is what a pixel may be, None for what its type allows.

        Raises
        ------
        DatasetMismatch
            If pixels are complex numbers.
        """
        if tile.dtype.is_complex:
            kind = str(tile.dtype).removeprefix("torch.")
            raise DatasetMismatch(
                f"the image has pixels of type {kind}: allowed are integers, floats and bool; store "
                "magnitudes, or real and imaginary parts as channels"
            )
        # In place on a copy: two more tiles would be held at a time.
        pixels = tile.to(torch.float32, copy=True)
        scale = self._scale(tile.dtype, largest)
        return pixels.sub_(self.mean * scale).div_(self.std * scale)

    def for_pixels_up_to(self, largest: int | None) -> Callable[[Tensor], Tensor]:
        """The same for images whose pixels are at most ``largest``."""
        return functools.partial(self, largest=largest)

    def _scale(self, dtype: torch.dtype, largest: int | None) -> float:
        if dtype.is_floating_point or dtype == torch.bool:
            return 1.0
        if largest is None or self.divisor == "type":
            return float(torch.iinfo(dtype).max)
        return float(largest)
