"""A zarr store that raises where zarr would mistake damage for an area that was never written.

Zarr reads missing data as the array's fill value: a chunk that was never written, but also one that was lost,
an empty shard file, and an inner chunk beyond the end of its shard. Through `GuardedStore`, the last two are
always errors, and so is a missing chunk once the whole array is gone. With ``missing="error"``, all missing
chunks are errors. This reads nothing that zarr does not read. A chunk that is larger than possible is an
error too: as stored, before it is read, unless only a network request would tell its size; as decoded, by
``streamcnn.data.sources.inflating``.
"""

from __future__ import annotations

import itertools
import math
import operator
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import zarr
from numpy.typing import NDArray
from zarr.abc.store import ByteRequest, RangeByteRequest, Store, SuffixByteRequest
from zarr.codecs import BytesCodec, Crc32cCodec, ShardingCodec
from zarr.core.buffer import Buffer, BufferPrototype
from zarr.storage import StorePath, WrapperStore

from streamcnn.data.sources.chunk_cache import Window, span
from streamcnn.data.sources.inflating import SLACK_BYTES, bounded, most_stored
from streamcnn.data.sources.places import check_stored
from streamcnn.errors import CorruptImage, DatasetMismatch

ZarrArray = zarr.Array[Any]  # of either format version
MissingChunks = Literal["some", "fill", "error"]

_MOST_IN_SHARD = 2**20
_EMPTY = np.iinfo(np.uint64).max

Coordinates = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class ShardIndex:
    """The location and encoding of a shard's index of inner chunks."""

    chunks_per_shard: tuple[int, ...]
    nbytes: int
    at_start: bool
    dtype: np.dtype[np.uint64]

    def is_in(self, byte_range: ByteRequest | None) -> bool:
        """Whether a byte range that zarr requests from a shard holds the index."""
        return not isinstance(byte_range, RangeByteRequest) or (self.at_start and byte_range.start == 0)

    def empty_chunks(self, read: NDArray[np.uint8]) -> frozenset[Coordinates]:
        """The inner chunks that were never written, from the bytes read: the index, or the whole shard."""
        index = read[: self.nbytes] if self.at_start else read[-self.nbytes :]
        places = index[: 16 * math.prod(self.chunks_per_shard)].tobytes()
        entries = np.frombuffer(places, self.dtype).reshape(*self.chunks_per_shard, 2)
        empty = np.argwhere((entries == _EMPTY).all(axis=-1))
        return frozenset(tuple(map(int, position)) for position in empty)


@dataclass(frozen=True, slots=True)
class StoredBytes:
    """Largest numbers of bytes that chunks can take as stored."""

    file: int
    """For the file of a chunk or a shard."""
    range: int
    """For a range within a shard: its index, or an inner chunk."""

    @classmethod
    def of(cls, name: str, array: ZarrArray) -> StoredBytes:
        """The limits for the chunks and shards of an array.

        Raises
        ------
        DatasetMismatch
            If a shard holds too many chunks.
        """
        chunk = most_stored(math.prod(array.chunks) * array.dtype.itemsize)
        if array.shards is None:
            return cls(chunk, chunk)
        num_chunks = math.prod(map(operator.floordiv, array.shards, array.chunks))
        if num_chunks > _MOST_IN_SHARD:
            raise DatasetMismatch(
                f"{name} has shards of {num_chunks} chunks: allowed are {_MOST_IN_SHARD}, for where they lie "
                "is read whole; write it with larger chunks or smaller shards"
            )
        index = 16 * num_chunks + SLACK_BYTES
        shard = most_stored(math.prod(array.shards) * array.dtype.itemsize)
        return cls(shard + index, max(chunk, index))


class GuardedStore(WrapperStore[Store]):
    """A store of one array that raises for truncated and missing data."""

    def __init__(
        self,
        store: Store,
        metadata_key: str,
        missing: MissingChunks,
        index: ShardIndex | None,
        most: StoredBytes,
    ) -> None:
        super().__init__(store)
        self._metadata_key = metadata_key
        self._missing = missing
        self._index = index
        self._most = most
        self._empty_chunks: dict[str, frozenset[Coordinates]] = {}

    def _with_store(self, store: Store) -> GuardedStore:
        return GuardedStore(store, self._metadata_key, self._missing, self._index, self._most)

    def __str__(self) -> str:
        return str(self._store)

    async def get(
        self, key: str, prototype: BufferPrototype, byte_range: ByteRequest | None = None
    ) -> Buffer | None:
        """The bytes under ``key``.

        Raises
        ------
        CorruptImage
            If there are fewer than requested or more than possible, ``key`` is a pipe, a socket or a device,
            or it is missing and must not be.
        """
        if isinstance(byte_range, RangeByteRequest):
            self._check_range(key, byte_range)
        check_stored(self._store, key, self._most.file if byte_range is None else None)
        found = await self._store.get(key, prototype, byte_range)
        if found is None:
            await self._check_may_be_missing(key)
        elif isinstance(byte_range, RangeByteRequest | SuffixByteRequest) and len(found) > _least(byte_range):
            raise CorruptImage(
                f"the server sends all of {key} where a part is asked for (it answers no range requests): "
                "download the image, or put it on a server that does"
            )
        elif len(found) < _least(byte_range):
            raise CorruptImage(f"chunk {key} is cut short; copy the image again")
        elif self._index is not None and self._index.is_in(byte_range):
            self._empty_chunks[key] = self._index.empty_chunks(found.as_numpy_array())
        return found

    def _check_range(self, key: str, byte_range: RangeByteRequest) -> None:
        length = byte_range.end - byte_range.start
        if length > self._most.range:
            raise CorruptImage(
                f"shard {key} says of a chunk that it takes {length} bytes, allowed are {self._most.range}; "
                "copy the image again"
            )

    async def _check_may_be_missing(self, key: str) -> None:
        if self._missing == "error":
            raise _missing(key)
        if not await self._store.exists(self._metadata_key):
            raise CorruptImage(f"the array is gone since it was opened ({self._metadata_key}); put it back")

    def check_window(self, array: ZarrArray, window: Window) -> None:
        """Raise `CorruptImage` if an inner chunk under ``window``, which was just read, was never written."""
        if self._index is None or not any(self._empty_chunks.values()):
            return
        for chunk in _chunks_under(window, array.chunks, array.shape):
            pairs = list(map(divmod, chunk, self._index.chunks_per_shard))
            key = array.metadata.encode_chunk_key(tuple(shard for shard, _ in pairs))
            key = f"{array.path}/{key}" if array.path else key
            if tuple(inner for _, inner in pairs) in self._empty_chunks.get(key, ()):
                raise _missing(f"{chunk} in shard {key}")


def guarded(name: str, array: ZarrArray, missing: MissingChunks) -> tuple[ZarrArray, GuardedStore]:
    """The array, read through a guarded store, and that store.

    Raises
    ------
    DatasetMismatch
        If inner chunks must not be missing and the array's shards cannot be inspected, a shard holds too many
        chunks, or chunks are pickles.
    """
    metadata = "zarr.json" if array.metadata.zarr_format == 3 else ".zarray"
    key = f"{array.path}/{metadata}" if array.path else metadata
    index = _shard_index(name, array) if missing == "error" else None
    store = GuardedStore(array.store, key, missing, index, StoredBytes.of(name, array))
    # Its metadata is known; opening it with zarr would read it again, which takes as long as a small image.
    decoded: Any = bounded(name, array.metadata)
    return zarr.Array(zarr.AsyncArray(decoded, StorePath(store, array.path))), store


def _shard_index(name: str, array: ZarrArray) -> ShardIndex | None:
    codecs = getattr(array.metadata, "codecs", ())
    sharding = [codec for codec in codecs if isinstance(codec, ShardingCodec)]
    if not sharding:
        return None
    codec, shards = sharding[0], array.shards
    order, *checksums = codec.index_codecs
    if (
        shards is None
        or any(isinstance(inner, ShardingCodec) for inner in codec.codecs)
        or not isinstance(order, BytesCodec)
        or not all(isinstance(checksum, Crc32cCodec) for checksum in checksums)
    ):
        raise DatasetMismatch(
            f"{name} has shards inside of other codecs, or an index that is no plain list: their missing "
            'chunks cannot be told; open it with missing_chunks="fill"'
        )
    per_shard = tuple(shard // chunk for shard, chunk in zip(shards, codec.chunk_shape, strict=True))
    big = getattr(order.endian, "value", order.endian) == "big"
    return ShardIndex(
        per_shard,
        nbytes=16 * math.prod(per_shard) + 4 * len(checksums),
        at_start=codec.index_location.value == "start",
        dtype=np.dtype(">u8" if big else "<u8"),
    )


def _least(byte_range: ByteRequest | None) -> int:
    """Least number of bytes that a request for this range must return."""
    if isinstance(byte_range, RangeByteRequest):
        return byte_range.end - byte_range.start
    return byte_range.suffix if isinstance(byte_range, SuffixByteRequest) else 1


def _chunks_under(window: Window, chunks: Coordinates, shape: Coordinates) -> Iterator[Coordinates]:
    spans = []
    for part, size, extent in zip(window, chunks, shape, strict=True):
        start, stop = span(part, extent)
        spans.append(range(start // size, -(-stop // size)))
    return itertools.product(*spans)


def _missing(what: str) -> CorruptImage:
    return CorruptImage(
        f"chunk {what} is missing: it was lost or never written; copy the image again, or open it with "
        'missing_chunks="fill" if its empty areas were left out on purpose'
    )
