"""Values as a picture's file has them: Pillow scales grey of few bits, and other maxvals than its own."""

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
    """How the file's values come of those that Pillow decodes.

    Attributes
    ----------
    largest
        Largest value that the file may hold; None for that of the type.
    scaled_to
        What Pillow makes of it; None where it leaves values alone.
    offset
        Byte at which binary samples begin that are better read without Pillow; None where there are none.
    """

    largest: int | None = None
    scaled_to: int | None = None
    offset: int | None = None

    def as_stored(self, pixels: NDArray[Any]) -> NDArray[Any]:
        """The file's own values, of the same type: scaling up loses nothing."""
        if self.largest is None or self.scaled_to is None:
            return pixels
        wide = pixels.astype(np.uint32)
        stored = (wide * np.uint32(self.largest) + np.uint32(self.scaled_to // 2)) // np.uint32(
            self.scaled_to
        )
        return stored.astype(pixels.dtype)

    def check(self, pixels: NDArray[Any]) -> None:
        """Raise `ValueError` if a value is larger than any may be."""
        if self.largest is not None and pixels.size and int(pixels.max()) > self.largest:
            raise ValueError(f"a pixel of {int(pixels.max())} where maxval is {self.largest}")


def values_of(image: Image) -> Values:
    """What the picture's head says of its values."""
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
    stored = np.dtype("u1" if values.largest < 256 else ">u2")  # two bytes have the high one first
    with open(path, "rb") as file:
        file.seek(values.offset)
        for top in range(0, len(out), rows):
            band = out[top : top + rows]
            found = np.fromfile(file, stored, band.size)
            if found.size < band.size:
                raise ValueError("the file ends before its pixels do")
            values.check(found)
            band[...] = found.reshape(band.shape)
