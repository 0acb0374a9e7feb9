"""A picture's values as its file has them: Pillow scales grey of few bits, and maxvals other than its own."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from PIL.ImageFile import ImageFile as Image

_GREY_OF_PNG = {"1": 1, "L;2": 3, "L;4": 15}
"""Largest value by Pillow's name of the layout of a row; it takes each to 255."""
_SCALING_DECODER = "ppm"
"""Pillow's decoder of binary pixels with a maxval of their own: a loop in Python over all samples."""


@dataclass(frozen=True, slots=True)
class Values:
    """The conversion of values that Pillow decodes to the file's own values.

    Attributes
    ----------
    largest
        Largest value that the file may hold; None for the dtype's.
    scaled_to
        The value to which Pillow scales it; None if Pillow does not scale.
    offset
        Offset in bytes of binary samples that are better read without Pillow; None if there are none.
    """

    largest: int | None = None
    scaled_to: int | None = None
    offset: int | None = None

    def as_stored(self, pixels: NDArray[Any]) -> NDArray[Any]:
        """The file's own values, in the same dtype; Pillow's scaling loses none."""
        if self.largest is None or self.scaled_to is None:
            return pixels
        wide = pixels.astype(np.uint32)
        stored = (wide * np.uint32(self.largest) + np.uint32(self.scaled_to // 2)) // np.uint32(
            self.scaled_to
        )
        return stored.astype(pixels.dtype)

    def check(self, pixels: NDArray[Any]) -> None:
        """Raise `ValueError` if a value is larger than `largest`."""
        if self.largest is not None and pixels.size and int(pixels.max()) > self.largest:
            raise ValueError(f"a pixel of {int(pixels.max())} where maxval is {self.largest}")


def values_of(image: Image) -> Values:
    """The conversion for a picture, from its head."""
    if not image.tile:
        return Values()
    codec, _, offset, how = image.tile[0]
    if image.format == "PNG" and isinstance(how, str) and how in _GREY_OF_PNG:
        return Values(_GREY_OF_PNG[how], 255)
    if image.format != "PPM":
        return Values()
    if image.mode == "1":
        return Values(1, 255)
    maxval = how[1] if isinstance(how, tuple) else None
    full = 255 if image.mode != "I" else 65535
    if not isinstance(maxval, int) or maxval in (full, -1, 0):
        return Values()
    return Values(maxval, full, offset if codec == _SCALING_DECODER else None)


def read_samples(path: str, values: Values, out: NDArray[Any], rows: int) -> None:
    """Fill ``out`` with a file's binary samples, ``rows`` rows at a time.

    Raises
    ------
    ValueError
        If the file has too few, or one is larger than maxval.
    """
    assert values.largest is not None
    assert values.offset is not None
    stored = np.dtype("u1" if values.largest < 256 else ">u2")  # two-byte samples are big-endian
    with open(path, "rb") as file:
        file.seek(values.offset)
        for top in range(0, len(out), rows):
            band = out[top : top + rows]
            found = np.fromfile(file, stored, band.size)
            if found.size < band.size:
                raise ValueError("the file ends before its pixels do")
            values.check(found)
            band[...] = found.reshape(band.shape)
