"""What a file says of the images in it: their names, and the resolutions of each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


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


def taken_of(found: Sequence[SeriesFacts], series: int | None) -> SeriesFacts:
    """The image that is opened where ``series`` is asked for."""
    return next(each for each in found if (each.is_default if series is None else each.number == series))
