"""Which of the images in a TIFF file is meant: the largest one that is no macro, label or thumbnail."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import IO, cast

from tifffile import TiffFile, TiffPageSeries

from streamcnn.data.sources.files import opening
from streamcnn.data.sources.places import place
from streamcnn.data.sources.remote import RemoteFile
from streamcnn.errors import DatasetMismatch
from streamcnn.text import without_secrets

_REDUCED_OR_MASK = 0b101  # bits of NewSubfileType
_ACCESSORY = re.compile(r"(?<![a-z])(macro|label|thumbnail|overview)(?![a-z])")


@dataclass(frozen=True, slots=True)
class SeriesFacts:
    """What a file says of one of its images.

    Attributes
    ----------
    number
        What ``series=`` calls it.
    name
        Its name in the file, or why it is not opened by default; may be empty.
    levels
        Height and width in pixels of each resolution, the full one first.
    is_default
        Whether it is opened where no series is asked for.
    """

    number: int
    name: str
    levels: tuple[tuple[int, int], ...]
    is_default: bool


def chosen_series(path: str, file: TiffFile, series: int | None) -> TiffPageSeries:
    """The image of that number; None is the largest of full resolution, the first of equals.

    Raises
    ------
    DatasetMismatch
        If there is no such image.
    """
    images = file.series
    if series is None:
        main = [image for image in images if not _is_accessory(image)]
        return max(main or images, key=_num_pixels)
    check_number(path, "image", series, len(images))
    return images[series]


def check_number(path: str, what: str, asked: int, found: int) -> None:
    """Raise `DatasetMismatch` if there is no image or level of that number."""
    if not 0 <= asked < found:
        raise DatasetMismatch(f"{path} has no {what} {asked}: allowed are 0..{found - 1}")


def tiff_file(where: Path | str) -> TiffFile:
    """A TIFF file at a path or a URL, opened.

    Raises
    ------
    CorruptImage
        If it lies on a server that sends files only as a whole.
    MissingExtra
        If reading from there needs a package that is not installed.
    OSError
        If there is no such file.
    """
    if isinstance(where, Path):
        return TiffFile(where)
    return TiffFile(cast(IO[bytes], RemoteFile(where)))


def tiff_series(path: str | Path) -> list[SeriesFacts]:
    """All images of a TIFF file.

    Raises
    ------
    CorruptImage
        If there is no such file, or it is damaged.
    """
    with opening(str(path), "TIFF"), tiff_file(place(path)) as file:
        default = chosen_series(without_secrets(str(path)), file, None) if file.series else None
        return [
            SeriesFacts(
                number,
                image.name or ("reduced" if _is_accessory(image) else ""),
                tuple(_size(level) for level in image.levels),
                image is default,
            )
            for number, image in enumerate(file.series)
        ]


def _is_accessory(image: TiffPageSeries) -> bool:
    """Whether it shows another image, or what is beside it on the glass."""
    is_named = _ACCESSORY.search(image.name.lower()) is not None
    return is_named or bool(image.keyframe.subfiletype & _REDUCED_OR_MASK)


def _num_pixels(image: TiffPageSeries) -> int:
    height, width = _size(image)
    return height * width


def _size(image: TiffPageSeries) -> tuple[int, int]:
    return image.keyframe.imagelength, image.keyframe.imagewidth
