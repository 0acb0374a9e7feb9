"""Untrusted files: read with size limits, inside a folder, and validated by a schema.

A schema is a dataclass: its annotations say which JSON is allowed, and its ``__post_init__`` checks values.
Pydantic validates; it is imported when the first file is read.
"""

from __future__ import annotations

import functools
import json
import math
import os
import stat
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, TypeVar

from streamcnn.errors import StreamError

if TYPE_CHECKING:
    from pydantic import TypeAdapter, ValidationError

T = TypeVar("T")

MOST_BYTES = 2**24
"""Largest file of settings or metadata, in bytes."""
MOST_DEPTH = 32
"""Deepest nesting of lists and objects in values that a schema leaves open."""
_SHOWN = 80
"""Characters of a wrong value in an error's text."""


def require_within(folder: Path, path: Path, *, error: type[StreamError]) -> None:
    """Make sure that ``path`` lies in ``folder`` after following all links; neither has to exist.

    Raises
    ------
    StreamError
        Of the kind ``error``, if it leads elsewhere.
    """
    root, found = os.path.realpath(folder), os.path.realpath(path)
    if found != root and not found.startswith(root.rstrip(os.sep) + os.sep):
        raise error(
            f"{path} leads to {found}: allowed are files and links inside {folder}; copy what belongs there "
            "into the folder, or take it out"
        )


def read_within(folder: Path, path: Path, *, error: type[StreamError], most_bytes: int = MOST_BYTES) -> bytes:
    """The content of a regular file that lies in ``folder``.

    Parameters
    ----------
    folder, path
        The file, and the folder in which it has to lie after following all links.
    error
        Class of the error.
    most_bytes
        Largest size of the file in bytes.

    Raises
    ------
    StreamError
        Of the kind ``error``, if the file lies elsewhere, is larger, or is a folder, a pipe or a device.
    OSError
        If it is not there or cannot be read.
    """
    require_within(folder, path, error=error)
    return read_regular(path, error=error, most_bytes=most_bytes)


def read_regular(path: Path, *, error: type[StreamError], most_bytes: int = MOST_BYTES) -> bytes:
    """The content of a regular file, wherever it lies; parameters and errors are those of `read_within`."""
    with open_regular(path, error=error) as file:
        state = os.fstat(file.fileno())
        if state.st_size > most_bytes:
            raise error(
                f"{path} has {state.st_size} bytes: allowed are {most_bytes} at most; it is no such file"
            )
        return file.read(state.st_size)


def open_regular(path: Path, *, error: type[StreamError]) -> BinaryIO:
    """Open a regular file for reading, wherever it lies.

    Raises
    ------
    StreamError
        Of the kind ``error``, if it is a folder, a pipe, a socket or a device.
    OSError
        If it is not there or cannot be read.
    """
    # A socket cannot be opened, so it is refused before.
    _require_regular(path, os.stat(path), error)
    # Non-blocking, as opening a pipe would wait.
    file = os.fdopen(os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0)), "rb")
    try:
        _require_regular(path, os.fstat(file.fileno()), error)
    except BaseException:
        file.close()
        raise
    return file


def size_within(folder: Path, path: Path, *, error: type[StreamError]) -> int:
    """Size in bytes of a regular file that lies in ``folder``, for a file that other code will read.

    Raises
    ------
    StreamError
        Of the kind ``error``, if the file lies elsewhere, or is a folder, a pipe or a device.
    OSError
        If it is not there.
    """
    require_within(folder, path, error=error)
    state = os.stat(path)
    _require_regular(path, state, error)
    return state.st_size


def _require_regular(path: Path, state: os.stat_result, error: type[StreamError]) -> None:
    if not stat.S_ISREG(state.st_mode):
        raise error(f"{path} is no regular file: put back the file that was there")


def parse_json(
    content: str | bytes, where: str | Path, *, error: type[StreamError], finite: bool = True
) -> Any:
    """Parse a JSON text in which every key occurs once and, unless ``finite`` is False, numbers are finite.

    Parameters
    ----------
    content
        The text; bytes are UTF-8.
    where
        Name of the text in the error.
    error
        Class of the error.
    finite
        Whether NaN and Infinity are refused.

    Raises
    ------
    StreamError
        Of the kind ``error``, if the text is not of this form.
    """
    try:
        text = content if isinstance(content, str) else content.decode()
        return json.loads(
            text,
            object_pairs_hook=_unique,
            parse_constant=_refuse_constant if finite else None,
            parse_float=_finite if finite else None,
        )
    except RecursionError:
        raise error(f"{where} is nested too deeply: put back what was written there") from None
    except ValueError as problem:
        raise error(f"{where} is no valid JSON ({problem}): put back what was written there") from None


def conform(kind: type[T], values: Any, where: str | Path, *, error: type[StreamError]) -> T:
    """Convert values from JSON to an instance of a dataclass, with validation.

    Parameters
    ----------
    kind
        The dataclass. Numbers are not taken from text, nor whole numbers from fractions.
    values
        As ``parse_json`` gives them.
    where
        What the error calls them: the file.
    error
        Kind of the error.

    Raises
    ------
    StreamError
        Of the kind ``error``; the text names the file and each wrong field, its value and what is allowed.
    """
    from pydantic import ValidationError

    adapter: TypeAdapter[T] = _adapter(kind)  # type: ignore[arg-type]
    try:
        found = adapter.validate_json(json.dumps(values), strict=True)
    except ValidationError as problem:
        raise error(f"{where}: {_described(problem)}") from None
    except RecursionError:
        raise error(f"{where} is nested too deeply: put back what was written there") from None
    except (TypeError, ValueError) as problem:
        raise error(f"{where} holds what JSON has not: {problem}") from None
    return found


def require_flat(name: str, value: Any) -> None:
    """Make sure that a value of any type is not nested too deeply to be written again.

    Raises
    ------
    ValueError
        If it is.
    """
    level: Sequence[Any] = [value]
    for _ in range(MOST_DEPTH):
        level = [item for each in level for item in _items(each)]
        if not level:
            return
    raise ValueError(f"{name} is nested more than {MOST_DEPTH} times: allowed are fewer")


def require_storable(name: str, value: Any) -> None:
    """Make sure that a value of any type can be stored in a file: not too nested, all numbers finite.

    Raises
    ------
    ValueError
        If it is nested too deeply, or a number in it is infinite or NaN, which JSON does not have.
    """
    require_flat(name, value)
    _require_finite(name, value)


def _require_finite(name: str, value: Any) -> None:
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(
            f"{name} holds {value}: allowed are finite numbers, which alone can be kept in a file"
        )
    for item in _items(value):
        _require_finite(name, item)


def _items(value: Any) -> Iterable[Any]:
    if isinstance(value, dict):
        return value.values()
    return value if isinstance(value, list | tuple) else ()


@functools.cache
def _adapter(kind: type[Any]) -> TypeAdapter[Any]:
    from pydantic import TypeAdapter

    return TypeAdapter(kind)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise ValueError(f"the key {_short(twice)} comes twice")
    return found


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"{name} is no finite number")


def _finite(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(f"{text[:_SHOWN]} is no finite number of 64 bits")
    return number


def _described(problem: ValidationError) -> str:
    """A text on the first three wrong fields."""
    problems = problem.errors(include_url=False)
    texts = [_one(each) for each in problems[:3]]
    if len(problems) > 3:
        texts.append(f"and {len(problems) - 3} more")
    return "; ".join(texts)


def _one(problem: Any) -> str:
    field = ".".join(str(part) if str(part).isprintable() else repr(part) for part in problem["loc"])
    kind, found = problem["type"], _short(problem["input"])
    if kind == "missing":
        return f"{field} is missing"
    if kind in ("unexpected_keyword_argument", "extra_forbidden"):
        return f"{field} is not known here: leave it out"
    if kind == "value_error":
        text = str(problem["ctx"]["error"])
        return f"{field}: {text}" if field else text
    allowed = problem["msg"].removeprefix("Input should be ").removeprefix("String should ")
    return f"{field or 'it'} is {found}: allowed is {allowed}"


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}…"
