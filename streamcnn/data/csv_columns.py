"""Cells of a CSV file by the names of their columns, each with its line."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

from streamcnn.data.splits import canonical
from streamcnn.errors import DatasetMismatch, some
from streamcnn.support.documents import open_regular

_OTHER_SEPARATORS = {";": "';'", "\t": "tabs", "|": "'|'"}
_TASKS = {"label": "classification", "mask": "segmentation"}
"""The task that needs a column of that name beside the images."""
_NOTHING = {"#n/a", "<na>", "n/a", "na", "nan", "nat", "null"}
"""Words that programs write into cells without a value, in lower case."""
_MOST_TEXT = 500
_MANY = 100
"""Number of values above which a column does not hold splits."""


def read_cells(
    path: Path, needed: Sequence[str], optional: Sequence[str], numbers: Sequence[str]
) -> Iterator[tuple[int, dict[str, str]]]:
    """The line number of each row, and its cells by column, stripped; a missing cell is empty.

    Parameters
    ----------
    path
        The CSV file.
    needed, optional
        Names of columns in any case; optional columns that are not there are left out.
    numbers
        Names of required columns, spelled exactly.

    Raises
    ------
    DatasetMismatch
        If the file cannot be read, lacks a column or has one twice, or a row has more cells than columns.
    """
    try:
        content = open_regular(path, error=DatasetMismatch)
    except OSError as error:
        raise DatasetMismatch(
            f"cannot read the table {path}: {error.strerror}; give the path of a CSV file that you may read"
        ) from error
    with io.TextIOWrapper(content, newline="", encoding="utf-8-sig") as file, _readable(path):
        yield from _cells(path, file, needed, optional, numbers)


def _cells(
    path: Path, file: TextIO, needed: Sequence[str], optional: Sequence[str], numbers: Sequence[str]
) -> Iterator[tuple[int, dict[str, str]]]:
    table = csv.reader(file, skipinitialspace=True)
    header = next(table, [])
    present = [name.strip() for name in header]
    places = {name: _place(path, name, present) for name in (*needed, *optional)}
    if any(places[name] is None for name in needed):
        raise DatasetMismatch(
            f"{path} has the columns {_shown(header)}: needed are {' and '.join(needed)}, and split if "
            f"wanted{_advice(header, needed)}"
        )
    _require_numbers(path, numbers, present)
    places |= {name: present.index(name) for name in numbers}
    wanted = {name: at for name, at in places.items() if at is not None}
    others: dict[str, set[str]] = {}
    if "split" in optional and "split" not in wanted:
        others = {name: set() for at, name in enumerate(present) if at not in wanted.values()}
    for row in table:
        if not any(row):
            continue
        cells = [cell.strip() for cell in row] + [""] * (len(present) - len(row))
        if any(cells[len(present) :]):
            raise DatasetMismatch(
                f"{path}, line {table.line_num} has {len(row)} cells for {len(present)} columns: put a text "
                "with a comma in it into double quotes"
            )
        for name, found in others.items():
            if len(found) < _MANY:
                found.add(cells[present.index(name)])
        yield table.line_num, {name: cells[at] for name, at in wanted.items()}
    _refuse_other_splits(path, others)


def _place(path: Path, name: str, present: Sequence[str]) -> int | None:
    """Index of the column with a name, in any case; None if there is none."""
    places = [at for at, each in enumerate(present) if each.casefold() == name]
    if len(places) > 1:
        same = [present[at] for at in places]
        raise DatasetMismatch(f"{path} has several columns {some(same)}; keep one of each")
    return places[0] if places else None


def _shown(names: Sequence[str]) -> str:
    """Names of columns as text, shortened, as a damaged file may have many or long ones."""
    text = str(list(names))
    return text if len(text) <= _MOST_TEXT else f"{text[:_MOST_TEXT]}…"


def _advice(header: Sequence[str], needed: Sequence[str]) -> str:
    for mark, described in _OTHER_SEPARATORS.items():
        if len(header) == 1 and mark in header[0]:
            return f"; its columns are separated by {described}: save it with commas"
    lower = {name.strip().lower() for name in header}
    for column, task in _TASKS.items():
        if column in lower and column not in needed and "image" in lower:
            return f"; its column {column} is for the task {task}, as of `train --task {task}`"
    return ""


def _require_numbers(path: Path, numbers: Sequence[str], present: Sequence[str]) -> None:
    """Make sure that a table has each column of inputs exactly once."""
    missing = [column for column in numbers if column not in present]
    if missing:
        raise DatasetMismatch(
            f"{path} has the columns {_shown(present)}: there is no {some(missing)} for inputs"
        )
    twice = [column for column in numbers if present.count(column) > 1]
    if twice:
        raise DatasetMismatch(f"{path} has several columns {some(twice)}; keep one of each")


def _refuse_other_splits(path: Path, columns: dict[str, set[str]]) -> None:
    """Refuse a column of splits with another name, which would put all images into one split."""
    for name, found in columns.items():
        splits = {canonical(text) for text in found}
        if len(splits) > 1 and splits <= {"train", "val", "test"}:
            raise DatasetMismatch(
                f"{path} has no column split, and its column {name!r} holds {some(sorted(found))}: call it "
                "split, or take it out"
            )


def require_filled(where: str, cells: Mapping[str, str], columns: Sequence[str]) -> None:
    """Make sure that a row's cells in the columns are not empty.

    Raises
    ------
    DatasetMismatch
        If one is; the text names the row, by ``where``, and the column.
    """
    blank = [column for column in columns if not cells[column]]
    if blank:
        raise DatasetMismatch(f"{where}: {blank[0]} is blank; fill it in")


def require_said(where: str, cells: Mapping[str, str], columns: Sequence[str]) -> None:
    """Make sure that a row has no word for a missing value, such as "nan", in the given columns.

    Raises
    ------
    DatasetMismatch
        If it has; the text names the row, by ``where``, the column and the word.
    """
    for column in columns:
        if cells.get(column, "").casefold() in _NOTHING:
            raise DatasetMismatch(
                f"{where}: {column} is {cells[column]!r}, which stands for a missing one; fill it in, or "
                "take the row out"
            )


@contextmanager
def _readable(path: Path) -> Iterator[None]:
    """Turn errors about bytes that are not text, or not a table, into an error that names the file."""
    try:
        yield
    except (UnicodeDecodeError, csv.Error) as error:
        raise DatasetMismatch(f"cannot read the table {path}: {error}; save it as CSV in UTF-8") from error
