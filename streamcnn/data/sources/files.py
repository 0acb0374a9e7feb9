"""Helpers for files: across forks, changes while open, and failures to open."""

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
"""Default limit, in pixels, for images that are decoded whole."""
MAX_VALUES_PER_PIXEL = 4
"""Largest number of channels at this limit; with more channels, fewer pixels are allowed."""
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
    """A lock that is free in a forked child, whichever of the parent's threads held it."""

    def __init__(self) -> None:
        self._locks: dict[int, threading.Lock] = {}

    def __enter__(self) -> None:
        self._locks.setdefault(os.getpid(), threading.Lock()).acquire()

    def __exit__(self, *_: object) -> None:
        self._locks[os.getpid()].release()


class PerProcess(Generic[T]):
    """The result of ``make``, computed anew in every process that uses it.

    A forked child shares the parent's open files, with their positions, and decoders in the state in which
    the parent's threads left them. It must neither use nor close them.
    """

    def __init__(self, make: Callable[[], T]) -> None:
        self._make = make
        self._made: dict[int, T] = {}
        self._lock = ProcessLock()

    def get(self) -> T:
        """This process's own value."""
        with self._lock:
            process = os.getpid()
            if process not in self._made:
                self._made[process] = self._make()
            return self._made[process]

    def forget(self) -> None:
        """Drop this process's value; the next :meth:`get` makes another one."""
        with self._lock:
            self._made.pop(os.getpid(), None)


@dataclass(frozen=True, slots=True)
class FileStamp:
    """The state of a file when it was opened: its size in bytes and its modification time."""

    path: str
    size: int
    modified_ns: int

    @classmethod
    def of(cls, path: str | Path) -> FileStamp:
        """The present state of a file.

        Raises
        ------
        CorruptImage
            If it is a pipe, a socket or a device.
        """
        found = regular(path)
        return cls(str(path), found.st_size, found.st_mtime_ns)

    def check(self) -> None:
        """Raise `CorruptImage` if the file has changed since.

        What is known of it, such as its tiles' offsets, would then give wrong pixels.
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
    """Turn errors of the system in comparing files' bytes into `CorruptImage`."""
    try:
        yield
    except CorruptImage:
        raise
    except OSError as error:
        raise CorruptImage(
            f"cannot read {error.filename}: {error.strerror}; see that it is there and that you may read it"
        ) from error


def is_there(path: Path) -> bool:
    """Whether something is at a path named in a file, which may not even be a valid path."""
    try:
        return path.exists()
    except (OSError, ValueError):
        return False


def regular(path: str | Path) -> os.stat_result:
    """The status of a path, if reading it cannot block or continue forever.

    Raises
    ------
    CorruptImage
        If it is a pipe, a socket or a device.
    OSError
        If there is nothing, or access is denied.
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
    """Turn errors in the block into a `CorruptImage` which says that ``name`` is no ``what``.

    Only streamcnn's own errors and ``MemoryError`` pass unchanged. For URLs, neither the text nor the cause
    in a traceback contains credentials.
    """
    shown = without_secrets(name)
    try:
        yield
    except (StreamError, MemoryError):
        raise
    except Exception as error:  # damaged metadata may raise anything
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
    """Raise `DatasetMismatch` if an image's extents are impossibly large, or zero."""
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
    what : name of the pieces, such as ``chunks``
    size : height and width of a piece
    channels : number of values decoded for each pixel, including time and depth
    max_pixels : largest number of pixels; pixels of more than four values count as more
    """
    height, width = size
    if height * width * max(MAX_VALUES_PER_PIXEL, channels) > max_pixels * MAX_VALUES_PER_PIXEL:
        raise DatasetMismatch(
            f"{name} has {what} of {height} x {width} = {height * width} pixels with {channels} values each: "
            f"allowed are {max_pixels} pixels of up to {MAX_VALUES_PER_PIXEL} values, or as many values in "
            f"all, for each is decoded whole; give max_pixels= or write it with smaller {what}"
        )


def reason(error: Exception) -> str:
    """The error's text, after its type if the text alone says little."""
    if isinstance(error, ArithmeticError | AssertionError | AttributeError | LookupError | TypeError):
        return f"{type(error).__name__}: {shortened(error)}"
    return shortened(error).rstrip(".") or type(error).__name__


def shortened(error: Exception) -> str:
    """The first 500 characters of an error's text, which may contain all of a file's metadata."""
    text = without_secrets(str(error))
    return text if len(text) <= _MOST_TEXT else f"{text[:_MOST_TEXT]}…"
