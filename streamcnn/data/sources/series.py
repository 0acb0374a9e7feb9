"""Facts about the images in a file: their names, and the resolutions of each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class SeriesFacts:
    """Facts about one of a file's images.

    Attributes
    ----------
    number
        Number of the image, for ``series=``.
    name
        Its name in the file, or the reason why it is not opened by default; may be empty.
    levels
        Height and width in pixels of each resolution, the full one first.
    is_default
        Whether it is opened by default.
    """

    number: int
    name: str
    levels: tuple[tuple[int, int], ...]
    is_default: bool


def taken_of(found: Sequence[SeriesFacts], series: int | None) -> SeriesFacts:
    """The image that is opened for ``series``."""
    return next(each for each in found if (each.is_default if series is None else each.number == series))
