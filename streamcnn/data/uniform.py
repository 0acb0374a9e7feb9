"""Properties that all images of a data set must share: number of channels, dtype and range of values."""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from streamcnn.data.sources import DEFAULT_CHOICE, ImageChoice, ImageSource, open_chosen
from streamcnn.errors import DatasetMismatch, some
from streamcnn.support.units import plural


@dataclass(frozen=True, slots=True)
class ImageKind:
    """The properties that an image shares with the others of its data set."""

    channels: int
    dtype: str | None
    """NumPy's name of the pixels' dtype; None if it was not stored."""
    largest: int | None
    """Largest possible value of a pixel; None for floats."""

    @classmethod
    def of(cls, source: ImageSource) -> ImageKind:
        """The kind of an open image."""
        return cls(source.shape[0], str(source.dtype).removeprefix("torch."), source.largest)

    @property
    def values(self) -> str:
        """Dtype and range as text for messages."""
        return str(self.dtype) if self.largest is None else f"{self.dtype} up to {self.largest}"

    @property
    def described(self) -> str:
        """Channels, dtype and range as text for messages."""
        return f"{plural(self.channels, 'channel')} of {self.values}"

    def has_values_of(self, other: ImageKind) -> bool:
        """Whether equal values mean equal brightness; for floats they do, as nothing divides them."""
        if None in (self.dtype, other.dtype):
            return True
        are_floats = [str(each.dtype).rstrip("0123456789") in ("float", "bfloat") for each in (self, other)]
        return all(are_floats) or self.values == other.values


def check_alike(where: Path, names: Sequence[str], kinds: Sequence[ImageKind]) -> None:
    """Make sure that all images have the same number of channels, dtype and range.

    Parameters
    ----------
    where
        Path of the data set.
    names, kinds
        Names and kinds of all its images.

    Raises
    ------
    DatasetMismatch
        If they differ; the text names images that differ from most others.
    """
    _check_channels(where, names, [kind.channels for kind in kinds])
    counts = Counter(kind.values for kind in kinds)
    if len(counts) < 2:
        return
    usual, _ = counts.most_common(1)[0]
    odd = [(name, kind.values) for name, kind in zip(names, kinds, strict=True) if kind.values != usual]
    example = next(name for name, kind in zip(names, kinds, strict=True) if kind.values == usual)
    others = f" ({len(odd)} of {len(kinds)} images differ from most)" if len(kinds) > 2 else ""
    raise DatasetMismatch(
        f"{where} mixes ranges of values: {example} holds {usual}, {odd[0][0]} holds {odd[0][1]}{others}: "
        "allowed are one type and one range in a data set; write all images in one, or take some out"
    )


def _check_channels(where: Path, names: Sequence[str], channels: Sequence[int]) -> None:
    counts = Counter(channels)
    if len(counts) < 2:
        return
    usual, _ = counts.most_common(1)[0]
    odd = [f"{name} ({count})" for name, count in zip(names, channels, strict=True) if count != usual]
    example = names[channels.index(usual)]
    raise DatasetMismatch(
        f"{where} mixes numbers of channels: {counts[usual]} of its images have {usual}, such as {example}; "
        f"others have not: {some(odd)}; convert them, or take them out"
    )


def kind_of_file(path: Path, choice: ImageChoice = DEFAULT_CHOICE) -> ImageKind:
    """The kind of an image, from its head.

    Raises
    ------
    CorruptImage, DatasetMismatch, MissingExtra
        As from `open_image`, if it cannot be opened.
    """
    return _head_of(path, choice)[0]


def size_of_file(path: Path, choice: ImageChoice = DEFAULT_CHOICE) -> tuple[int, int]:
    """Height and width of an image, from its head; errors are those of `kind_of_file`."""
    return _head_of(path, choice)[1]


_Head = tuple[ImageKind, tuple[int, int]]


def _head_of(path: Path, choice: ImageChoice) -> _Head:
    if path.is_dir():
        return _head(path, choice)
    found = path.stat()
    return _head_of_file(path, choice, found.st_size, found.st_mtime_ns)


@functools.lru_cache(maxsize=2**16)
def _head_of_file(path: Path, choice: ImageChoice, size: int, modified_ns: int) -> _Head:
    """Read a file's head; cached by size and time, as a run opens its data set several times."""
    return _head(path, choice)


def _head(path: Path, choice: ImageChoice) -> _Head:
    source = open_chosen(path, choice)
    _, height, width = source.shape
    return ImageKind.of(source), (height, width)
