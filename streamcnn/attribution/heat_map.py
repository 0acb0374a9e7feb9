"""An attribution as one number for each position, and as colours."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from streamcnn.support.extras import require

_BRIGHT_SHARE = 0.995
"""Share of the positions whose absolute value is at most that of the strongest colour."""
_MOST_SAMPLED = 2**22
"""Positions that this is told by, evenly spread."""
SEQUENTIAL, DIVERGING = "turbo", "bwr"
"""Colour maps of matplotlib, for values from 0 on and for both signs."""


@dataclass(frozen=True, slots=True)
class HeatMap:
    """What lies over an image: an attribution's channels summed."""

    values: Tensor
    """(h, w), in float32 on the CPU."""
    image_size: tuple[int, int]
    """(H, W) in pixels of the image that it covers exactly."""
    is_signed: bool
    """Whether values below zero have a meaning."""

    @property
    def pixel(self) -> tuple[float, float]:
        """Height and width of a position in pixels of the image."""
        height, width = self.values.shape
        return self.image_size[0] / height, self.image_size[1] / width

    def halvings(self) -> list[Tensor]:
        """The values, then means of 2x2 of the ones before, down to one."""
        found = [self.values]
        while max(found[-1].shape) > 1:
            found.append(F.avg_pool2d(found[-1][None], 2, ceil_mode=True)[0])
        return found


def heat_map(attribution: Tensor, image_size: tuple[int, int], *, is_signed: bool) -> HeatMap:
    """The map of one image's attribution (1, C, h, w)."""
    return HeatMap(attribution[0].detach().sum(0).float().cpu(), image_size, is_signed)


def strongest(values: Tensor) -> float:
    """The absolute value that gets the strongest colour; 1 if all are zero."""
    flat = values.flatten()
    sampled = flat[:: -(-len(flat) // _MOST_SAMPLED)].abs().numpy()
    return float(np.quantile(sampled, _BRIGHT_SHARE)) or float(sampled.max()) or 1.0


def coloured(values: Tensor, limit: float, table: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Values (h, w) as red, green, blue and opacity (h, w, 4): zero is transparent, ``limit`` opaque.

    Parameters
    ----------
    table
        See :func:`colour_table`.
    """
    share = (values / limit).clamp_(-1, 1).numpy()
    is_diverging = len(table) % 2 == 1
    middle = len(table) // 2
    at = middle + share * middle if is_diverging else share.clip(0) * (len(table) - 1)
    pixels: NDArray[np.uint8] = table[at.round().astype(np.intp)]
    return pixels


def colour_table(name: str | None, *, is_signed: bool) -> NDArray[np.uint8]:
    """The colours (n, 4) of matplotlib's map ``name``, more opaque the further they are from zero.

    Of 255 colours the middle one is zero; of 256 the first.

    Raises
    ------
    MissingExtra
        If matplotlib is not installed.
    ValueError
        If it has no such map.
    """
    maps: Any = require("matplotlib", extra="plots").colormaps
    name = name or (DIVERGING if is_signed else SEQUENTIAL)
    if name not in maps:
        raise ValueError(f"matplotlib has no colour map {name!r}: allowed are such as turbo, inferno, bwr")
    positions = np.linspace(0, 1, 255 if is_signed else 256)
    opacity = np.abs(2 * positions - 1) if is_signed else positions
    table = np.array(maps[name](positions))
    table[:, 3] = opacity
    return (table * 255).round().astype(np.uint8)
