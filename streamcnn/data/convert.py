"""Write images of any format into a tile store, with labels from a table.

Everything that can be wrong with names, labels and the store is found before the first pixel is read.
"""

from __future__ import annotations

import csv
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from streamcnn.data.sources import is_image, open_image
from streamcnn.data.tile_store import (
    Head,
    ImageRecord,
    TileStoreWriter,
    existing_head,
    write_image_folder,
)
from streamcnn.data.tile_store.arrays import num_levels
from streamcnn.errors import CorruptImage, DatasetMismatch

KIND = "images"
_COLUMNS = ("image", "label")


@dataclass(frozen=True, slots=True)
class FoundImage:
    """An image file and the name that it will have in the store."""

    name: str
    path: Path


@dataclass(frozen=True, slots=True)
class _Row:
    """What the table says of an image."""

    label: str
    split: str | None


def find_images(paths: Sequence[Path]) -> list[FoundImage]:
    """All images among ``paths`` and in folders below them, in the order of their names.

    The name in the store is the path below the folder that was given, without its ending.

    Raises
    ------
    CorruptImage
        If a path does not exist or holds no image.
    DatasetMismatch
        If two images would have one name.
    """
    found: dict[str, FoundImage] = {}
    for given in paths:
        for path in _images_at(given):
            relative = path.relative_to(given) if path != given else Path(path.name)
            image = FoundImage(_store_name(relative), path)
            other = found.setdefault(image.name, image)
            if other.path != path:
                raise DatasetMismatch(
                    f"{other.path} and {path} would both be {image.name!r} in the store: give them in "
                    "folders of their own, or rename one"
                )
    return [found[name] for name in sorted(found)]


def convert(
    images: Sequence[FoundImage],
    out: str | Path,
    *,
    labels: str | Path | None = None,
    split: str = "train",
    level: int = 0,
    on_shard: Callable[[int, int], None] | None = None,
) -> Iterator[ImageRecord]:
    """Write ``images`` into the store ``out``; iterate to do the work, image by image.

    Holds some shards of 16 MiB at a time, and an image that has to be decoded whole.

    Parameters
    ----------
    images
        From ``find_images``.
    out
        Folder of the store; made, added to, or gone on with.
    labels
        CSV file with the columns ``image`` (a file name, or its path below the folder that was given),
        ``label`` (whole numbers, or names of classes) and, if wanted, ``split``.
    split
        Of images of which the table says none.
    level
        Resolution to take from a pyramid; 0 is full.
    on_shard
        Told the pixels of the present image that are written, and all of them.

    Raises
    ------
    DatasetMismatch
        If the table does not fit the images, or the store holds something else.
    CorruptImage
        If an image cannot be read.
    """
    rows = None if labels is None else _read_table(Path(labels), images)
    classes = _classes(existing_head(out), rows)
    with TileStoreWriter(out, Head(KIND, {}, classes)) as writer:
        missing = [image for image in images if _is_missing(image, level, writer.records)]
        for image in missing:
            row = None if rows is None else rows[image.name]
            source = open_image(image.path, level=level)
            record = write_image_folder(
                writer.folder,
                source,
                name=image.name,
                split=(row.split if row is not None else None) or split,
                label=None if row is None else _label(row.label, classes),
                levels=num_levels(source.shape[1:]),
                origin=_origin(image, level),
                on_shard=on_shard,
            )
            writer.add(record)
            yield record
        writer.finish()


def _images_at(given: Path) -> list[Path]:
    """The image at a path, or all of them below it."""
    if not given.exists():
        raise CorruptImage(f"there is nothing at {given}: give images or folders of images")
    if is_image(given):
        return [given]
    found = _images_below(given) if given.is_dir() else []
    if not found:
        raise CorruptImage(f"no image is known at {given}: see docs/images.md for the formats")
    return found


def _images_below(folder: Path) -> list[Path]:
    """Images in a folder and its folders; one that is an image itself is not searched."""
    found: list[Path] = []
    for path in sorted(folder.iterdir()):
        if path.name.startswith("."):
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


def _read_table(path: Path, images: Sequence[FoundImage]) -> dict[str, _Row]:
    """The table's row for each image, by the image's name in the store."""
    by_key = {key: image.name for image in images for key in _keys(image)}
    rows: dict[str, _Row] = {}
    unknown = []
    with path.open(newline="") as file:
        table = csv.DictReader(file)
        if not set(_COLUMNS) <= set(table.fieldnames or ()):
            raise DatasetMismatch(
                f"{path} has the columns {table.fieldnames}: needed are image and label, and split if wanted"
            )
        for row in table:
            name = by_key.get(row["image"])
            if name is None:
                unknown.append(row["image"])
            else:
                rows[name] = _Row(row["label"].strip(), (row.get("split") or "").strip() or None)
    missing = [image.path.name for image in images if image.name not in rows]
    if unknown or missing:
        raise DatasetMismatch(
            f"{path} does not fit the images: "
            + "; ".join(
                f"{what}: {_some(names)}"
                for what, names in (("rows without an image", unknown), ("images without a row", missing))
                if names
            )
        )
    return rows


def _keys(image: FoundImage) -> set[str]:
    """What a table may call an image."""
    return {image.name, image.path.name, str(image.path), image.name + image.path.suffix}


def _some(names: Sequence[str]) -> str:
    shown = ", ".join(map(repr, names[:5]))
    return shown if len(names) <= 5 else f"{shown} and {len(names) - 5} more"


def _classes(head: Head | None, rows: Mapping[str, _Row] | None) -> tuple[str, ...] | None:
    """Names of classes: those that the store has, then new ones in alphabetical order; None for numbers."""
    known = None if head is None else head.classes
    if rows is None:
        return known
    labels = sorted({row.label for row in rows.values()})
    if known is None and (head is not None or all(map(str.isdecimal, labels))):
        wrong = [label for label in labels if not label.isdecimal()]
        if wrong:
            raise DatasetMismatch(
                f"labels {_some(wrong)} are names, those in the store are numbers: give whole numbers"
            )
        return None
    return (*(known or ()), *(label for label in labels if label not in (known or ())))


def _label(text: str, classes: tuple[str, ...] | None) -> int:
    return int(text) if classes is None else classes.index(text)


def _origin(image: FoundImage, level: int) -> dict[str, Any]:
    """Where an image came from, and what tells whether it is still the same."""
    found = image.path.stat()
    origin: dict[str, Any] = {"path": str(image.path), "level": level}
    return (
        origin if image.path.is_dir() else {**origin, "nbytes": found.st_size, "modified": found.st_mtime_ns}
    )


def _is_missing(image: FoundImage, level: int, records: Mapping[str, ImageRecord]) -> bool:
    """Whether an image is still to be written.

    Raises
    ------
    DatasetMismatch
        If the store has another image of that name.
    """
    record = records.get(image.name)
    if record is not None and dict(record.origin) != _origin(image, level):
        raise DatasetMismatch(
            f"the store has an image {image.name!r} already, from {record.origin.get('path')}; {image.path} "
            "is another file or was changed: rename it or write to another store"
        )
    return record is None
