"""Tables of labels: CSV files with the columns ``image``, ``label`` and, if wanted, ``split``."""

from __future__ import annotations

import csv
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from streamcnn.errors import DatasetMismatch, some

_COLUMNS = ("image", "label")


@dataclass(frozen=True, slots=True)
class Row:
    """What a table says of an image."""

    line: int
    """Of the file, from 1 on."""
    image: str
    label: str
    split: str | None


def read_rows(path: Path) -> Iterator[Row]:
    """The table's rows; no image and no label is blank.

    Raises
    ------
    DatasetMismatch
        If it cannot be read, lacks a column, or has a blank cell.
    """
    try:
        file = path.open(newline="", encoding="utf-8-sig")
    except OSError as error:
        raise DatasetMismatch(f"cannot read the table {path}: {error.strerror}") from error
    with file, _readable(path):
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
            yield Row(table.line_num, cells["image"], cells["label"], cells["split"] or None)


@contextmanager
def _readable(path: Path) -> Iterator[None]:
    """A block in which bytes that are no text, or no table, are an error of the file."""
    try:
        yield
    except (UnicodeDecodeError, csv.Error) as error:
        raise DatasetMismatch(f"cannot read the table {path}: {error}; save it as CSV in UTF-8") from error


def class_names(
    texts: Iterable[str], known: tuple[str, ...] | None = None, *, numbered: bool = False
) -> tuple[str, ...] | None:
    """Names of classes: the known ones, then new ones in alphabetical order; None if labels are numbers.

    Parameters
    ----------
    texts
        All labels of a table.
    known
        Names of the labels 0, 1, …, if there are any already.
    numbered
        Whether there are labels already which are numbers.

    Raises
    ------
    DatasetMismatch
        If some are names and others numbers.
    """
    labels = sorted(set(texts))
    names = [label for label in labels if not label.isdecimal()]
    if known is None and (numbered or not names):
        if names:
            raise DatasetMismatch(
                f"labels {some(names)} are names, those in the store are numbers: give whole numbers"
            )
        return None
    doubtful = [label for label in names if re.fullmatch(r"[-+]?[0-9]*[.,]?[0-9]*", label)]
    if doubtful:
        raise DatasetMismatch(
            f"labels {some(doubtful)} are no whole numbers from 0 on: give such numbers, or names of classes"
        )
    return (*(known or ()), *(label for label in labels if label not in (known or ())))


def label_number(text: str, classes: tuple[str, ...] | None) -> int:
    """The number of a label, which is its place among the names of classes if there are any."""
    return int(text) if classes is None else classes.index(text)
