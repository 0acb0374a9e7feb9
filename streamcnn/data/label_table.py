"""Tables of labels: CSV files with the columns ``image``, ``label`` and, if wanted, ``split`` and numbers."""

from __future__ import annotations

import csv
import math
import re
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from streamcnn.errors import DatasetMismatch, some

_COLUMNS = ("image", "label")
_LARGEST = 3.4e38
"""Of the numbers that float32 has."""


@dataclass(frozen=True, slots=True)
class Row:
    """What a table says of an image."""

    line: int
    """Of the file, from 1 on."""
    image: str
    label: str
    """Blank where none is asked for."""
    split: str | None
    inputs: tuple[float, ...]
    """Numbers of the columns that were asked for, in that order."""


def read_rows(path: Path, inputs: Sequence[str] = (), *, labelled: bool = True) -> Iterator[Row]:
    """The table's rows; no image and no label is blank.

    Parameters
    ----------
    path
        Of the CSV file.
    inputs
        Columns of numbers that are wanted too.
    labelled
        Whether there have to be labels.

    Raises
    ------
    DatasetMismatch
        If it cannot be read, lacks a column, has a blank cell, or no number where one is wanted.
    ValueError
        If ``inputs`` name a column twice, or one that is no input.
    """
    check_inputs(inputs)
    needed = _COLUMNS if labelled else _COLUMNS[:1]
    try:
        file = path.open(newline="", encoding="utf-8-sig")
    except OSError as error:
        raise DatasetMismatch(f"cannot read the table {path}: {error.strerror}") from error
    with file, _readable(path):
        table = csv.DictReader(file)
        present = table.fieldnames or ()
        if not set(needed) <= set(present):
            raise DatasetMismatch(
                f"{path} has the columns {table.fieldnames}: needed are {' and '.join(needed)}, and split if "
                "wanted"
            )
        _require_inputs(path, inputs, present)
        for row in table:
            cells = {column: (row.get(column) or "").strip() for column in (*_COLUMNS, "split", *inputs)}
            blank = [column for column in (*needed, *inputs) if not cells[column]]
            where = f"{path}, line {table.line_num}"
            if blank:
                raise DatasetMismatch(f"{where}: {blank[0]} is blank; fill it in")
            numbers = tuple(_number(cells[column], f"{where}: {column}") for column in inputs)
            yield Row(table.line_num, cells["image"], cells["label"], cells["split"] or None, numbers)


def check_inputs(inputs: Sequence[str]) -> None:
    """Make sure that each of the columns may be an input.

    Raises
    ------
    ValueError
        If not.
    """
    taken = [column for column in (*_COLUMNS, "split") if column in inputs]
    twice = sorted({column for column in inputs if inputs.count(column) > 1})
    if isinstance(inputs, str) or taken or twice or not all(inputs):
        raise ValueError(
            f"inputs={inputs!r}: allowed are names of columns, each once, other than image, label and split"
        )


def _require_inputs(path: Path, inputs: Sequence[str], present: Collection[str]) -> None:
    """Make sure that a table has all columns that are wanted, and of these only one each."""
    missing = [column for column in inputs if column not in present]
    if missing:
        raise DatasetMismatch(
            f"{path} has the columns {list(present)}: there is no {some(missing)} for inputs"
        )
    twice = [column for column in inputs if list(present).count(column) > 1]
    if twice:
        raise DatasetMismatch(f"{path} has several columns {some(twice)}; keep one of each")


def _number(text: str, where: str) -> float:
    """A cell's number, which float32 can hold."""
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not abs(number) <= _LARGEST:
        raise DatasetMismatch(f"{where} is {text!r}: allowed are finite numbers, such as 63 or 0.5")
    return number


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
