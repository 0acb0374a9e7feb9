"""Functions of a tile that look further than at each pixel: what they give depends on how images are cut.

``(tile - tile.mean()) / tile.std()`` is such a function, and so is one that draws random numbers. To find
it, some pixels of a tile are given to it once more, side by side in a small tile of their own.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

_SHAPE = (2, 4)
"""Rows and columns of pixels that are tried."""
_ALLOWED = 2
"""Of them may differ: rounding that depends on a tile's shape may take one past a threshold."""
_RELATIVE = 1e-4
"""Difference that is rounding, over the largest number among them."""
_GOLDEN = 0.618034
"""Multiples of the golden section, modulo one, are spread evenly and in no order."""


def some_pixels(tile: Tensor) -> Tensor:
    """Pixels (N, C, 2, 4) from all over a tile (N, C, h, w), in memory of their own."""
    height, width = tile.shape[2:]
    num_pixels = _SHAPE[0] * _SHAPE[1]
    shares = [((place + 1) * _GOLDEN % 1, (place + 0.5) / num_pixels) for place in range(num_pixels)]
    picked = [tile[:, :, int(row * height), int(col * width)] for row, col in shares]
    pixels = torch.stack(picked, -1)
    return pixels.reshape(*pixels.shape[:2], *_SHAPE)


def looks_further(function: Callable[[Tensor], Tensor], pixels: Tensor, prepared: Tensor) -> Tensor:
    """Whether a function makes others of pixels than it made of them in a tile: a bool tensor without axes.

    Parameters
    ----------
    function
        From a tile (N, C, h, w) to another one.
    pixels
        Some pixels of a tile.
    prepared
        What the function made of the whole tile.
    """
    among, alone = some_pixels(prepared), function(pixels)
    rounding = max(_RELATIVE, 4 * torch.finfo(among.dtype).eps) * among.abs().amax()
    # Asked this way round, for what is NaN alone and a number among others differs.
    is_same = ((among - alone).abs() <= rounding).all(1).all(0)
    return (~is_same).sum() > _ALLOWED
