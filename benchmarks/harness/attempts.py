"""What a row has tried, and what its ceiling has refused it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from benchmarks.harness.json_files import read_json, write_json


class Refused(Exception):
    """The method does not fit its budget."""


class Attempts:
    """What a row has tried, kept in a file: a library may end the process when memory is refused it.

    Parameters
    ----------
    folder
        The row's own.
    """

    def __init__(self, folder: Path) -> None:
        self._path = folder / "attempts.json"
        known = read_json(self._path)
        self._refused: dict[str, str] = known.get("refused", {})
        self._tried: str | None = known.get("trying")

    @contextmanager
    def trying(self, name: str) -> Iterator[None]:
        """A block that may be refused, and is again if it was before.

        Raises
        ------
        Refused
            If it is.
        """
        if name in self._refused:
            raise Refused(self._refused[name])
        self.begin(name)
        try:
            yield
        except Refused as error:
            self._refused[name] = str(error)
            raise
        finally:
            self._write(None)

    def begin(self, name: str) -> None:
        """Write down what is tried from now on."""
        self._write(name)

    def refuse_last(self, reason: str) -> bool:
        """Have what a process was trying when it ended count as refused; False if it was trying nothing."""
        if self._tried is None:
            return False
        self._refused[self._tried] = reason
        self._write(None)
        return True

    def forget_last(self) -> None:
        """Have what a process was trying when it ended be tried again."""
        if self._tried is not None:
            self._write(None)

    def _write(self, trying: str | None) -> None:
        self._tried = trying
        write_json(self._path, {"refused": self._refused, "trying": trying})
