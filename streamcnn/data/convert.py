"""Write images of any format into a tile store, with labels from a table.

Everything that can be wrong with names, labels and the store is found before the first pixel is read.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path, PurePosixPath
from typing import Any

from streamcnn.data.image_files import FoundImage
from streamcnn.data.label_table import Row, class_names, label_number, read_rows
from streamcnn.data.sources import open_image
from streamcnn.data.tile_store import Head, ImageRecord, TileStoreWriter, check_names, write_image_folder
from streamcnn.data.tile_store.arrays import num_levels
from streamcnn.errors import DatasetMismatch, some

KIND = "images"


def convert(
    images: Sequence[FoundImage],
    out: str | Path,
    *,
    labels: str | Path | None = None,
    split: str = "train",
    level: int = 0,
    channels_last: bool | None = None,
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
    channels_last
        Whether the channels are the last of three axes or the first, of images that do not say it.
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
            numbered = any(record.label is not None for record in writer.records.values())
            texts = [row.label for row in rows.values()]
            writer.set_classes(class_names(texts, writer.head.classes, numbered=numbered))
            yield from _labelled_anew(writer, rows)
        for image in missing:
            row = None if rows is None else rows[image.name]
            source = open_image(image.path, level=level, channels_last=channels_last)
            record = write_image_folder(
                writer.folder,
                source,
                name=image.name,
                split=(None if row is None else row.split) or split,
                label=None if row is None else label_number(row.label, writer.head.classes),
                levels=num_levels(source.shape[1:]),
                origin=_origin(image, level),
                on_shard=on_shard,
            )
            writer.add(record)
            yield record
        writer.finish()


def _labelled_anew(writer: TileStoreWriter, rows: Mapping[str, Row]) -> Iterator[ImageRecord]:
    """Images that the store has, of which the table says something else now; no pixel is written again."""
    for record in [record for record in writer.records.values() if record.name in rows]:
        row = rows[record.name]
        label = label_number(row.label, writer.head.classes)
        changed = replace(record, label=label, split=row.split or record.split)
        if changed != record:
            writer.add(changed)
            yield changed


def _read_table(path: Path, images: Sequence[FoundImage]) -> dict[str, Row]:
    """The table's row for each image, by the image's name in the store."""
    by_path, by_name = _keyed(images, _paths), _keyed(images, _file_names)
    rows: dict[str, Row] = {}
    unknown = []
    for row in read_rows(path):
        text = row.image
        names = by_path.get(text) or by_name.get(text) or []
        if len(names) > 1:
            raise DatasetMismatch(
                f"{path}, line {row.line}: {text!r} may be {some(names)}; give its path below the folder"
            )
        if not names:
            unknown.append(text)
        elif names[0] in rows:
            raise DatasetMismatch(f"{path}, line {row.line}: {text!r} has a row already; keep one of them")
        else:
            rows[names[0]] = row
    missing = [str(image.path) for image in images if image.name not in rows]
    wrong = {"rows without an image": unknown, "images without a row": missing}
    if unknown or missing:
        described = "; ".join(f"{what}: {some(names)}" for what, names in wrong.items() if names)
        raise DatasetMismatch(f"{path} does not fit the images: {described}")
    return rows


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
