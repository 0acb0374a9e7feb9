"""Files that stay open, change, fork with their process, or cannot be opened at all."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, TypeVar

from streamcnn.errors import CorruptImage, StreamError

MAX_PIXELS = 100_000_000
"""Largest image, in pixels, that is decoded whole unless the caller allows more."""

T = TypeVar("T")


class ProcessLock:
    """A lock that a forked child finds free, whichever thread of the parent held it then."""

    def __init__(self) -> None:
        self._locks: dict[int, threading.Lock] = {}

    def __enter__(self) -> None:
        self._locks.setdefault(os.getpid(), threading.Lock()).acquire()

    def __exit__(self, *_: object) -> None:
        self._locks[os.getpid()].release()


class PerProcess(Generic[T]):
    """What ``make`` returns, made anew in every process that asks for it.

    A forked child shares the parent's open files, and with them the positions in them, and a decoder
    as the parent's threads left it at that moment. It must use neither, nor close them.
    """

    def __init__(self, make: Callable[[], T]) -> None:
        self._make = make
        self._made: dict[int, T] = {}
        self._lock = ProcessLock()

    def get(self) -> T:
        """This process's own."""
        with self._lock:
            process = os.getpid()
            if process not in self._made:
                self._made[process] = self._make()
            return self._made[process]

    def forget(self) -> None:
        """Let this process make another one when it asks next."""
        with self._lock:
            self._made.pop(os.getpid(), None)


@dataclass(frozen=True, slots=True)
class FileStamp:
    """A file as it was when it was opened: its size in bytes and when it was last written to."""

    path: str
    size: int
    modified_ns: int

    @classmethod
    def of(cls, path: str | Path) -> FileStamp:
        """The file as it is now."""
        found = os.stat(path)
        return cls(str(path), found.st_size, found.st_mtime_ns)

    def check(self) -> None:
        """Raise `CorruptImage` if the file is another one by now.

        What is known about it, such as where its tiles lie, would then give wrong pixels.
        """
        try:
            now = FileStamp.of(self.path)
        except FileNotFoundError as error:
            raise CorruptImage("the file is gone since it was opened; put it back") from error
        if now != self:
            raise CorruptImage(
                f"the file was changed since it was opened ({self.size} bytes then, {now.size} now); "
                "open it again"
            )


@contextmanager
def opening(name: str, what: str) -> Iterator[None]:
    """Turn whatever fails inside into one `CorruptImage` which says that ``name`` is no ``what``."""
    try:
        yield
    except (StreamError, MemoryError):
        raise
    except FileNotFoundError as error:
        raise CorruptImage(f"no {what} at {name}: give the path of one") from error
    except OSError as error:
        raise CorruptImage(
            f"cannot open {name}: {error}; see that it is a complete {what} and that you may read it"
        ) from error
    except Exception as error:  # damaged metadata fails in as many ways as there are fields
        raise CorruptImage(
            f"cannot open {name} as a {what}: {reason(error)}; it is damaged or something else"
        ) from error


def reason(error: Exception) -> str:
    """The error's text, after its type where the text alone says little."""
    if isinstance(error, ArithmeticError | AssertionError | AttributeError | LookupError | TypeError):
        return f"{type(error).__name__}: {error}"
    return str(error) or type(error).__name__
