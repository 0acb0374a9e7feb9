"""Conversion of images of any format into a tile store, with labels from a table.

Names, labels and the store are checked before the first pixel is read.
"""

from __future__ import annotations

import posixpath
import unicodedata
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path, PurePosixPath
from typing import Any

from streamcnn.data.fingerprints import fingerprint
from streamcnn.data.image_files import FoundImage
from streamcnn.data.label_table import Row, class_names, label_number, read_rows
from streamcnn.data.sources import DEFAULT_CHOICE, ImageChoice, ImageSource, open_chosen
from streamcnn.data.sources.places import local_path
from streamcnn.data.store_names import older_name, store_name, unlike_name
from streamcnn.data.tile_store import Head, ImageRecord, TileStoreWriter, check_names, write_image_folder
from streamcnn.data.tile_store.arrays import num_levels
from streamcnn.data.tile_store.format import IMAGES
from streamcnn.errors import CorruptImage, DatasetMismatch, some

KIND = "images"
_SPLIT = "train"
"""The split of new images for which nothing else is given."""


def convert(
    images: Sequence[FoundImage],
    out: str | Path,
    *,
    labels: str | Path | None = None,
    split: str | None = None,
    choice: ImageChoice = DEFAULT_CHOICE,
    on_shard: Callable[[int, int], None] | None = None,
) -> Iterator[ImageRecord]:
    """Write ``images`` into the store ``out``; iterate to do the work, image by image.

    An image in the store is left alone if its files, by `fingerprint`, and the choice are unchanged. It is
    written again if files have changed, or its channels are read from another axis; it then keeps its label
    and split unless ``labels`` or ``split`` gives others.
    In memory are a few shards of 16 MiB at a time, and an image that has to be decoded whole.

    Parameters
    ----------
    images
        The images, from ``find_images``.
    out
        Folder of the store; created, extended, or resumed.
    labels
        CSV file with the columns ``image`` (a file name, or a path relative to the given folder), ``label``
        (integers from 0 on, or names of classes) and, if wanted, ``split``. It also applies to images that
        are already in the store.
    split
        Split of images for which the table gives none, also of those in the store. With None, these keep
        their split, and new images are for training.
    choice
        Which image of each file to read, at which resolution, and where its channels are.
    on_shard
        Called with the number of written pixels of the present image, and the number of all its pixels.

    Raises
    ------
    DatasetMismatch
        If the table does not fit the images, the store holds something else under an image's name, such as
        another series or level, or the choice does not apply to an image.
    CorruptImage
        If an image cannot be read, or changes while it is read.
    """
    table = None if labels is None else _read_table(local_path(labels), images)
    with TileStoreWriter(local_path(out), Head(KIND, {})) as writer:
        named = {image.name: _named(image, choice, writer.records) for image in images}
        rows = None if table is None else {named[name].name: row for name, row in table.items()}
        check_names((*writer.records, *(image.name for image in named.values())), in_any_case=True)
        missing = [image for image in named.values() if not _is_current(writer, image, choice)]
        if rows is not None:
            numbered = any(record.label is not None for record in writer.records.values())
            texts = [row.label for row in rows.values()]
            writer.set_classes(class_names(texts, writer.head.classes, numbered=numbered))
        yield from _told_anew(writer, [image.name for image in named.values()], rows or {}, split)
        for image in missing:
            row = None if rows is None else rows[image.name]
            source = open_chosen(image.path, choice)
            record = _write(writer, image, source, row, split, choice, on_shard)
            writer.add(record)
            yield record
        writer.finish()


def _write(
    writer: TileStoreWriter,
    image: FoundImage,
    source: ImageSource,
    row: Row | None,
    split: str | None,
    choice: ImageChoice,
    on_shard: Callable[[int, int], None] | None,
) -> ImageRecord:
    """Write an image, replacing an older one in the store; a table's row applies either way."""
    before = writer.records.get(image.name)
    origin = origin_of(image, choice)

    def on_read() -> None:
        if origin_of(image, choice) != origin:
            raise CorruptImage(f"{image.path} was changed while it was read: convert it again")
        if before is not None:
            # From here on the store's files do not match this record, however the process ends.
            writer.add(replace(before, origin={**before.origin, "fingerprint": ""}))

    label = None if before is None else before.label
    return write_image_folder(
        writer.folder,
        source,
        name=image.name,
        split=(None if row is None else row.split) or split or (_SPLIT if before is None else before.split),
        label=label if row is None else label_number(row.label, writer.head.classes),
        levels=num_levels(source.shape[1:]),
        origin=origin,
        on_shard=on_shard,
        on_read=on_read,
    )


def _told_anew(
    writer: TileStoreWriter, names: Sequence[str], rows: Mapping[str, Row], split: str | None
) -> Iterator[ImageRecord]:
    """Update images in the store whose label or split changes, without writing pixels again."""
    for record in [record for name in names if (record := writer.records.get(name)) is not None]:
        row = rows.get(record.name)
        label = record.label if row is None else label_number(row.label, writer.head.classes)
        said = split if row is None else row.split or split
        changed = replace(record, label=label, split=said or record.split)
        if changed != record:
            writer.add(changed)
            yield changed


def _read_table(path: Path, images: Sequence[FoundImage]) -> dict[str, Row]:
    """The table's row for each image, by the image's name in the store."""
    ways = [_keyed(images, _paths), _keyed(images, _file_names)]
    # Accents in names of files may be encoded in either way, depending on the system.
    ways += [{nfc: names for key, names in keys.items() if (nfc := _nfc(key)) not in keys} for keys in ways]
    rows: dict[str, Row] = {}
    unknown = []
    for row in read_rows(path):
        text = row.image
        names = next((keys[way] for way in _spellings(path, text) for keys in ways if way in keys), [])
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
        raise DatasetMismatch(
            f"{path} does not fit the images: {described}; give all images that it names, each in one "
            "row, or take rows out"
        )
    return rows


def _spellings(table: Path, text: str) -> Iterator[str]:
    """Spellings of a path that a table names: as given, normalised, or relative to the table's folder."""
    yield text
    slashed = text.replace("\\", "/")
    yield posixpath.normpath(slashed)
    yield str((table.parent / slashed).resolve())
    yield _nfc(slashed)


def _nfc(text: str) -> str:
    return unicodedata.normalize("NFC", text)


def _keyed(images: Sequence[FoundImage], keys: Callable[[FoundImage], set[str]]) -> dict[str, list[str]]:
    """Names of the images that have each key."""
    found: dict[str, list[str]] = {}
    for image in images:
        for key in keys(image):
            found.setdefault(key, []).append(image.name)
    return found


def _paths(image: FoundImage) -> set[str]:
    paths = (image.path, *image.others)
    return {
        image.relative,
        PurePosixPath(image.relative).with_suffix("").as_posix(),
        *map(str, paths),
        *(str(path.resolve()) for path in paths),
    }


def _file_names(image: FoundImage) -> set[str]:
    return {image.path.name, image.path.stem}


def origin_of(image: FoundImage, choice: ImageChoice) -> dict[str, Any]:
    """The origin of an image: its path and choice, and a fingerprint that shows changes."""
    known = fingerprint([image.path, *image.others])
    place = {"path": str(image.path.resolve()), "level": choice.level, "fingerprint": known}
    return {**place, **choice.made}


def _named(image: FoundImage, choice: ImageChoice, records: Mapping[str, ImageRecord]) -> FoundImage:
    """``image`` with the name under which the store has it, or will have it.

    Raises
    ------
    DatasetMismatch
        If the store has another image of that name.
    """
    wanted = (str(image.path.resolve()), choice.series, choice.level)
    longer, unlike = store_name(image.relative, ending=True), unlike_name(image.relative)
    before = (store_name(image.relative), older_name(image.relative))
    for name in (image.name, *before, longer, unlike):
        record = records.get(name)
        if record is not None and _picture(record) == wanted:
            return replace(image, name=name)
    record = records.get(image.name)
    if record is None:
        is_alike = image.name.casefold() in {name.casefold() for name in records}
        return replace(image, name=unlike) if is_alike else image
    if Path(str(record.origin.get("path"))).name != image.path.name and longer not in records:
        return replace(image, name=longer)
    path, series, level = _picture(record)
    raise DatasetMismatch(
        f"the store has an image {image.name!r} already, {_described(series, level)} of {path}; "
        f"{_described(choice.series, choice.level)} of {image.path} is another one: rename it or write to "
        "another store"
    )


def _picture(record: ImageRecord) -> tuple[Any, Any, Any]:
    """The file, series and level from which an image of the store was read."""
    return tuple(record.origin.get(name) for name in ("path", "series", "level"))  # type: ignore[return-value]


def _described(series: Any, level: Any) -> str:
    return f"level {level}" if series is None else f"series {series}, level {level}"


def _is_current(writer: TileStoreWriter, image: FoundImage, choice: ImageChoice) -> bool:
    """Whether the store has an image with its present files and the requested choice."""
    record = writer.records.get(image.name)
    if record is None or not (writer.folder / IMAGES / image.name / "zarr.json").is_file():
        return False
    if "fingerprint" in record.origin:
        return dict(record.origin) == origin_of(image, choice)
    # Older stores record files' times, and neither folders nor channels.
    found = image.path.stat()
    known = record.origin.get("nbytes"), record.origin.get("modified")
    is_same = known == (found.st_size, found.st_mtime_ns) and image.path.is_file()
    return is_same and choice.channels_last is None
