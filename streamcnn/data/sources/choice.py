"""The choice of an image within a file, its resolution, and the place of its channels, as one value."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any


@dataclass(frozen=True, slots=True)
class ImageChoice:
    """How to read a file: which image, resolution and axis of channels.

    A choice that does not apply to a file is refused when the file is opened; the error names it.

    Raises
    ------
    ValueError
        If a number is negative, or not an integer.
    """

    series: int | None = None
    """Which image of a TIFF file or an OME-Zarr folder that holds several; None leaves it to the file."""
    level: int = 0
    """Resolution of a pyramid; 0 is full."""
    channels_last: bool | None = None
    """Whether the channels are the last of three axes or the first; None where the file says it."""

    def __post_init__(self) -> None:
        for name, number in (("series", self.series), ("level", self.level)):
            is_whole = isinstance(number, int) and not isinstance(number, bool) and number >= 0
            if not is_whole and not (name == "series" and number is None):
                raise ValueError(f"{name}={number!r}: allowed are whole numbers from 0 on")
        if not (self.channels_last is None or isinstance(self.channels_last, bool)):
            raise ValueError(f"channels_last={self.channels_last!r}: allowed are True, False and None")

    @property
    def made(self) -> Mapping[str, Any]:
        """The values that differ from the default, by name."""
        default = ImageChoice()
        return {
            each.name: getattr(self, each.name)
            for each in fields(self)
            if getattr(self, each.name) != getattr(default, each.name)
        }

    def __str__(self) -> str:
        """Text for messages: ``series=1, level=2``, or ``the default``."""
        return ", ".join(f"{name}={value}" for name, value in self.made.items()) or "the default"


DEFAULT_CHOICE = ImageChoice()
"""Full resolution of the file's main image."""
