"""Remote files, read part by part, and errors of networks and servers."""

from __future__ import annotations

import io
import os
import threading
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from streamcnn.errors import CorruptImage
from streamcnn.support.extras import MissingExtra, require
from streamcnn.support.text import without_secrets

_EXTRA = "remote"
_BLOCK = 2**16
"""Smallest request in bytes, as headers are read a few bytes at a time."""
_NUM_BLOCKS = 32
REMOTE_BYTES = _NUM_BLOCKS * _BLOCK + 2**22
"""Bytes that an open remote file takes: kept blocks, and buffers of its connection."""
_CLIENTS = ("aiobotocore", "aiohttp", "botocore", "fsspec", "gcsfs", "google", "requests", "s3fs")
"""Packages whose errors are those of a network or a server."""


@contextmanager
def using_fsspec(url: str) -> Iterator[Any]:
    """The module ``fsspec``; its errors for unsupported URLs become ours.

    Raises
    ------
    CorruptImage
        If the URL's protocol is unknown.
    MissingExtra
        If the protocol needs a package that is not installed.
    """
    fsspec = require("fsspec", extra=_EXTRA)
    shown = without_secrets(url)
    try:
        yield fsspec
    except ImportError as error:
        raise MissingExtra(
            f"{shown} cannot be read because a package is not installed ({error}): install the optional "
            f"dependencies with  pip install 'streamcnn[{_EXTRA}]'"
        ) from error
    except ValueError as error:  # fsspec's error for an unknown protocol
        raise CorruptImage(
            f"{shown} cannot be read: {without_secrets(str(error))}; allowed are paths, file://, https://, "
            "s3://, gs:// and what else fsspec knows"
        ) from None


def trouble(error: BaseException) -> str | None:
    """The reason and the remedy of a failed request, as text; None for "not found" and other errors."""
    causes = list(_causes(error))
    clients = [each for each in causes if type(each).__module__.partition(".")[0] in _CLIENTS]
    if not clients:
        return None
    status = next((found for each in clients if (found := _status(each)) is not None), None)
    is_refused = any(isinstance(each, PermissionError) for each in causes)
    if is_refused or status in (401, 403, 407) or any("Credentials" in type(e).__name__ for e in clients):
        return (
            f"it may not be read there{'' if status is None else f' (HTTP {status})'}: give credentials that "
            "allow it, in the environment for s3:// and gs://, in the URL for https://"
        )
    if status in (404, 410):
        return None
    if status is not None and (status >= 500 or status == 429):
        return f"the server answers HTTP {status}: try again later"
    if status is not None:
        return f"the server answers HTTP {status}: see that the URL is right"
    described = without_secrets(str(clients[-1]) or type(clients[-1]).__name__)
    return f"its server cannot be reached ({described}): see that the URL is right and the network is there"


def _causes(error: BaseException) -> Iterator[BaseException]:
    at: BaseException | None = error
    while at is not None:
        yield at
        at = at.__cause__


def _status(error: BaseException) -> int | None:
    """The HTTP status in an error, as each client stores it."""
    noted = getattr(error, "status", None) or getattr(error, "code", None)
    if noted is None and isinstance(answer := getattr(error, "response", None), dict):
        noted = answer.get("ResponseMetadata", {}).get("HTTPStatusCode")
    return noted if isinstance(noted, int) and 400 <= noted < 600 else None


class RemoteFile(io.RawIOBase):
    """A file at a URL, of which only requested parts are read; blocks of small reads are cached.

    Like a file, it must not be used by several threads at once.

    Parameters
    ----------
    url : of a file

    Raises
    ------
    CorruptImage
        If the URL's protocol is unknown, or its server sends only whole files.
    FileNotFoundError
        If there is no file.
    MissingExtra
        If the protocol needs a package that is not installed.
    """

    def __init__(self, url: str) -> None:
        super().__init__()
        self.name = without_secrets(url)
        with using_fsspec(url) as fsspec:
            system, path = fsspec.core.url_to_fs(url)
        found = system.info(path)
        if found["type"] == "directory":
            raise FileNotFoundError(f"{self.name} is a folder")
        if found["size"] is None or not found.get("partial", True):
            raise _only_whole(self.name)
        self._size = int(found["size"])
        self._file = system.open(path, "rb", block_size=_BLOCK, cache_type="none")
        self._at = 0
        self._blocks: OrderedDict[int, bytes] = OrderedDict()
        self._lock = threading.Lock()
        if self._size:
            # Many files have an index at the end; and a server that sends only whole files is detected now.
            self._block((self._size - 1) // _BLOCK)

    def readable(self) -> bool:
        """Return True."""
        return True

    def seekable(self) -> bool:
        """Return True."""
        return True

    def tell(self) -> int:
        """The present position in bytes."""
        return self._at

    def seek(self, offset: int, whence: int = os.SEEK_SET, /) -> int:
        """Set the position in bytes, relative to the start, the present position or the end."""
        self._at = max(0, offset + {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: self._size}[whence])
        return self._at

    def read(self, size: int | None = -1, /) -> bytes:
        """The next ``size`` bytes, or fewer at the end of the file.

        Raises
        ------
        CorruptImage
            If the server sends fewer, or only whole files.
        """
        left = max(0, self._size - self._at)
        size = left if size is None or size < 0 else min(size, left)
        start, self._at = self._at, self._at + size
        if size == 0:
            return b""
        if size > _BLOCK:
            return self._fetch(start, start + size)
        first, last = start // _BLOCK, (start + size - 1) // _BLOCK
        parts = b"".join(self._block(index) for index in range(first, last + 1))
        return parts[start - first * _BLOCK :][:size]

    def readinto(self, buffer: Any, /) -> int:
        """Fill ``buffer`` with the next bytes; return their number."""
        view = memoryview(buffer).cast("B")
        found = self.read(len(view))
        view[: len(found)] = found
        return len(found)

    def _block(self, index: int) -> bytes:
        with self._lock:
            if index in self._blocks:
                self._blocks.move_to_end(index)
            else:
                start = index * _BLOCK
                self._blocks[index] = self._fetch(start, min(start + _BLOCK, self._size))
                if len(self._blocks) > _NUM_BLOCKS:
                    self._blocks.popitem(last=False)
            return self._blocks[index]

    def _fetch(self, start: int, stop: int) -> bytes:
        try:
            self._file.seek(start)
            found = bytes(self._file.read(stop - start))
        except ValueError as error:
            if "range requests" in str(error):
                raise _only_whole(self.name) from None
            raise
        if len(found) != stop - start:
            raise CorruptImage(
                f"the server of {self.name} sent {len(found)} of {stop - start} bytes from byte {start} on: "
                "try again, or copy the image again"
            )
        return found


def _only_whole(name: str) -> CorruptImage:
    return CorruptImage(
        f"the server of {name} sends files only as a whole (it answers no range requests): download the "
        "image, or put it on a server that does"
    )
