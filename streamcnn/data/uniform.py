"""What all images of a data set have to have in common."""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from streamcnn.data.sources import open_image
from streamcnn.errors import DatasetMismatch, some


def check_channels(where: Path, names: Sequence[str], channels: Sequence[int]) -> None:
    """Make sure that images have as many channels as each other.

    Parameters
    ----------
    where
        The data set.
    names, channels
        Of all its images.

    Raises
    ------
    DatasetMismatch
        Naming those that differ from most.
    """
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


def num_channels(path: Path) -> int:
    """How many channels an image has, from its head.

    Raises
    ------
    CorruptImage, DatasetMismatch, MissingExtra
        As from `open_image`, if it cannot be opened.
    """
    if path.is_dir():
        return open_image(path).shape[0]
    found = path.stat()
    return _channels_of_file(path, found.st_size, found.st_mtime_ns)


@functools.lru_cache(maxsize=2**16)
def _channels_of_file(path: Path, size: int, modified_ns: int) -> int:
    """Kept, as a run opens its data set several times; a file that was written again is another one."""
    return open_image(path).shape[0]
