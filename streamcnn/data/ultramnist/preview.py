"""A contact sheet of an UltraMNIST set: images by class, with the digits' boxes on request."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from streamcnn.data.dataset import of_split
from streamcnn.data.thumbnails import thumbnail
from streamcnn.data.tile_store import ImageRecord, TileStore
from streamcnn.errors import DatasetMismatch
from streamcnn.support.atomic import replace_file
from streamcnn.support.disk import writing
from streamcnn.support.extras import require

_COLUMNS = 7
_GAP = 8
_CAPTION = 20
_PAPER = (255, 255, 255)
_INK = (0, 0, 0)


def write_contact_sheet(
    store: TileStore, path: str | Path, *, split: str = "train", edge: int = 320, boxes: bool = False
) -> int:
    """Write a picture with one image of each class in the split; return the number of classes.

    Parameters
    ----------
    path
        File to write; an existing one is replaced, completely or not at all.
    split
        Name of the split in any spelling, as for ``TileDataset``.
    edge
        Largest edge of each image on the sheet in pixels; images are downsampled by averaging.
    boxes
        Whether to mark each digit and write its value beside it.

    Raises
    ------
    DatasetMismatch
        If the split has no labelled images, or boxes are requested and unknown.
    ValueError
        If the path's ending is not that of a picture format.
    MissingExtra
        If Pillow is not installed.
    CannotWrite
        If there is no room, or the folder may not be written to.
    """
    pillow = require("PIL.Image", extra="plots")
    require_picture(path)
    records = _one_per_class(store, split)
    pictures = [_thumbnail(store, record, edge, boxes=boxes) for record in records]
    sheet = _sheet(pictures, [f"{record.label}   {record.name}" for record in records], edge)
    encoded = io.BytesIO()
    sheet.save(encoded, format=pillow.registered_extensions()[Path(path).suffix.lower()])
    with writing(Path(path)):
        replace_file(Path(path), encoded.getvalue())
    return len(records)


def _sheet(pictures: Sequence[Any], captions: Sequence[str], edge: int) -> Any:
    """Arrange Pillow pictures, of ``edge`` pixels at most, in rows under their captions."""
    pillow, drawing = (require(f"PIL.{name}", extra="plots") for name in ("Image", "ImageDraw"))
    font = _CAPTION - 5
    measure = drawing.Draw(pillow.new("RGB", (1, 1))).textlength
    widest, highest = (max(extents) for extents in zip(*(each.size for each in pictures), strict=True))
    # Images may be smaller than the edge, and narrower than their captions.
    written = max(math.ceil(measure(caption, font_size=font)) for caption in captions)
    cell = (min(edge, max(widest, written)) + _GAP, highest + _GAP + _CAPTION)
    columns = min(_COLUMNS, len(pictures))
    rows = -(-len(pictures) // _COLUMNS)
    sheet = pillow.new("RGB", (columns * cell[0] + _GAP, rows * cell[1] + _GAP), _PAPER)
    draw = drawing.Draw(sheet)
    for position, (picture, caption) in enumerate(zip(pictures, captions, strict=True)):
        row, column = divmod(position, _COLUMNS)
        left, top = _GAP + column * cell[0], _GAP + row * cell[1]
        sheet.paste(picture, (left, top + _CAPTION))
        draw.text((left, top), caption, fill=_INK, font_size=font)
    return sheet


def require_picture(path: str | Path) -> None:
    """Make sure that a path has the ending of a picture format that can be written.

    Raises
    ------
    ValueError
        If it does not.
    """
    pillow = require("PIL.Image", extra="plots")
    ending = Path(path).suffix.lower()
    if pillow.registered_extensions().get(ending) not in pillow.SAVE:
        raise ValueError(
            f"{path} has the ending {ending!r}: allowed are those of pictures, such as .png or .jpg"
        )


def _one_per_class(store: TileStore, split: str) -> list[ImageRecord]:
    by_label: dict[int, ImageRecord] = {}
    for record in of_split(store, split):
        if record.label is not None:
            by_label.setdefault(record.label, record)
    if not by_label:
        known = sorted({record.split for record in store.records if record.label is not None})
        raise DatasetMismatch(
            f"{store.folder} has no labelled image of split {split!r}: it has {known} with labels; take one "
            "of these, or give labels with `streamcnn convert --labels`"
        )
    return [by_label[label] for label in sorted(by_label)]


def _thumbnail(store: TileStore, record: ImageRecord, edge: int, *, boxes: bool) -> Any:
    if boxes and record.truth is None:
        raise DatasetMismatch(f"{store.folder} does not know where the digits are: leave out the boxes")
    return thumbnail(store.source(record), edge, record.truth if boxes else ())
