"""Normalisation of pixels to the floats that a model takes."""

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
    """Pixels of any dtype as float32, minus ``mean``, divided by ``std``.

    Integers are first divided by their largest possible value: the image's, if it uses fewer bits than its
    dtype has, else the dtype's. Bool counts as 0 and 1. The defaults map bytes to -1 to 1, as in the
    UltraMNIST paper.

    Raises
    ------
    ValueError
        If ``mean`` is not finite, ``std`` is not finite and positive, or the divisor is unknown.
    """

    mean: float = 0.5
    std: float = 0.5
    divisor: str = "range"
    """``"type"`` divides by the dtype's largest value, whatever images say, as older runs did."""

    def __post_init__(self) -> None:
        if not math.isfinite(self.mean):
            raise ValueError(f"mean={self.mean}: allowed are finite numbers")
        if not 0 < self.std < math.inf:
            raise ValueError(f"std={self.std}: allowed are positive numbers")
        if self.divisor not in DIVISORS:
            raise ValueError(f"divisor={self.divisor!r}: allowed are {' and '.join(DIVISORS)}")

    def __call__(self, tile: Tensor, *, largest: int | None = None) -> Tensor:
        """Normalise a tile; ``largest`` is a pixel's largest possible value, None for that of its dtype.

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
        # In place on a copy, as two more tiles would otherwise be held at a time.
        pixels = tile.to(torch.float32, copy=True)
        scale = self._scale(tile.dtype, largest)
        return pixels.sub_(self.mean * scale).div_(self.std * scale)

    def for_pixels_up_to(self, largest: int | None) -> Callable[[Tensor], Tensor]:
        """The normalisation for images whose pixels are at most ``largest``."""
        return functools.partial(self, largest=largest)

    def _scale(self, dtype: torch.dtype, largest: int | None) -> float:
        if dtype.is_floating_point or dtype == torch.bool:
            return 1.0
        if largest is None or self.divisor == "type":
            return float(torch.iinfo(dtype).max)
        return float(largest)
