"""Pictures that can only be decoded whole: PNG, JPEG and other formats of Pillow."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, final

import numpy as np
from numpy.typing import NDArray

from streamcnn.data.sources.base import FileSource
from streamcnn.data.sources.files import MAX_PIXELS, FileStamp, ProcessLock, opening
from streamcnn.data.sources.layout import Layout, torch_dtype
from streamcnn.data.sources.orientation import Orientation
from streamcnn.data.sources.picture_values import read_samples, values_of
from streamcnn.data.sources.png_metadata import leading_orientation, trailing_orientation
from streamcnn.errors import DatasetMismatch
from streamcnn.geometry.regions import Region
from streamcnn.plan.reading import ReadingCost
from streamcnn.support.extras import require

if TYPE_CHECKING:
    from PIL.ImageFile import ImageFile as Image

FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "PPM")
"""Pillow's names of the formats that are read through it."""

# Pillow's modes that are converted, and to which mode.
_CONVERTED = {
    "1": "L",
    "P": "RGB",
    "PA": "RGBA",
    "La": "LA",
    "RGBa": "RGBA",
    "RGBX": "RGB",
    "CMYK": "RGB",
    "YCbCr": "RGB",
}
# The resulting modes: number of channels and dtype.
_HANDED_OUT = {
    "L": (1, "u1"),
    "LA": (2, "u1"),
    "RGB": (3, "u1"),
    "RGBA": (4, "u1"),
    "I;16": (1, "u2"),
    "I;16B": (1, "u2"),
    "I": (1, "i4"),
    "F": (1, "f4"),
}

_ORIENTATION = 274  # of EXIF's tags
_DECODED = {"1": 1, "L": 1, "P": 1, "I;16": 2, "I;16B": 2}
"""Bytes of a pixel in Pillow's memory by mode; 4 in all others."""
_SCRATCH = {"WEBP": 16, "GIF": 8, "BMP": 4}
"""Bytes for each pixel that a decoder takes besides the picture, by format."""
_PROGRESSIVE = 8
"""For a progressive JPEG: the coefficients of up to four components, two bytes each."""
_PLAIN_TEXT = 16
"""For numbers as text: those read so far, and two copies of them."""
_BAND_BYTES = 2**22
"""Bytes of pixels that are copied from Pillow's memory at a time; at least a row."""

_limit_lock = ProcessLock()


@final
class PictureSource(FileSource):
    """A picture that is decoded whole at its first read and kept.

    Palettes, CMYK and YCbCr become RGB, a palette with transparency RGBA; grey of 16 bits stays uint16.
    Values are the file's own: grey PNG of 1, 2 and 4 bits, PBM, and PGM and PPM with any maxval are not
    scaled, and `largest` gives their range. An animation gives its first frame. Pixels are made upright by
    the orientation in the file's metadata.

    Parameters
    ----------
    path : file
    max_pixels : largest picture, in pixels, that may be decoded; Pillow's own limit is ignored

    Raises
    ------
    CorruptImage
        If there is no such file, or it is not a picture.
    DatasetMismatch
        If the picture is too large, its kind of pixels is unsupported, or Pillow would drop half of its bits.
    MissingExtra
        If Pillow is not installed.
    """

    def __init__(self, path: str | Path, *, max_pixels: int = MAX_PIXELS) -> None:
        name = str(path)
        self._path = name
        self._max_pixels = max_pixels
        with opening(name, "picture"):
            self._stamp = FileStamp.of(name)
        with opening(name, f"picture ({', '.join(FORMATS)})"), _opened(name) as image:
            _check_depth(name, image)
            width, height = image.size
            self._mode = _mode(name, image)
            self._values = values_of(image)
            self._orientation = _orientation(name, image)
            self._format = image.format or "picture"
            self._opening = width * height * (_DECODED.get(image.mode, 4) + _scratch(image))
        if width * height > max_pixels:
            raise DatasetMismatch(
                f"{name} has {height} x {width} = {width * height} pixels: allowed are {max_pixels}, for a "
                "picture is decoded whole; give max_pixels= or write it as a tiled TIFF or zarr array"
            )
        channels, dtype = _HANDED_OUT[self._mode]
        self._layout = Layout("YXC" if channels > 1 else "YX")
        self._pixels: NDArray[Any] | None = None
        self._decoding = ProcessLock()
        self._stored_size = (height, width)
        size = self._orientation.size(self._stored_size)
        dtype_of_torch = torch_dtype(name, np.dtype(dtype))
        super().__init__((channels, *size), dtype_of_torch, name, largest=self._values.largest)

    @property
    def held_bytes(self) -> int:
        """Bytes of the picture, once it has been decoded."""
        pixels = self._pixels
        return 0 if pixels is None else pixels.nbytes

    @property
    def pieces(self) -> str:
        """Text on the format, as one piece."""
        return f"a {self._format} picture of {self.shape[1]} x {self.shape[2]} pixels, which is decoded whole"

    @property
    def reading_cost(self) -> ReadingCost:
        """The picture; for the first read also Pillow's own copy and the decoder's memory."""
        channels, height, width = self.shape
        pixel = channels * self.dtype.itemsize
        # A crop of Pillow's picture, converted, as bytes in pieces and joined.
        bands = 4 * max(_BAND_BYTES, 4 * width)
        return ReadingCost(
            (height, width),
            held=pixel * height * width,
            opening=self._opening + bands,
            pixel=pixel,
        )

    def release(self) -> None:
        """Release the picture."""
        with self._decoding:
            self._pixels = None

    def __reduce__(self) -> tuple[object, ...]:
        return _reopen, (self._path, self._max_pixels)

    def _load(self, region: Region) -> NDArray[Any]:
        with self._decoding:
            if self._pixels is None:
                self._pixels = self._decode()
            pixels = self._pixels
        stored = self._orientation.stored_region(region, self._stored_size)
        return self._orientation.upright(self._layout.channels_first(pixels[self._layout.window(stored)]))

    def _decode(self) -> NDArray[Any]:
        self._stamp.check()
        height, width = self._stored_size
        channels, dtype = _HANDED_OUT[self._mode]
        pixels = np.empty((height, width, channels) if channels > 1 else (height, width), dtype)
        rows = max(1, _BAND_BYTES // (4 * width))
        if self._values.offset is not None:
            read_samples(self._path, self._values, pixels, rows)
            return pixels
        with _opened(self._path) as image:
            for top in range(0, height, rows):
                # In bands, as Pillow returns a picture as bytes, which takes two copies of it.
                band = image.crop((0, top, width, min(top + rows, height)))
                band = band if band.mode == self._mode else band.convert(self._mode)
                pixels[top : top + rows] = self._values.as_stored(np.asarray(band))
        return pixels


@contextmanager
def _opened(name: str) -> Iterator[Image]:
    """Open the picture; only its head is read until pixels are requested."""
    pillow: Any = require("PIL.Image", extra="pictures")
    with _limit_lock:
        limit, pillow.MAX_IMAGE_PIXELS = pillow.MAX_IMAGE_PIXELS, None  # our own limit applies
        try:
            image: Image = pillow.open(name, formats=FORMATS)
        finally:
            pillow.MAX_IMAGE_PIXELS = limit
    with image:
        yield image


def _mode(name: str, image: Image) -> str:
    """The mode to which the picture's pixels are converted."""
    if image.mode == "P" and "transparency" in image.info:
        return "RGBA"
    if image.mode == "I" and image.format == "PPM":
        return "I;16"  # the mode of grey of 16 bits in this format
    mode = _CONVERTED.get(image.mode, image.mode)
    if mode not in _HANDED_OUT:
        raise DatasetMismatch(
            f"{name} has pixels of Pillow's mode {image.mode!r}: allowed are {', '.join(_HANDED_OUT)}, "
            f"{', '.join(_CONVERTED)}; convert the picture"
        )
    return mode


def _orientation(name: str, image: Image) -> Orientation:
    if image.format == "PNG":
        behind = trailing_orientation(name, _ORIENTATION)
        return Orientation(behind or leading_orientation(image, _ORIENTATION) or 1)
    return Orientation(int(image.getexif().get(_ORIENTATION, 1)))


def _scratch(image: Image) -> int:
    """Bytes for each pixel that decoding takes besides the picture."""
    if image.format == "JPEG" and image.info.get("progressive"):
        return _PROGRESSIVE
    if image.tile and image.tile[0].codec_name == "ppm_plain":
        return _PLAIN_TEXT
    return _SCRATCH.get(image.format or "", 0)


def _check_depth(name: str, image: Image) -> None:
    """Refuse colours of more than 8 bits, which Pillow truncates silently."""
    how = image.tile[0].args if image.tile else ""
    is_deep = {
        "PNG": isinstance(how, str) and how.endswith(";16B"),
        "PPM": isinstance(how, tuple) and isinstance(how[1], int) and how[1] > 255,
    }
    if is_deep.get(image.format or "", False) and image.mode in ("RGB", "RGBA"):
        raise DatasetMismatch(
            f"{name} has colours of more than 8 bits, of which Pillow would keep 8: allowed are colours of 8 "
            "bits and grey of 16; write it as a TIFF"
        )


def _reopen(path: str, max_pixels: int) -> PictureSource:
    return PictureSource(path, max_pixels=max_pixels)
