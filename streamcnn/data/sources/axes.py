"""The meanings of the names of an array's axes: rows, columns, channels or something else.

Names come from ``dimension_names`` of zarr v3, from xarray's ``_ARRAY_DIMENSIONS`` and from OME metadata.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

# If an array has several names of one meaning, the first here counts: beside y, a height is an altitude.
_MEANINGS = {
    "Y": ("y", "row", "rows", "lat", "latitude", "northing", "line", "lines", "height", "h"),
    "X": ("x", "col", "cols", "column", "columns", "lon", "longitude", "easting", "width", "w"),
    "C": (
        *("c", "ch", "channel", "channels", "band", "bands", "s", "sample", "samples", "rgb", "rgba"),
        *("color", "colour", "colors", "colours", "wavelength", "wavelengths", "spectral", "feature"),
    ),
}
_NEVER_CHANNELS = frozenset(
    "t time frame frames z depth level lev plane planes slice slices p position positions m scene scenes "
    "series tile n batch angle phase".split()
)
_SAYS_NOTHING = re.compile(r"(phony_)?(dim|axis|d)?_?\d*")


@dataclass(frozen=True, slots=True)
class Axes:
    """The names and meanings of an array's axes, in the array's order."""

    names: tuple[str, ...]
    """Names for messages."""
    letters: tuple[str, ...]
    """``Y``, ``X`` or ``C`` if that is the name's meaning, otherwise the name."""

    def is_never_channels(self, position: int) -> bool:
        """Whether the name means something other than channels, such as time, depth or scenes."""
        return self.names[position].lower() in _NEVER_CHANNELS

    @classmethod
    def of_names(cls, names: Sequence[object], types: Sequence[str | None] = ()) -> Axes | None:
        """The axes by their names; None if no name has a meaning, as None and ``dim_0`` have none.

        Parameters
        ----------
        names : one for each axis, or None
        types : OME's type of each axis, if it has one: channel, time or space
        """
        texts = ["" if name is None else str(name) for name in names]
        if all(_SAYS_NOTHING.fullmatch(text.lower()) for text in texts):
            return None
        letters = _meanings(texts, types)
        rest = [position for position, letter in enumerate(letters) if letter not in ("Y", "X", "C")]
        unnamed = [position for position in rest if _SAYS_NOTHING.fullmatch(texts[position].lower())]
        if "C" in letters and not {"Y", "X"} & set(letters) and len(unnamed) == 2:
            letters[unnamed[0]], letters[unnamed[1]] = "Y", "X"
        return cls(tuple(text or "(no name)" for text in texts), tuple(letters))


def array_axes(metadata: Any, attributes: Mapping[str, Any]) -> Axes | None:
    """The axes by the names in a zarr array's own metadata; None if it has none.

    Parameters
    ----------
    metadata : zarr's metadata of the array
    attributes : the user's attributes of the array
    """
    for names in (getattr(metadata, "dimension_names", None), attributes.get("_ARRAY_DIMENSIONS")):
        if isinstance(names, list | tuple) and len(names) == len(metadata.shape):
            axes = Axes.of_names(names)
            if axes is not None:
                return axes
    return None


def _meanings(texts: list[str], types: Sequence[str | None]) -> list[str]:
    lower = [text.lower() for text in texts]
    letters = list(texts)
    for letter, known in _MEANINGS.items():
        found = [lower.index(name) for name in known if name in lower]
        if found:
            letters[found[0]] = letter
    channels = [position for position, kind in enumerate(types) if kind == "channel"]
    if "C" not in letters and len(channels) == 1:
        letters[channels[0]] = "C"
    return letters
