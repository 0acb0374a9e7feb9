"""Tables of labels: CSV files with the columns ``image``, ``label`` and, if wanted, ``split`` and numbers."""

from __future__ import annotations

import math
import re
import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from streamcnn.data.csv_columns import read_cells, require_filled, require_said
from streamcnn.data.splits import canonical
from streamcnn.errors import DatasetMismatch, some

_COLUMNS = ("image", "label")
_LARGEST = 3.4e38
"""Largest number that float32 can hold."""
_NUMBER = re.compile(r"[-+]?[0-9]*[.,]?[0-9]*")
_WHOLE = re.compile(r"[0-9]+([.]0*)?")
"""A label that is a number; pandas writes 1 as 1.0 if a value is missing in the column."""


@dataclass(frozen=True, slots=True)
class Row:
    """A table's row for an image."""

    line: int
    """Line of the file, from 1 on."""
    image: str
    label: str
    """The label; empty if labels are not read."""
    split: str | None
    inputs: tuple[float, ...]
    """Numbers of the requested columns, in the requested order."""


def read_rows(path: Path, inputs: Sequence[str] = (), *, labelled: bool = True) -> list[Row]:
    """The table's rows. No image and no label is empty, and labels are all integers or all names.

    Parameters
    ----------
    path
        The CSV file.
    inputs
        Columns of numbers to read too.
    labelled
        Whether labels are required.

    Raises
    ------
    DatasetMismatch
        If the file cannot be read, lacks a column, has an empty cell, or text in place of a number; or if
        labels mix numbers and names, or differ only in case.
    ValueError
        If ``inputs`` name a column twice, or one that cannot be an input.
    """
    check_inputs(inputs)
    needed = _COLUMNS if labelled else _COLUMNS[:1]
    optional = ("split",) if labelled else ()
    rows = [
        _row(f"{path}, line {line}", line, cells, (*needed, *inputs), inputs)
        for line, cells in read_cells(path, needed, optional, inputs)
    ]
    return _with_labels_of_one_kind(path, rows) if labelled else rows


def _row(where: str, line: int, cells: dict[str, str], filled: Sequence[str], inputs: Sequence[str]) -> Row:
    require_filled(where, cells, filled)
    require_said(where, cells, ("label", "split"))
    numbers = tuple(_number(cells[column], f"{where}: {column}") for column in inputs)
    label = unicodedata.normalize("NFC", cells.get("label", ""))
    split = cells.get("split")
    return Row(line, cells["image"], label, canonical(split) if split else None, numbers)


def _with_labels_of_one_kind(path: Path, rows: Sequence[Row]) -> list[Row]:
    """The rows with integer labels in one spelling; a mix of numbers and names is refused."""
    first = {row.label: row for row in reversed(rows)}
    by_line = sorted(first.values(), key=lambda row: row.line)
    doubtful = [row for row in by_line if _NUMBER.fullmatch(row.label) and not _WHOLE.fullmatch(row.label)]
    if doubtful:
        raise _no_whole_numbers([row.label for row in doubtful], f" ({path}, line {doubtful[0].line})")
    numbers = [row for row in by_line if _WHOLE.fullmatch(row.label)]
    names = [row for row in by_line if not _WHOLE.fullmatch(row.label)]
    if numbers and names:
        raise DatasetMismatch(
            f"{path}, line {names[0].line}: label {names[0].label!r} is a name, label {numbers[0].label!r} "
            f"in line {numbers[0].line} a number: give whole numbers from 0 on, or names, for all"
        )
    alike = _alike([row.label for row in names])
    if alike is not None:
        lines = " and ".join(str(first[label].line) for label in alike)
        raise DatasetMismatch(f"{path}, lines {lines}: {_of_alike(alike)}")
    return [replace(row, label=str(int(row.label.partition(".")[0]))) for row in rows] if numbers else [*rows]


def _no_whole_numbers(labels: Sequence[str], where: str = "") -> DatasetMismatch:
    return DatasetMismatch(
        f"labels {some(labels)} are no whole numbers from 0 on: give such numbers, or names of classes{where}"
    )


def _alike(labels: Iterable[str]) -> tuple[str, str] | None:
    """Two labels that differ only in case, blanks or the encoding of accents; None if there are none.

    Single letters may differ in case, as classes of handwriting do.
    """
    known: dict[str, str] = {}
    for label in labels:
        plain = " ".join(unicodedata.normalize("NFKC", label).casefold().split())
        other = known.setdefault(plain, label)
        if other != label and len(plain) > 1:
            return other, label
    return None


def _of_alike(labels: tuple[str, str]) -> str:
    return f"labels {labels[0]!r} and {labels[1]!r} differ in nothing but case or blanks; write them alike"


def check_inputs(inputs: Sequence[str]) -> None:
    """Make sure that each of the columns can be an input.

    Raises
    ------
    ValueError
        If one cannot, or is named twice.
    """
    taken = [column for column in (*_COLUMNS, "split") if column in inputs]
    twice = sorted({column for column in inputs if inputs.count(column) > 1})
    if isinstance(inputs, str) or taken or twice or not all(inputs):
        raise ValueError(
            f"inputs={inputs!r}: allowed are names of columns, each once, other than image, label and split"
        )


def _number(text: str, where: str) -> float:
    """The number in a cell, which must fit into float32."""
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not abs(number) <= _LARGEST:
        raise DatasetMismatch(f"{where} is {text!r}: allowed are finite numbers, such as 63 or 0.5")
    return number


def class_names(
    texts: Iterable[str], known: tuple[str, ...] | None = None, *, numbered: bool = False
) -> tuple[str, ...] | None:
    """Names of classes: known ones, then new ones in alphabetical order; None if labels are numbers.

    Parameters
    ----------
    texts
        All labels of a table.
    known
        Existing names of the labels 0, 1, …, if any.
    numbered
        Whether existing labels are numbers.

    Raises
    ------
    DatasetMismatch
        If some labels are names and others numbers, or names differ only in case.
    """
    labels = sorted(set(texts))
    alike = _alike((*(known or ()), *labels))
    if alike is not None and not set(alike) <= set(known or ()):
        raise DatasetMismatch(_of_alike(alike))
    names = [label for label in labels if not label.isdecimal()]
    if known is None and (numbered or not names):
        if names:
            raise DatasetMismatch(
                f"labels {some(names)} are names, those in the store are numbers: give whole numbers"
            )
        if len({int(label) for label in labels}) < len(labels):
            raise DatasetMismatch(f"labels {some(labels)} are not as many numbers; write each in one way")
        return None
    doubtful = [label for label in names if _NUMBER.fullmatch(label)]
    if doubtful:
        raise _no_whole_numbers(doubtful)
    numbers = [label for label in labels if label.isdecimal() and label not in (known or ())]
    if known is not None and numbers:
        raise DatasetMismatch(
            f"labels {some(numbers)} are numbers, those in the store are names: give names of classes"
        )
    return (*(known or ()), *(label for label in labels if label not in (known or ())))


def label_number(text: str, classes: tuple[str, ...] | None) -> int:
    """The number of a label: its index among the class names, or the number itself if there are none."""
    return int(text) if classes is None else classes.index(text)
