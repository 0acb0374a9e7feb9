"""Image files below folders, and the names that they go by."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from streamcnn.data.sources import is_image
from streamcnn.data.tile_store import check_names, is_tile_store
from streamcnn.errors import CorruptImage, DatasetMismatch


@dataclass(frozen=True, slots=True)
class FoundImage:
    """An image file and the name that it will have in the store."""

    name: str
    path: Path
    relative: str
    """Path below the folder that was given, with its ending."""


def find_images(paths: Sequence[Path]) -> list[FoundImage]:
    """All images among ``paths`` and in folders below them, in the order of their names.

    The name in the store is the path below the folder that was given, without its ending.

    Raises
    ------
    CorruptImage
        If a path does not exist or holds no image.
    DatasetMismatch
        If two images would have one name, or one's name would be a folder of the other's.
    """
    found: dict[str, FoundImage] = {}
    for given in paths:
        for path in _images_at(given):
            relative = path.relative_to(given) if path != given else Path(path.name)
            image = FoundImage(_store_name(relative), path, relative.as_posix())
            other = found.setdefault(image.name, image)
            if other.path != path:
                raise DatasetMismatch(
                    f"{other.path} and {path} would both be {image.name!r} in the store: give them in "
                    "folders of their own, or rename one"
                )
    check_names(found)
    return [found[name] for name in sorted(found)]


def _images_at(given: Path) -> list[Path]:
    """The image at a path, or all of them below it."""
    if not given.exists():
        raise CorruptImage(f"there is nothing at {given}: give images or folders of images")
    if is_tile_store(given):
        raise DatasetMismatch(f"{given} is a tile store already: give the images that it was made from")
    if is_image(given):
        return [given]
    found = _images_below(given) if given.is_dir() else []
    if not found:
        raise CorruptImage(f"no image is known at {given}: see docs/images.md for the formats")
    return found


def _images_below(folder: Path) -> list[Path]:
    """Images in a folder and its folders; not in one that is an image itself, or a tile store."""
    found: list[Path] = []
    for path in sorted(folder.iterdir()):
        if path.name.startswith(".") or is_tile_store(path):
            continue
        if is_image(path):
            found.append(path)
        elif path.is_dir():
            found += _images_below(path)
    return found


def _store_name(relative: Path) -> str:
    """A name of the characters that every system has in folders' names."""
    name = relative.with_suffix("").as_posix()
    return "/".join(re.sub(r"^[^A-Za-z0-9_]|[^A-Za-z0-9_.() -]", "_", part) for part in name.split("/"))
