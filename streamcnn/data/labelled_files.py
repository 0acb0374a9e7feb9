"""Image files with labels and splits, from a table or from the names of folders."""

from __future__ import annotations

import unicodedata
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from streamcnn.data.class_folders import classes_in_folders
from streamcnn.data.image_files import find_images
from streamcnn.data.label_table import read_rows
from streamcnn.data.scans import Scan, scan_of
from streamcnn.data.sources import is_image
from streamcnn.data.sources.files import is_there
from streamcnn.data.sources.places import looked_at, resolved_path
from streamcnn.errors import CorruptImage, DatasetMismatch, some

UNSPLIT = "train"
"""The split of images for which none is given."""


@dataclass(frozen=True, slots=True)
class LabelledFile:
    """An image file with its label, split and inputs."""

    name: str
    path: Path
    label: str
    split: str
    inputs: tuple[float, ...] = ()
    others: tuple[Path, ...] = ()
    """The further files of an image that lies in several."""


def files_of_table(path: Path, inputs: Sequence[str], *, labelled: bool = True) -> list[LabelledFile]:
    """The images that a table names, in the table's order.

    Raises
    ------
    DatasetMismatch
        If the table is invalid, names something that is not an image, or one image in several rows.
    """
    rows = read_rows(path, inputs, labelled=labelled)
    if not rows:
        raise DatasetMismatch(f"{path} has no rows: give one for each image")
    paths = [path_in_table(path, row.image, row.line) for row in rows]
    missing = [at for at, file in enumerate(paths) if not is_there(file) or not is_image(file)]
    if missing:
        raise DatasetMismatch(
            f"{path} names {some([str(paths[at]) for at in missing])}, where there is no image (line "
            f"{rows[missing[0]].line}): give paths from the table's folder"
        )
    scans = distinct_scans(path, [(row.line, row.image) for row in rows], paths)
    return [
        LabelledFile(row.image, file, row.label, row.split or UNSPLIT, row.inputs, scan.files_beside(file))
        for row, file, scan in zip(rows, paths, scans, strict=True)
    ]


def path_in_table(table: Path, text: str, line: int) -> Path:
    """The path that a line of a table names, which may have been written on Windows or macOS.

    Raises
    ------
    DatasetMismatch
        If the path is not on this machine, or is not a possible path.
    """
    texts = [text, text.replace("\\", "/")]
    texts += [unicodedata.normalize(form, each) for each in texts for form in ("NFC", "NFD")]
    try:
        paths = [table.parent / resolved_path(each) for each in texts]
        # Failures of other spellings are ignored: one may be too long though the right one is not.
        looked_at(paths[0])
    except CorruptImage as error:
        raise DatasetMismatch(f"{table}, line {line}: {error}") from None
    return next((path for path in paths if is_there(path)), paths[0])


def distinct_scans(table: Path, rows: Sequence[tuple[int, str]], paths: Sequence[Path]) -> list[Scan]:
    """The scan that each row of a table names; no two rows may name the same image.

    Parameters
    ----------
    table
        Path of the table, for messages.
    rows
        The line of each row, and its text for the image.
    paths
        Paths of these images.

    Raises
    ------
    DatasetMismatch
        If two rows name one image; the text gives their lines.
    """
    _refuse_names_twice(table, rows)
    scans = [scan_of(path) for path in paths]
    known: dict[str, tuple[int, str]] = {}
    for (line, name), scan in zip(rows, scans, strict=True):
        first_line, first_name = known.setdefault(scan.key, (line, name))
        if first_line != line:
            raise DatasetMismatch(
                f"{table}, line {line}: {name!r} is the same image as line {first_line}, {first_name!r}; "
                "keep one row of each"
            )
    return scans


def _refuse_names_twice(table: Path, rows: Sequence[tuple[int, str]]) -> None:
    counts = Counter(name for _, name in rows)
    twice = [name for name, count in counts.items() if count > 1]
    if twice:
        lines = ", ".join(str(line) for line, name in rows if name == twice[0])
        raise DatasetMismatch(f"{table} has {some(twice)} in several rows (lines {lines}); keep one of each")


def require_data(path: Path, allowed: str) -> None:
    """Make sure that there is something at the path of a data set; ``allowed`` says what may be.

    Raises
    ------
    DatasetMismatch
        If there is nothing.
    """
    if not is_there(path):
        raise DatasetMismatch(f"there is nothing at {path}: allowed are {allowed}; give the path of one")


def files_in_folders(folder: Path, series: int | None = None) -> list[LabelledFile]:
    """The images in one folder for each class, sorted by name; ``series`` as for `find_images`.

    Raises
    ------
    CorruptImage, DatasetMismatch
        As from `find_images` and `classes_in_folders`.
    """
    images = find_images([folder], series)
    found = classes_in_folders(folder, [image.relative for image in images])
    return [
        LabelledFile(
            image.relative,
            image.path,
            unicodedata.normalize("NFC", label),
            split or UNSPLIT,
            others=image.others,
        )
        for image, (label, split) in zip(images, found, strict=True)
    ]
