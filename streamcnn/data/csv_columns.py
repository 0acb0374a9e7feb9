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
"""Which task needs a column of that name beside the images."""
_NOTHING = {"#n/a", "<na>", "n/a", "na", "nan", "nat", "null"}
"""What programs write into a cell that they have nothing for, without regard to case."""
_MOST_TEXT = 500
_MANY = 100
"""More values than a column of splits has."""


def read_cells(
    path: Path, needed: Sequence[str], optional: Sequence[str], numbers: Sequence[str]
) -> Iterator[tuple[int, dict[str, str]]]:
    """The line of each row, and its cells without blanks around them; a missing cell is blank.

    Parameters
    ----------
    path
        Of the CSV file.
    needed, optional
        Columns of which the case makes no difference; those that are not there are left out.
    numbers
        Columns that have to be there as they are spelled.

    Raises
    ------
    DatasetMismatch
        If the file cannot be read, lacks a column or has one twice, or a row has more cells than columns.
    """
    try:
        content = open_regular(path, error=DatasetMismatch)
    except OSError as error:
        raise DatasetMismatch(f"cannot read the table {path}: {error.strerror}") from error
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
    """Which column has a name, whatever its case."""
    places = [at for at, each in enumerate(present) if each.casefold() == name]
    if len(places) > 1:
        same = [present[at] for at in places]
        raise DatasetMismatch(f"{path} has several columns {some(same)}; keep one of each")
    return places[0] if places else None


def _shown(names: Sequence[str]) -> str:
    """Names of columns, of which a damaged file may have any number of any length."""
    text = str(list(names))
    return text if len(text) <= _MOST_TEXT else f"{text[:_MOST_TEXT]}…"


def _advice(header: Sequence[str], needed: Sequence[str]) -> str:
    for mark, described in _OTHER_SEPARATORS.items():
        if len(header) == 1 and mark in header[0]:
            return f"; its columns are separated by {described}: save it with commas"
    lower = {name.strip().lower() for name in header}
    for column, task in _TASKS.items():
        if column in lower and column not in needed and "image" in lower:
            return f"; for its column {column} give --task {task}"
    return ""


def _require_numbers(path: Path, numbers: Sequence[str], present: Sequence[str]) -> None:
    """Make sure that a table has all columns of inputs, and of these only one each."""
    missing = [column for column in numbers if column not in present]
    if missing:
        raise DatasetMismatch(
            f"{path} has the columns {_shown(present)}: there is no {some(missing)} for inputs"
        )
    twice = [column for column in numbers if present.count(column) > 1]
    if twice:
        raise DatasetMismatch(f"{path} has several columns {some(twice)}; keep one of each")


def _refuse_other_splits(path: Path, columns: dict[str, set[str]]) -> None:
    """Refuse a column of splits that is called something else, so that all images would be of one."""
    for name, found in columns.items():
        splits = {canonical(text) for text in found}
        if len(splits) > 1 and splits <= {"train", "val", "test"}:
            raise DatasetMismatch(
                f"{path} has no column split, and its column {name!r} holds {some(sorted(found))}: call it "
                "split, or take it out"
            )


def require_filled(where: str, cells: Mapping[str, str], columns: Sequence[str]) -> None:
    """Make sure that a row has something in each of the columns.

    Raises
    ------
    DatasetMismatch
        Naming the row, as ``where`` does, and a column that is blank.
    """
    blank = [column for column in columns if not cells[column]]
    if blank:
        raise DatasetMismatch(f"{where}: {blank[0]} is blank; fill it in")


def require_said(where: str, cells: Mapping[str, str], columns: Sequence[str]) -> None:
    """Make sure that none of the columns, of those that there are, has a word for a missing text in a row.

    Raises
    ------
    DatasetMismatch
        Naming the row, as ``where`` does, the column and the word.
    """
    for column in columns:
        if cells.get(column, "").casefold() in _NOTHING:
            raise DatasetMismatch(
                f"{where}: {column} is {cells[column]!r}, which stands for a missing one; fill it in, or "
                "take the row out"
            )


@contextmanager
def _readable(path: Path) -> Iterator[None]:
    """A block in which bytes that are no text, or no table, are an error of the file."""
    try:
        yield
    except (UnicodeDecodeError, csv.Error) as error:
        raise DatasetMismatch(f"cannot read the table {path}: {error}; save it as CSV in UTF-8") from error
