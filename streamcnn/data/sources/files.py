"""Files that stay open, change, fork with their process, or cannot be opened at all."""

from __future__ import annotations

import os
import stat
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, TypeVar

from streamcnn.data.sources.remote import trouble
from streamcnn.errors import CorruptImage, DatasetMismatch, StreamError
from streamcnn.support.text import without_secrets

MAX_PIXELS = 100_000_000
"""Largest image, in pixels, that is decoded whole unless the caller allows more."""
MAX_VALUES_PER_PIXEL = 4
"""Most channels of such an image of the largest size; with more channels, so many fewer pixels."""
_LARGEST_IMAGE = 10**12
_MOST_CHANNELS = 2**16
_MOST_TEXT = 500
"""Characters of a library's error that are shown."""

T = TypeVar("T")

_ENDLESS = {
    stat.S_ISFIFO: "named pipe",
    stat.S_ISSOCK: "socket",
    stat.S_ISCHR: "device",
    stat.S_ISBLK: "device",
}


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
        """The file as it is now.

        Raises
        ------
        CorruptImage
            If it is a pipe, a socket or a device.
        """
        found = regular(path)
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
def comparing() -> Iterator[None]:
    """Turn what the system says of files whose bytes are compared into a `CorruptImage`."""
    try:
        yield
    except CorruptImage:
        raise
    except OSError as error:
        raise CorruptImage(
            f"cannot read {error.filename}: {error.strerror}; see that it is there and that you may read it"
        ) from error


def is_there(path: Path) -> bool:
    """Whether there is something at a path that a file names, which may be no path at all."""
    try:
        return path.exists()
    except (OSError, ValueError):
        return False


def regular(path: str | Path) -> os.stat_result:
    """What is at a path, if reading it cannot block or go on without end.

    Raises
    ------
    CorruptImage
        If it is a pipe, a socket or a device.
    OSError
        If there is nothing, or it may not be looked at.
    """
    found = os.stat(path)
    for is_one, kind in _ENDLESS.items():
        if is_one(found.st_mode):
            raise CorruptImage(
                f"{path} is a {kind}: allowed are files and folders; write the image to a file"
            )
    return found


@contextmanager
def opening(name: str, what: str) -> Iterator[None]:
    """Turn whatever fails inside into one `CorruptImage` which says that ``name`` is no ``what``.

    Of a URL, neither the text nor what a traceback shows of its cause has credentials in it.
    """
    shown = without_secrets(name)
    try:
        yield
    except (StreamError, MemoryError):
        raise
    except Exception as error:  # damaged metadata fails in as many ways as there are fields
        cause = None if "://" in name else error
        if (why := trouble(error)) is not None:
            raise CorruptImage(f"cannot read {shown}: {why}") from cause
        if isinstance(error, FileNotFoundError):
            raise CorruptImage(f"no {what} at {shown}: give the path of one") from cause
        if isinstance(error, OSError):
            raise CorruptImage(
                f"cannot open {shown}: {without_secrets(str(error))}; see that it is a complete {what} and "
                "that you may read it"
            ) from cause
        raise CorruptImage(
            f"cannot open {shown} as a {what}: {reason(error)}; it is damaged or something else"
        ) from cause


def check_shape(name: str, shape: tuple[int, int, int]) -> None:
    """Raise `DatasetMismatch` if no image has so many channels, rows and columns, or has none."""
    channels, height, width = shape
    if 0 in shape:
        raise DatasetMismatch(
            f"{name} has {channels} channels of {height} x {width} pixels: allowed are images with pixels"
        )
    if height * width > _LARGEST_IMAGE or channels > _MOST_CHANNELS:
        raise DatasetMismatch(
            f"{name} has {channels} channels of {height} x {width} pixels: allowed are {_MOST_CHANNELS} "
            f"channels and {_LARGEST_IMAGE} pixels; its metadata is damaged, or the image has to be divided"
        )


def check_piece(name: str, what: str, size: tuple[int, int], channels: int, max_pixels: int) -> None:
    """Raise `DatasetMismatch` if a piece that is decoded whole is too large.

    Parameters
    ----------
    what : what the pieces are called, as in ``chunks``
    size : height and width of one
    channels : values of one pixel that are decoded with it, time and depth among them
    max_pixels : most pixels; pixels of more than four values count for more
    """
    height, width = size
    if height * width * max(MAX_VALUES_PER_PIXEL, channels) > max_pixels * MAX_VALUES_PER_PIXEL:
        raise DatasetMismatch(
            f"{name} has {what} of {height} x {width} = {height * width} pixels with {channels} values each: "
            f"allowed are {max_pixels} pixels of up to {MAX_VALUES_PER_PIXEL} values, or as many values in "
            f"all, for each is decoded whole; give max_pixels= or write it with smaller {what}"
        )


def reason(error: Exception) -> str:
    """The error's text, after its type where the text alone says little."""
    if isinstance(error, ArithmeticError | AssertionError | AttributeError | LookupError | TypeError):
        return f"{type(error).__name__}: {shortened(error)}"
    return shortened(error).rstrip(".") or type(error).__name__


def shortened(error: Exception) -> str:
    """The first 500 characters of an error's text, in which there may be all of a file's metadata."""
    text = without_secrets(str(error))
    return text if len(text) <= _MOST_TEXT else f"{text[:_MOST_TEXT]}…"
