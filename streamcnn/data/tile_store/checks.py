"""Comparison of a store's bytes with its manifest.

Zarr's codec compares each inner chunk with the checksum stored beside it. That detects a flipped bit, but not
a file that was exchanged for another intact one, or an index that lost a chunk. So the manifest also keeps
these checksums, and they are compared for every range that is read, without reading more.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Mapping
from pathlib import Path

import google_crc32c
import numpy as np
from zarr.abc.store import ByteRequest, RangeByteRequest
from zarr.core.buffer import Buffer, BufferPrototype
from zarr.storage import LocalStore, WrapperStore

from streamcnn.data.sources.places import check_stored
from streamcnn.data.tile_store.format import ShardRecord
from streamcnn.errors import CorruptImage
from streamcnn.support.documents import read_within

CHECKSUM_BYTES = 4
_ENTRY = np.dtype("<u8")
_ABSENT = np.uint64(2**64 - 1)


class CheckedStore(WrapperStore[LocalStore]):
    """A store of one image's folder that compares every range read from a shard with ``shards``."""

    def __init__(
        self, store: LocalStore, shards: Mapping[str, ShardRecord], chunks_per_shard: Mapping[str, int]
    ) -> None:
        super().__init__(store)
        self._shards = shards
        self._chunks_per_shard = chunks_per_shard
        self._checksums: dict[str, dict[int, bytes]] = {}

    def __str__(self) -> str:
        return str(self._store.root)

    def _with_store(self, store: LocalStore) -> CheckedStore:
        return CheckedStore(store, self._shards, self._chunks_per_shard)

    async def get(
        self, key: str, prototype: BufferPrototype, byte_range: ByteRequest | None = None
    ) -> Buffer | None:
        """The bytes under ``key``, as they were written.

        Raises
        ------
        CorruptImage
            If a shard is missing, or its content has changed.
        """
        try:
            check_stored(self._store, key, None)
            found = await self._store.get(key, prototype, byte_range)
        except FileNotFoundError:  # the whole folder is gone
            found = None
        if key not in self._shards:
            return found
        if found is None:
            raise CorruptImage(f"shard {key} is missing")
        content = found.as_numpy_array()
        shard, num_chunks = self._shards[key], self._chunks_per_shard[key.partition("/")[0]]
        if isinstance(byte_range, RangeByteRequest):
            checksum = self._checksums.get(key, {}).get(byte_range.end)
            if content[-CHECKSUM_BYTES:].tobytes() != checksum:
                raise _changed(f"a chunk of shard {key}")
        elif byte_range is None:
            check_shard(content.tobytes(), shard, num_chunks, key)
        else:
            # The index, which is read before the chunks.
            self._checksums[key] = _checksums_by_end(content.tobytes(), shard, key)
        return found


def index_bytes(num_chunks: int) -> int:
    """Size of a shard's index: offset and length of each inner chunk, and a checksum."""
    return 2 * _ENTRY.itemsize * num_chunks + CHECKSUM_BYTES


def record_shard(path: Path, num_chunks: int) -> ShardRecord:
    """The record of a shard file, from its index and checksums alone."""
    with path.open("rb") as file:
        size = path.stat().st_size
        file.seek(size - index_bytes(num_chunks))
        index = file.read()
        checksums = []
        for end in _ends(index):
            file.seek(end - CHECKSUM_BYTES)
            checksums.append(file.read(CHECKSUM_BYTES))
    return ShardRecord(
        nbytes=size,
        index_crc32c=index[-CHECKSUM_BYTES:].hex(),
        chunk_crc32c=base64.b64encode(b"".join(checksums)).decode(),
    )


def check_shard(content: bytes, shard: ShardRecord, num_chunks: int, key: str) -> None:
    """Compare a whole shard with its record: index, and each inner chunk with its checksum.

    Raises
    ------
    CorruptImage
        If they differ; the text names the shard and the first differing chunk.
    """
    if len(content) != shard.nbytes:
        raise CorruptImage(f"shard {key} has {len(content)} bytes, the manifest says {shard.nbytes}")
    index = content[-index_bytes(num_chunks) :]
    ends = _checksums_by_end(index, shard, key)
    start = 0
    for position, (end, checksum) in enumerate(ends.items()):
        chunk = content[start:end]
        if chunk[-CHECKSUM_BYTES:] != checksum or crc32c(chunk[:-CHECKSUM_BYTES]) != checksum:
            raise _changed(f"chunk {position} in shard {key} (bytes {start}..{end})")
        start = end


def check_metadata(store: Path, path: Path, sha256: str) -> bytes:
    """The content of a ``zarr.json``, compared with its checksum.

    Raises
    ------
    CorruptImage
        If it is missing, unreadable or changed, or is a link that leads out of ``store``.
    """
    try:
        content = read_within(store, path, error=CorruptImage)
    except CorruptImage:
        raise
    except OSError as error:
        raise CorruptImage(f"cannot read {path}: {error.strerror}; copy the store again") from error
    if hashlib.sha256(content).hexdigest() != sha256:
        raise CorruptImage(
            f"{path} was changed after the manifest was written (its SHA-256 differs); copy the store again"
        )
    return content


def crc32c(content: bytes) -> bytes:
    """The checksum of ``content`` as zarr's codec stores it."""
    return int(google_crc32c.value(content)).to_bytes(CHECKSUM_BYTES, "little")


def _checksums_by_end(index: bytes, shard: ShardRecord, key: str) -> dict[int, bytes]:
    """The checksum of each inner chunk by the offset at which it ends, in the order of the file."""
    if index[-CHECKSUM_BYTES:].hex() != shard.index_crc32c or crc32c(index[:-CHECKSUM_BYTES]).hex() != (
        shard.index_crc32c
    ):
        raise _changed(f"the index of shard {key}")
    ends, checksums = _ends(index), shard.chunk_checksums()
    if len(ends) != len(checksums):
        raise CorruptImage(f"shard {key} has {len(ends)} chunks, the manifest says {len(checksums)}")
    return dict(zip(ends, checksums, strict=True))


def _ends(index: bytes) -> list[int]:
    """Offsets at which existing inner chunks end, in ascending order."""
    entries = np.frombuffer(index[:-CHECKSUM_BYTES], _ENTRY).reshape(-1, 2)
    present = entries[entries[:, 0] != _ABSENT]
    return sorted(int(offset + length) for offset, length in present)


def _changed(what: str) -> CorruptImage:
    return CorruptImage(f"{what} is not what the manifest says: it was damaged or changed; copy it again")
