"""The names of an array's chunks, where metadata is missing or wrong.

Zarr v2 marks nested chunks, ``0/1/2``, by a key that older writers left out. Such an array, looked up under
``0.1.2``, would read as fill value everywhere.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import AsyncIterator
from dataclasses import replace
from typing import Any

import zarr
from zarr.core.chunk_key_encodings import ChunkKeyEncoding, DefaultChunkKeyEncoding, V2ChunkKeyEncoding
from zarr.core.metadata import ArrayV2Metadata
from zarr.core.sync import sync
from zarr.storage import FsspecStore, StorePath

from streamcnn.data.sources.places import base_store
from streamcnn.errors import CorruptImage

_ENCODINGS: tuple[ChunkKeyEncoding, ...] = (
    DefaultChunkKeyEncoding(separator="/"),
    DefaultChunkKeyEncoding(separator="."),
    V2ChunkKeyEncoding(separator="/"),
    V2ChunkKeyEncoding(separator="."),
)
_NUM_PROBED = 27
"""Number of chunks that are requested if a place cannot be listed."""

ZarrArray = zarr.Array[Any]


def with_present_chunks(name: str, array: ZarrArray, *, may_be_empty: bool) -> ZarrArray:
    """The array, with the chunk names under which its chunks exist.

    The metadata's names are tried first. If a place cannot be listed, as over HTTP, some chunks are
    requested, and an array of many chunks is not refused.

    Raises
    ------
    CorruptImage
        If no chunk exists under any name, unless the array ``may_be_empty``.
    """
    own = _own_encoding(array)
    if own is None or 0 in array.shape:
        return array
    others = [encoding for encoding in _ENCODINGS if encoding != own]
    can_list = array.store.supports_listing and not isinstance(base_store(array.store), FsspecStore)
    found, is_certain = sync((_listed if can_list else _probed)(array, [own, *others]))
    if found is not None:
        return array if found == own else _renamed(array, found)
    if may_be_empty or not is_certain:
        return array
    raise CorruptImage(
        f"{name} has none of its {math.prod(_grid(array))} chunks, such as {_key(array, own)}: they were "
        "lost, never written or are named otherwise; copy the image again, or if it is empty on purpose "
        'write it with write_empty_chunks, or open it with missing_chunks="fill", and a mask with '
        "empty_masks=True"
    )


def _own_encoding(array: ZarrArray) -> ChunkKeyEncoding | None:
    """The metadata's encoding of chunk names; None if it is not known here."""
    metadata = array.metadata
    if isinstance(metadata, ArrayV2Metadata):
        return V2ChunkKeyEncoding(separator=metadata.dimension_separator)
    return metadata.chunk_key_encoding if metadata.chunk_key_encoding in _ENCODINGS else None


def _renamed(array: ZarrArray, encoding: ChunkKeyEncoding) -> ZarrArray:
    metadata = array.metadata
    changed: Any
    if isinstance(metadata, ArrayV2Metadata):
        changed = replace(metadata, dimension_separator=encoding.separator)  # type: ignore[attr-defined]
    else:
        changed = replace(metadata, chunk_key_encoding=encoding)
    return zarr.Array(zarr.AsyncArray(changed, StorePath(array.store, array.path)))


def _grid(array: ZarrArray) -> tuple[int, ...]:
    """Number of chunks, or shards, along each axis."""
    stored = array.shards or array.chunks
    return tuple(-(-extent // size) for extent, size in zip(array.shape, stored, strict=True))


def _key(array: ZarrArray, encoding: ChunkKeyEncoding) -> str:
    return encoding.encode_chunk_key((0,) * len(array.shape))


async def _listed(
    array: ZarrArray, encodings: list[ChunkKeyEncoding]
) -> tuple[ChunkKeyEncoding | None, bool]:
    """The first of ``encodings`` that a listed chunk matches, and whether the answer is certain."""
    patterns = [_pattern(array, encoding) for encoding in encodings]
    prefix = f"{array.path}/" if array.path else ""
    found: set[int] = set()
    keys: AsyncIterator[str] = array.store.list_prefix(prefix)
    async for key in keys:
        for number, pattern in enumerate(patterns):
            if _is_chunk(array, pattern.fullmatch(key.removeprefix(prefix))):
                if number == 0:
                    return encodings[0], True
                found.add(number)
    return (encodings[min(found)] if found else None), True


def _pattern(array: ZarrArray, encoding: ChunkKeyEncoding) -> re.Pattern[str]:
    zeros = re.escape(_key(array, encoding))
    return re.compile(zeros.replace("0", r"(\d{1,18})"))


def _is_chunk(array: ZarrArray, match: re.Match[str] | None) -> bool:
    if match is None:
        return False
    return all(int(place) < count for place, count in zip(match.groups(), _grid(array), strict=True))


async def _probed(
    array: ZarrArray, encodings: list[ChunkKeyEncoding]
) -> tuple[ChunkKeyEncoding | None, bool]:
    """The first of ``encodings`` under which a chunk exists, and whether the answer is certain.

    That no chunk was found is certain only if all chunks were requested.
    """
    spread = [sorted({0, count // 2, count - 1}) for count in _grid(array)]
    places = list(itertools.islice(itertools.product(*spread), _NUM_PROBED))
    prefix = f"{array.path}/" if array.path else ""
    for encoding in encodings:
        for place in places:
            if await array.store.exists(prefix + encoding.encode_chunk_key(place)):
                return encoding, True
    return None, len(places) == math.prod(_grid(array))
