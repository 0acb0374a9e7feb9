"""The meaning of a TIFF's samples, and their conversion to grey, RGB or plain channels.

As in pictures of other formats, the results have black as 0, RGB for inks, and colours that are not
multiplied by alpha. Unknown meanings are refused; the error names them.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tifffile import COMPRESSION, EXTRASAMPLE, PHOTOMETRIC, TiffPage, TiffPageSeries

from streamcnn.errors import DatasetMismatch

_JPEG = {COMPRESSION.OJPEG, COMPRESSION.JPEG, COMPRESSION.JPEG_LOSSY, COMPRESSION.ALT_JPEG}
_APERIO_YCBCR = 33003
_CODESTREAM = b"\xff\x4f\xff\x51"
_PLAIN = {
    *(PHOTOMETRIC.MINISBLACK, PHOTOMETRIC.RGB, PHOTOMETRIC.MASK, PHOTOMETRIC.DEPTH_MAP),
    PHOTOMETRIC.SEMANTIC_MASK,
}
_CMYK = 1  # value of the tag InkSet
_INK_SET, _MAX_VALUE, _SIGNED_MAX_VALUE = 332, 281, 341


COLOUR_BYTES = 64
"""Largest number of bytes for each pixel that the conversion takes, besides samples and colours."""


class Meaning(Enum):
    """The conversions of a pixel's samples."""

    PLAIN = "as stored"
    INVERTED = "inverted"
    INKS = "cyan, magenta, yellow and black"
    YCBCR = "luma and chroma"


@dataclass(frozen=True, slots=True)
class Colours:
    """The conversion of stored samples ``(C, h, w)`` to channels.

    Attributes
    ----------
    white
        Largest value that the bits of a sample allow; None for floats.
    largest
        Largest value that the file states; None for floats.
    num_colours
        Number of channels that are colours; None for all, if each page is a channel.
    alpha
        Index of the channel by which colours are multiplied, if any.
    """

    meaning: Meaning
    white: int | None
    largest: int | None
    num_colours: int | None
    alpha: int | None = None

    def num_channels(self, stored: int) -> int:
        """Number of the image's channels, given the number stored in the file."""
        return stored - 1 if self.meaning is Meaning.INKS else stored

    def apply(self, pixels: NDArray[Any]) -> NDArray[Any]:
        """Convert samples to channels ``(C', h, w)`` of the same dtype."""
        pixels = np.asarray(pixels, pixels.dtype.newbyteorder("="))
        match self.meaning:
            case Meaning.INVERTED:
                colours, others = np.split(pixels, [self.num_colours or len(pixels)])
                pixels = np.concatenate([_inverted(colours, self.white), others])
            case Meaning.INKS:
                pixels = _rgb_of_inks(pixels, self.white)
            case Meaning.YCBCR:
                pixels = np.concatenate([_rgb_of_ycbcr(pixels[:3]), pixels[3:]])
        return pixels if self.alpha is None else _divided(pixels, self.alpha, self.white)

    @property
    def is_plain(self) -> bool:
        """Whether channels are the samples as stored."""
        return self.meaning is Meaning.PLAIN and self.alpha is None


def colours_of(name: str, series: TiffPageSeries, *, is_ome: bool) -> Colours:
    """The conversion of a level's samples to channels.

    Raises
    ------
    DatasetMismatch
        If samples are indices, or colours other than grey, RGB, CMYK and JPEG's YCbCr.
    """
    page = series.keyframe
    meaning = _meaning(name, page, is_ome=is_ome)
    white = _white(series.dtype, page)
    alpha = _associated_alpha(page)
    _check_arithmetic(name, series.dtype, meaning, alpha)
    if meaning is Meaning.YCBCR:
        _check_codestream(name, page)
    colours = None if page.samplesperpixel == 1 else page.samplesperpixel - len(page.extrasamples)
    return Colours(meaning, white, _largest(page, white), colours, alpha)


def _meaning(name: str, page: TiffPage, *, is_ome: bool) -> Meaning:
    photometric = page.photometric
    if "PhotometricInterpretation" not in page.tags and photometric == PHOTOMETRIC.MINISWHITE:
        return Meaning.PLAIN  # the file has no tag; tifffile's number for that is the same
    # Bio-Formats writes RGB in OME-TIFF with the number that Aperio uses for YCbCr.
    if photometric == PHOTOMETRIC.RGB and page.compression == _APERIO_YCBCR and not is_ome:
        return Meaning.YCBCR if page.samplesperpixel >= 3 else Meaning.PLAIN
    if photometric == PHOTOMETRIC.MINISWHITE:
        return Meaning.INVERTED
    if photometric == PHOTOMETRIC.SEPARATED and _is_cmyk(page):
        return Meaning.INKS
    if photometric in _PLAIN or (photometric == PHOTOMETRIC.YCBCR and page.compression in _JPEG):
        return Meaning.PLAIN
    raise DatasetMismatch(f"{name} holds {_refused(photometric)}")


def _refused(photometric: int) -> str:
    if photometric == PHOTOMETRIC.PALETTE:
        return "numbers of colours in a palette: allowed are grey and colours; convert it to RGB"
    if photometric == PHOTOMETRIC.YCBCR:
        return (
            "YCbCr colours that are not JPEG-compressed: allowed are grey and RGB; convert it to RGB, or "
            "open it as a slide"
        )
    if photometric == PHOTOMETRIC.SEPARATED:
        return "inks other than CMYK: allowed are grey, RGB and CMYK; convert it to RGB"
    try:
        kind = PHOTOMETRIC(photometric).name
    except ValueError:
        kind = f"photometric interpretation {photometric}"
    return f"{kind} samples: allowed are grey, RGB and CMYK; convert it to RGB"


def _is_cmyk(page: TiffPage) -> bool:
    return page.tags.valueof(_INK_SET, _CMYK) == _CMYK and page.samplesperpixel - len(page.extrasamples) == 4


def _white(dtype: np.dtype[Any], page: TiffPage) -> int | None:
    if dtype.kind == "b":
        return 1
    if dtype.kind not in "iu":
        return None
    full = int(np.iinfo(dtype).max)
    bits = page.bitspersample
    return min(full, 2**bits - 1) if dtype.kind == "u" and isinstance(bits, int) else full


def _largest(page: TiffPage, white: int | None) -> int | None:
    """The largest value, by the tags that tell how many of 16 bits are used.

    The tags may hold the largest value in this one image, so it is rounded up to an even number of bits.
    """
    if white is None or not 2**8 < white < 2**16:
        return white
    for tag in (_SIGNED_MAX_VALUE, _MAX_VALUE):
        value = page.tags.valueof(tag, None)
        most = max(value) if isinstance(value, tuple) and value else value
        if isinstance(most, int | float) and 0 < most < white:
            bits = max(8, int(most).bit_length())
            return min(white, (1 << (bits + bits % 2)) - 1)
    return white


def _associated_alpha(page: TiffPage) -> int | None:
    extra = [int(kind) for kind in page.extrasamples]
    if EXTRASAMPLE.ASSOCALPHA not in extra:
        return None
    inks = 1 if page.photometric == PHOTOMETRIC.SEPARATED else 0
    return int(page.samplesperpixel - len(extra) + extra.index(EXTRASAMPLE.ASSOCALPHA) - inks)


def _check_arithmetic(name: str, dtype: np.dtype[Any], meaning: Meaning, alpha: int | None) -> None:
    """Refuse dtypes for which there is no conversion."""
    small = dtype.kind == "u" and dtype.itemsize <= 2
    allowed, what = True, meaning.value
    if meaning is Meaning.INVERTED:
        allowed, what = dtype.kind in "ub" and alpha is None, "grey whose 0 is white"
    elif meaning is Meaning.INKS:
        allowed, what = small and alpha is None, "CMYK"
    elif meaning is Meaning.YCBCR:
        allowed, what = dtype == np.uint8, "YCbCr"
    elif alpha is not None:
        allowed, what = small or dtype.kind == "f", "colours multiplied by alpha"
    if not allowed:
        raise DatasetMismatch(
            f"{name} holds {what} in {dtype}{' with associated alpha' if alpha is not None else ''}, for "
            "which there is no rule: allowed are unsigned integers of 8 and 16 bits without such alpha; "
            "convert it to RGB, or to grey whose 0 is black"
        )


def _check_codestream(name: str, page: TiffPage) -> None:
    """Refuse subsampled chroma, which the decoder would mistake for RGB.

    The sampling is in the head of the first tile (ISO 15444-1, A.5.1).
    """
    file = page.parent.filehandle
    at = next((n for n, count in enumerate(page.databytecounts) if count), None)
    if at is None:
        return
    file.seek(page.dataoffsets[at])
    head = file.read(64)
    sampling = [head[43 + 3 * component : 45 + 3 * component] for component in range(3)]
    if not head.startswith(_CODESTREAM) or any(pair != b"\1\1" for pair in sampling):
        raise DatasetMismatch(
            f"{name} holds YCbCr colours in JPEG 2000 that are sampled in different places: allowed are "
            "samples of each pixel; name it .svs, which opens it as a slide, or convert it to RGB"
        )


def _inverted(pixels: NDArray[Any], white: int | None) -> NDArray[Any]:
    inverted: NDArray[Any] = ~pixels if pixels.dtype.kind == "b" else pixels.dtype.type(white) - pixels
    return inverted


def _rgb_of_inks(pixels: NDArray[Any], white: int | None) -> NDArray[Any]:
    """RGB of CMYK without a profile, as in Pillow: the light that neither the ink nor black absorbs."""
    assert white is not None
    light = np.uint32(white) - pixels[3]
    out = np.empty((len(pixels) - 1, *pixels.shape[1:]), pixels.dtype)
    for channel in range(3):
        product = (np.uint32(white) - pixels[channel]) * light
        out[channel] = (product + np.uint32(white // 2)) // np.uint32(white)
    out[3:] = pixels[4:]
    return out


def _rgb_of_ycbcr(pixels: NDArray[Any]) -> NDArray[Any]:
    """JPEG's colours of full range (ITU-T T.871) as RGB."""
    luma = pixels[0].astype(np.float32)
    blue, red = (pixels[channel].astype(np.float32) - 128 for channel in (1, 2))
    out = np.empty_like(pixels)
    for channel, value in enumerate(
        (luma + 1.402 * red, luma - 0.344136 * blue - 0.714136 * red, luma + 1.772 * blue)
    ):
        out[channel] = value.round().clip(0, 255)
    return out


def _divided(pixels: NDArray[Any], alpha: int, white: int | None) -> NDArray[Any]:
    """Colours that were multiplied by alpha, divided by it; 0 where alpha is 0."""
    out = pixels.copy()
    opacity = pixels[alpha]
    seen = opacity > 0
    for channel in range(alpha):
        if white is None:
            np.divide(pixels[channel], opacity, out=out[channel], where=seen)
            out[channel][~seen] = 0
        else:
            wide = opacity.astype(np.uint32)
            whole = pixels[channel].astype(np.uint32) * np.uint32(white) + wide // 2
            out[channel] = np.minimum(whole // np.maximum(wide, 1), white) * seen
    return out
