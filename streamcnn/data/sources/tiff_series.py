"""Choice among the images in a TIFF file: by default the largest that is not a macro, label or thumbnail."""

from __future__ import annotations

import logging
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, cast

from tifffile import TiffFile, TiffPageSeries

from streamcnn.data.sources.files import opening, regular
from streamcnn.data.sources.places import place
from streamcnn.data.sources.remote import RemoteFile
from streamcnn.data.sources.series import SeriesFacts
from streamcnn.data.sources.tiff_bounds import check_micromanager, check_ome
from streamcnn.errors import CorruptImage, DatasetMismatch
from streamcnn.support.text import without_secrets

_REDUCED_OR_MASK = 0b101  # bits of NewSubfileType
_ACCESSORY = re.compile(r"(?<![a-z])(macro|label|thumbnail|overview)(?![a-z])")


def chosen_series(path: str, file: TiffFile, series: int | None) -> TiffPageSeries:
    """The image with that number; for None the largest of full resolution, the first of equals.

    Raises
    ------
    DatasetMismatch
        If there is no such image.
    """
    images = all_series(path, file)
    if series is None:
        main = [image for image in images if not _is_accessory(image)]
        return max(main or images, key=_num_pixels)
    check_number(path, "image", series, len(images))
    return images[series]


def all_series(path: str, file: TiffFile) -> list[TiffPageSeries]:
    """All images of a file.

    Raises
    ------
    CorruptImage, DatasetMismatch
        If its description is invalid.
    """
    try:
        check_ome(path, file)
        check_micromanager(path, file)
        # Only further files of the image that were checked are opened.
        file._multifile = bool(file.is_ome)
        return file.series
    except MemoryError as error:
        raise CorruptImage(
            f"{path} tells of more planes than memory has place for a list of; its metadata is damaged"
        ) from error


def check_number(path: str, what: str, asked: int, found: int) -> None:
    """Raise `DatasetMismatch` if there is no image or level of that number."""
    if not 0 <= asked < found:
        raise DatasetMismatch(f"{path} has no {what} {asked}: allowed are 0..{found - 1}")


@contextmanager
def told_if_opened() -> Iterator[None]:
    """Pass on what tifffile logs in the block only if it raises no error, which would say all."""
    logger, thread = logging.getLogger("tifffile"), threading.get_ident()
    held: list[logging.LogRecord] = []

    def hold(record: logging.LogRecord) -> bool:
        # What other threads open in the meantime is none of the block's.
        if record.thread != thread:
            return True
        held.append(record)
        return False

    logger.addFilter(hold)
    try:
        yield
    finally:
        logger.removeFilter(hold)
    for record in held:
        logger.handle(record)


def tiff_file(where: Path | str) -> TiffFile:
    """Open a TIFF file at a path or a URL.

    Raises
    ------
    CorruptImage
        If it is a pipe, a socket or a device, or is on a server that sends only whole files.
    MissingExtra
        If reading from the URL needs a package that is not installed.
    OSError
        If there is no such file.
    """
    if isinstance(where, Path):
        regular(where)
        return TiffFile(where)
    return TiffFile(cast(IO[bytes], RemoteFile(where)))


def tiff_series(path: str | Path) -> list[SeriesFacts]:
    """All images of a TIFF file.

    Raises
    ------
    CorruptImage
        If there is no such file, or it is damaged.
    DatasetMismatch
        If its description tells of too many planes.
    """
    with opening(str(path), "TIFF"), tiff_file(place(path)) as file:
        shown = without_secrets(str(path))
        images = all_series(shown, file)
        default = chosen_series(shown, file, None) if images else None
        return [
            SeriesFacts(
                number,
                image.name or ("reduced" if _is_accessory(image) else ""),
                tuple(_size(level) for level in image.levels),
                image is default,
            )
            for number, image in enumerate(images)
        ]


def _is_accessory(image: TiffPageSeries) -> bool:
    """Whether an image is a thumbnail of another, or shows the slide's label or glass."""
    is_named = _ACCESSORY.search(image.name.lower()) is not None
    return is_named or bool(image.keyframe.subfiletype & _REDUCED_OR_MASK)


def _num_pixels(image: TiffPageSeries) -> int:
    height, width = _size(image)
    return height * width


def _size(image: TiffPageSeries) -> tuple[int, int]:
    return image.keyframe.imagelength, image.keyframe.imagewidth
