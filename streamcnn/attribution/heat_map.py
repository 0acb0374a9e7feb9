"""Heat maps: an attribution as one number for each position, and as colours."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from streamcnn.support.extras import require

_BRIGHT_SHARE = 0.995
"""Quantile of the absolute values that gets the strongest colour."""
_MOST_SAMPLED = 2**22
"""Largest number of positions from which the quantile is computed, evenly spread."""
SEQUENTIAL, DIVERGING = "turbo", "bwr"
"""Default colour maps of matplotlib, for non-negative and for signed values."""


@dataclass(frozen=True, slots=True)
class HeatMap:
    """The sum of an attribution's channels, which covers an image."""

    values: Tensor
    """(h, w), in float32 on the CPU."""
    image_size: tuple[int, int]
    """(H, W) in pixels of the image that the map covers exactly."""
    is_signed: bool
    """Whether negative values have a meaning."""

    @property
    def pixel(self) -> tuple[float, float]:
        """Height and width of one position, in pixels of the image."""
        height, width = self.values.shape
        return self.image_size[0] / height, self.image_size[1] / width

    def halvings(self) -> list[Tensor]:
        """The values, then repeated 2 x 2 means of these, down to one value."""
        found = [self.values]
        while max(found[-1].shape) > 1:
            found.append(F.avg_pool2d(found[-1][None], 2, ceil_mode=True)[0])
        return found


def heat_map(attribution: Tensor, image_size: tuple[int, int], *, is_signed: bool) -> HeatMap:
    """The heat map of one image's attribution (1, C, h, w)."""
    return HeatMap(attribution[0].detach().sum(0).float().cpu(), image_size, is_signed)


def strongest(values: Tensor) -> float:
    """The absolute value that gets the strongest colour; 1 if all values are zero."""
    flat = values.flatten()
    sampled = flat[:: -(-len(flat) // _MOST_SAMPLED)].abs().numpy()
    return float(np.quantile(sampled, _BRIGHT_SHARE)) or float(sampled.max()) or 1.0


def coloured(values: Tensor, limit: float, table: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Values (h, w) as RGBA colours (h, w, 4), where zero is transparent and ``limit`` opaque.

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

    A signed map has 255 colours, of which the middle one is zero; an unsigned one has 256, the first zero.

    Raises
    ------
    MissingExtra
        If matplotlib is not installed.
    ValueError
        If matplotlib has no such map.
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
