"""Write images of any format into a tile store, with labels from a table.

Everything that can be wrong with names, labels and the store is found before the first pixel is read.
"""

from __future__ import annotations

import csv
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Any

from streamcnn.data.sources import is_image, open_image
from streamcnn.data.tile_store import (
    Head,
    ImageRecord,
    TileStoreWriter,
    check_names,
    is_tile_store,
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
    relative: str
    """Path below the folder that was given, with its ending."""


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
        ``label`` (whole numbers from 0 on, or names of classes) and, if wanted, ``split``. Images that the
        store has already take what it says.
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
    with TileStoreWriter(out, Head(KIND, {})) as writer:
        check_names((*writer.records, *(image.name for image in images)))
        missing = [image for image in images if _is_missing(image, level, writer.records)]
        if rows is not None:
            writer.set_classes(_classes(writer.head.classes, writer.records.values(), rows))
            yield from _labelled_anew(writer, rows)
        for image in missing:
            row = None if rows is None else rows[image.name]
            source = open_image(image.path, level=level)
            record = write_image_folder(
                writer.folder,
                source,
                name=image.name,
                split=(None if row is None else row.split) or split,
                label=None if row is None else _label(row.label, writer.head.classes),
                levels=num_levels(source.shape[1:]),
                origin=_origin(image, level),
                on_shard=on_shard,
            )
            writer.add(record)
            yield record
        writer.finish()


def _labelled_anew(writer: TileStoreWriter, rows: Mapping[str, _Row]) -> Iterator[ImageRecord]:
    """Images that the store has, of which the table says something else now; no pixel is written again."""
    for record in [record for record in writer.records.values() if record.name in rows]:
        row = rows[record.name]
        label = _label(row.label, writer.head.classes)
        changed = replace(record, label=label, split=row.split or record.split)
        if changed != record:
            writer.add(changed)
            yield changed


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


def _read_table(path: Path, images: Sequence[FoundImage]) -> dict[str, _Row]:
    """The table's row for each image, by the image's name in the store."""
    by_path, by_name = _keyed(images, _paths), _keyed(images, _file_names)
    rows: dict[str, _Row] = {}
    unknown = []
    for number, cells in _cells(path):
        text = cells["image"]
        names = by_path.get(text) or by_name.get(text) or []
        if len(names) > 1:
            raise DatasetMismatch(
                f"{path}, line {number}: {text!r} may be {_some(names)}; give its path below the folder"
            )
        if not names:
            unknown.append(text)
        elif names[0] in rows:
            raise DatasetMismatch(f"{path}, line {number}: {text!r} has a row already; keep one of them")
        else:
            rows[names[0]] = _Row(cells["label"], cells["split"] or None)
    missing = [str(image.path) for image in images if image.name not in rows]
    wrong = {"rows without an image": unknown, "images without a row": missing}
    if unknown or missing:
        described = "; ".join(f"{what}: {_some(names)}" for what, names in wrong.items() if names)
        raise DatasetMismatch(f"{path} does not fit the images: {described}")
    return rows


def _cells(path: Path) -> Iterator[tuple[int, dict[str, str]]]:
    """The table's rows with their line numbers, every cell that is needed there and not blank."""
    try:
        file = path.open(newline="", encoding="utf-8-sig")
    except OSError as error:
        raise DatasetMismatch(f"cannot read the table {path}: {error.strerror}") from error
    with file:
        table = csv.DictReader(file)
        if not set(_COLUMNS) <= set(table.fieldnames or ()):
            raise DatasetMismatch(
                f"{path} has the columns {table.fieldnames}: needed are image and label, and split if wanted"
            )
        for row in table:
            cells = {column: (row.get(column) or "").strip() for column in (*_COLUMNS, "split")}
            blank = [column for column in _COLUMNS if not cells[column]]
            if blank:
                raise DatasetMismatch(f"{path}, line {table.line_num}: {blank[0]} is blank; fill it in")
            yield table.line_num, cells


def _keyed(images: Sequence[FoundImage], keys: Callable[[FoundImage], set[str]]) -> dict[str, list[str]]:
    """Names of the images that have each key."""
    found: dict[str, list[str]] = {}
    for image in images:
        for key in keys(image):
            found.setdefault(key, []).append(image.name)
    return found


def _paths(image: FoundImage) -> set[str]:
    return {image.relative, PurePosixPath(image.relative).with_suffix("").as_posix(), str(image.path)}


def _file_names(image: FoundImage) -> set[str]:
    return {image.path.name, image.path.stem}


def _some(names: Sequence[str]) -> str:
    shown = ", ".join(map(repr, names[:5]))
    return shown if len(names) <= 5 else f"{shown} and {len(names) - 5} more"


def _classes(
    known: tuple[str, ...] | None, records: Iterable[ImageRecord], rows: Mapping[str, _Row]
) -> tuple[str, ...] | None:
    """Names of classes: those that the store has, then new ones in alphabetical order; None for numbers."""
    labels = sorted({row.label for row in rows.values()})
    names = [label for label in labels if not label.isdecimal()]
    numbers = known is None and any(record.label is not None for record in records)
    if known is None and (numbers or not names):
        if names:
            raise DatasetMismatch(
                f"labels {_some(names)} are names, those in the store are numbers: give whole numbers"
            )
        return None
    doubtful = [label for label in names if re.fullmatch(r"[-+]?[0-9]*[.,]?[0-9]*", label)]
    if doubtful:
        raise DatasetMismatch(
            f"labels {_some(doubtful)} are no whole numbers from 0 on: give such numbers, or names of classes"
        )
    return (*(known or ()), *(label for label in labels if label not in (known or ())))


def _label(text: str, classes: tuple[str, ...] | None) -> int:
    return int(text) if classes is None else classes.index(text)


def _origin(image: FoundImage, level: int) -> dict[str, Any]:
    """Where an image came from, and what tells whether it is still the same."""
    found = image.path.stat()
    origin: dict[str, Any] = {"path": str(image.path.resolve()), "level": level}
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
            f"the store has an image {image.name!r} already, level {record.origin.get('level')} of "
            f"{record.origin.get('path')}; level {level} of {image.path} is another one, or was changed: "
            "rename it or write to another store"
        )
    return record is None
