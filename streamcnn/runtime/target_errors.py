"""Explain errors of a loss about a target that does not fit, with the file and the place in it."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NoReturn

from streamcnn.data.mask_values import values_of
from streamcnn.data.reader import Image
from streamcnn.data.sources import ImageSource
from streamcnn.errors import DatasetMismatch, UnsupportedModel
from streamcnn.geometry.regions import Interval, Region

_UNKNOWN_CLASS = re.compile(r"Target (-?\d+) is out of bounds")
_NOT_ONE_HOT = "Class values must be"
_SHOWN = 5
"""The most masks that an error names."""
_ROWS = 64
"""Rows that are searched at a time."""


def sources_of(value: Any) -> Sequence[ImageSource]:
    """The sources in a value, which may be one source or a list; none for a tensor."""
    each = list(value) if isinstance(value, (list, tuple)) else [value]
    return [source for source in each if isinstance(source, ImageSource)]


@contextmanager
def explaining(image: Image, target: Any) -> Iterator[None]:
    """A block that computes a loss of the model's output for ``image`` and ``target``, sources or tensors.

    Raises
    ------
    DatasetMismatch
        If the loss's error is about a mask; any other error is raised as it came.
    """
    try:
        yield
    except IndexError as error:
        _raise_better(_unknown_class(error, target), error)
    except UnsupportedModel as error:
        _raise_better(_other_size(error, image, target), error)
    except RuntimeError as error:
        _raise_better(_classes_beyond(error, target), error)


def _raise_better(better: DatasetMismatch | None, error: Exception) -> NoReturn:
    """Raise the better error, or else the error as it came, with its own cause."""
    if better is None:
        raise error
    raise better from error


def _unknown_class(error: IndexError, target: Any) -> DatasetMismatch | None:
    """The error for a target read from sources with a class that the loss does not know; None for others."""
    found = _UNKNOWN_CLASS.search(str(error))
    if found is None:
        return None
    value = int(found[1])
    for source in sources_of(target):
        place = _place_of(source, value)
        if place is not None:
            return DatasetMismatch(
                f"{source.name} holds class {value} at row {place[0]}, column {place[1]}, and the model's "
                "output has no such channel: correct the mask, give the model more classes, or have the loss "
                f"leave it out with ignore_index={value}"
            )
    return None


def _classes_beyond(error: RuntimeError, target: Any) -> DatasetMismatch | None:
    """The error naming the classes in sources, if the loss does not know them all; None for others."""
    if _NOT_ONE_HOT not in str(error):
        return None
    found = [
        f"{source.name} holds {', '.join(map(str, sorted(values_of(source))))}"
        for source in sources_of(target)
    ]
    if not found:
        return None
    return DatasetMismatch(
        f"masks hold classes that the model's output has no channels for ({'; '.join(found[:_SHOWN])}): "
        "correct them, give the model more classes, or have the loss leave a value out with ignore_index="
    )


def _place_of(source: ImageSource, value: int) -> tuple[int, int] | None:
    """Row and column of the first pixel of one value."""
    _, height, width = source.shape
    for start in range(0, height, _ROWS):
        rows = Interval(start, min(start + _ROWS, height))
        matches = (source.read(Region(rows, Interval(0, width)))[0] == value).nonzero()
        if len(matches):
            return start + int(matches[0, 0]), int(matches[0, 1])
    return None


def _other_size(error: Exception, image: Image, target: Any) -> DatasetMismatch | None:
    """The error for a mask that differs in size from its image; None if there is none."""
    images, masks = sources_of(image), sources_of(target)
    size = images[0].shape[1:] if images else tuple(image.shape[2:])  # type: ignore[union-attr]
    for mask in masks:
        if mask.shape[1:] != size:
            height, width = mask.shape[1:]
            return DatasetMismatch(
                f"{mask.name} has {height} x {width} pixels, its image {size[0]} x {size[1]}, and the loss "
                f"does not take it: {error}"
            )
    return None
