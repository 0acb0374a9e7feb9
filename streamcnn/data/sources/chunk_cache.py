"""A cache of decoded chunks, for reads that need only a part of each chunk.

An image of one chunk, or of a few large ones, would otherwise be decoded again for every tile.
"""

from __future__ import annotations

import itertools
import math
import threading
import warnings
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from streamcnn.data.sources.files import ProcessLock
from streamcnn.support.text import printable

CACHE_BYTES = 2**26
"""Default limit on the bytes of decoded chunks that a source keeps."""

_LEAST_BYTES = 2**22
"""Smallest chunk in bytes to be kept: smaller ones decode quickly, and plans count kept bytes."""

Window = tuple[slice | int, ...]


class ChunkCache:
    """The most recently used chunks, up to ``limit`` bytes.

    Chunks of 4 MiB and more are kept if they are larger than the part that is read; others bypass the cache,
    and so do chunks larger than ``limit``. Several threads may read at once; if two need the same chunk, one
    waits for the other.

    Parameters
    ----------
    chunk : extents of a chunk in pixels, in the array's own axis order
    shape : extents of the array
    itemsize : bytes of a pixel's value
    limit : most bytes that are kept
    """

    def __init__(self, chunk: tuple[int, ...], shape: tuple[int, ...], itemsize: int, limit: int) -> None:
        self._chunk = chunk
        self._shape = shape
        self._chunk_bytes = math.prod(map(min, chunk, shape)) * itemsize
        self._limit = limit
        self._keeps = _LEAST_BYTES <= self._chunk_bytes <= limit
        self._kept: OrderedDict[tuple[int, ...], NDArray[Any]] = OrderedDict()
        self._decoding: dict[tuple[int, ...], threading.Lock] = {}
        self._lock = ProcessLock()

    @property
    def chunk_bytes(self) -> int:
        """Bytes of a decoded chunk, or of the part of it inside the array."""
        return self._chunk_bytes

    def held_bytes(self) -> int:
        """Bytes that are kept now."""
        with self._lock:
            return sum(chunk.nbytes for chunk in self._kept.values())

    def clear(self) -> None:
        """Release all chunks."""
        with self._lock:
            self._kept.clear()

    def most_bytes(self) -> int:
        """Largest number of bytes that may be kept."""
        if not self._keeps:
            return 0
        num_chunks = math.prod(math.ceil(n / size) for n, size in zip(self._shape, self._chunk, strict=True))
        return min(num_chunks, self._limit // max(1, self._chunk_bytes)) * self._chunk_bytes

    def read(self, window: Window, decode: Callable[[Window], NDArray[Any]]) -> NDArray[Any]:
        """The pixels of ``window``; ``decode`` decodes those of any window."""
        spans = [span(part, extent) for part, extent in zip(window, self._shape, strict=True)]
        wanted = math.prod(stop - start for start, stop in spans)
        if not self._keeps or math.prod(map(min, self._chunk, self._shape)) <= wanted:
            return decode(window)
        out: NDArray[Any] | None = None
        places = (
            range(start // n, -(-stop // n)) for (start, stop), n in zip(spans, self._chunk, strict=True)
        )
        for place in itertools.product(*places):
            chunk = self._get(place, decode)
            if out is None:
                out = np.empty([stop - start for start, stop in spans], chunk.dtype)
            there, here = [], []
            for (start, stop), position, extent in zip(spans, place, self._chunk, strict=True):
                origin = position * extent
                first, last = max(start, origin), min(stop, origin + extent)
                here.append(slice(first - origin, last - origin))
                there.append(slice(first - start, last - start))
            out[tuple(there)] = chunk[tuple(here)]
        assert out is not None, "a window without pixels is not read"
        return out[tuple(slice(None) if isinstance(part, slice) else 0 for part in window)]

    def _get(self, place: tuple[int, ...], decode: Callable[[Window], NDArray[Any]]) -> NDArray[Any]:
        with self._lock:
            kept = self._kept.get(place)
            if kept is not None:
                self._kept.move_to_end(place)
                return kept
            waiting = self._decoding.setdefault(place, threading.Lock())
        with waiting:
            with self._lock:
                kept = self._kept.get(place)
            if kept is not None:
                return kept
            bounds = zip(place, self._chunk, self._shape, strict=True)
            try:
                chunk = decode(tuple(slice(p * n, min((p + 1) * n, end)) for p, n, end in bounds))
                self._keep(place, chunk)
            finally:
                with self._lock:
                    self._decoding.pop(place, None)
            return chunk

    def _keep(self, place: tuple[int, ...], chunk: NDArray[Any]) -> None:
        with self._lock:
            while self._kept and (len(self._kept) + 1) * self._chunk_bytes > self._limit:
                self._kept.popitem(last=False)
            self._kept[place] = chunk

    def warn_if_too_small(self, name: str, what: str) -> None:
        """Warn if a chunk is larger than the limit, as it will be decoded for every tile."""
        if self._chunk_bytes > self._limit:
            warnings.warn(
                f"{printable(name)} has {what} of {self._chunk_bytes} bytes, of which {self._limit} are kept "
                "at most: each is decoded again for every tile that meets it; write the image in smaller "
                "ones with streamcnn convert, or give cache_bytes=",
                stacklevel=4,
            )


def span(part: slice | int, extent: int) -> tuple[int, int]:
    """The first index of a window along an axis, and the one after the last."""
    return part.indices(extent)[:2] if isinstance(part, slice) else (part, part + 1)
