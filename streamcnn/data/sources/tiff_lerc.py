"""LERC's validity masks: invalid pixels become NaN, rather than the 0 of decoders."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
from tifffile import COMPRESSION, TiffPage

from streamcnn.errors import DatasetMismatch
from streamcnn.support.extras import require


def keep_lerc_masks(name: str, page: TiffPage) -> None:
    """Let the page's decoder set invalid pixels to NaN.

    Reading integers with invalid pixels then raises `DatasetMismatch`, as they have no NaN.
    """
    if page.compression != COMPRESSION.LERC:
        return
    codecs: Any = require("imagecodecs", extra="tiff")
    unmasked = page.decode

    def decode(data: bytes | None, *args: Any, **options: Any) -> Any:
        pixels, *where = unmasked(data, *args, **options)
        mask = None if data is None else codecs.lerc_decode(data, masks=True)[1]
        return (pixels if pixels is None or mask is None else _masked(name, pixels, mask), *where)

    page.__dict__["decode"] = decode  # where tifffile caches the decoder


def _masked(name: str, pixels: NDArray[Any], mask: NDArray[np.bool_]) -> NDArray[Any]:
    """A tile (depth, h, w, samples), which may be padded, with NaN where the mask (h, w) is not set."""
    if mask.all():
        return pixels
    if pixels.dtype.kind != "f":
        raise DatasetMismatch(
            f"{name} has pixels that its LERC mask leaves out, in {pixels.dtype}, which has no NaN for them: "
            "allowed are such pixels in floats; fill them, or write the image as floats"
        )
    masks = mask[None, :, :, None] if mask.ndim == 2 else np.moveaxis(mask, 0, -1)[None]
    out = np.array(pixels)
    _, height, width, _ = masks.shape
    inner = out[:, :height, :width]
    inner[np.broadcast_to(~masks, inner.shape)] = np.nan
    return out
