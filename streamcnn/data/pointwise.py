"""Detection of functions of a tile that are not pointwise, whose results depend on the tiling.

``(tile - tile.mean()) / tile.std()`` is such a function, and so is one that draws random numbers. To detect
it, we apply it again to some pixels of a tile, in a small tile of their own, and compare.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

_SHAPE = (2, 4)
"""Rows and columns of the small tile."""
_ALLOWED = 2
"""Number of pixels that may differ: rounding that depends on a tile's shape may cross a threshold."""
_RELATIVE = 1e-4
"""Relative difference that counts as rounding, compared with the largest value among them."""
_GOLDEN = 0.618034
"""Multiples of the golden ratio modulo one are spread evenly, without a pattern."""


def some_pixels(tile: Tensor) -> Tensor:
    """A copy of pixels (N, C, 2, 4) from all over a tile (N, C, h, w)."""
    height, width = tile.shape[2:]
    num_pixels = _SHAPE[0] * _SHAPE[1]
    shares = [((place + 1) * _GOLDEN % 1, (place + 0.5) / num_pixels) for place in range(num_pixels)]
    picked = [tile[:, :, int(row * height), int(col * width)] for row, col in shares]
    pixels = torch.stack(picked, -1)
    return pixels.reshape(*pixels.shape[:2], *_SHAPE)


def looks_further(function: Callable[[Tensor], Tensor], pixels: Tensor, prepared: Tensor) -> Tensor:
    """Whether a function gives pixels other values than within a tile: a bool tensor without axes.

    Parameters
    ----------
    function
        Maps a tile (N, C, h, w) to another one.
    pixels
        Some pixels of a tile.
    prepared
        The function's result for the whole tile.
    """
    among, alone = some_pixels(prepared), function(pixels)
    rounding = max(_RELATIVE, 4 * torch.finfo(among.dtype).eps) * among.abs().amax()
    # Negated, so that NaN here and a number there count as different.
    is_same = ((among - alone).abs() <= rounding).all(1).all(0)
    return (~is_same).sum() > _ALLOWED
