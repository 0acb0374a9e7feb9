"""Decoders of zarr chunks that stop at a chunk's size.

Nine kilobytes can inflate to gigabytes. The size that a chunk in blosc, lz4 or zstd announces is compared
with its size in the array before a byte is decoded. gzip, zlib, bz2 and lzma announce none, and are decoded
no further than that size. zstd without a size is decoded into a buffer of the chunk's size. Other codecs are
called as they are.
"""

from __future__ import annotations

import asyncio
import bz2
import lzma
import math
import zlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numcodecs
import numpy as np
from numcodecs.compat import ensure_bytes
from zarr.abc.codec import BytesBytesCodec, Codec
from zarr.codecs import BloscCodec, BytesCodec, GzipCodec, ShardingCodec, ZstdCodec
from zarr.core.array_spec import ArraySpec
from zarr.core.buffer import Buffer
from zarr.core.metadata import ArrayV2Metadata, ArrayV3Metadata

from streamcnn.errors import CorruptImage, DatasetMismatch

SLACK_BYTES = 2**16
"""Bytes allowed for headers, checksums and a small shard's index, besides the pixels."""
_WIDEST_FILTER = 8
"""Largest factor by which a filter of zarr v2 may widen pixels, as from one byte to float64."""
_LZMA_BYTES = 2**28
_ZSTD_MAGIC = b"\x28\xb5\x2f\xfd"
_RUNS_CODE = "pickle"


def most_stored(nbytes: int) -> int:
    """Largest stored size in bytes of a chunk with ``nbytes`` of pixels."""
    return 2 * nbytes + SLACK_BYTES


def bounded(name: str, metadata: ArrayV2Metadata | ArrayV3Metadata) -> ArrayV2Metadata | ArrayV3Metadata:
    """The metadata with decoders that stop at a chunk's size.

    Raises
    ------
    DatasetMismatch
        If chunks are pickles, which run code when they are read.
    """
    if isinstance(metadata, ArrayV3Metadata):
        return replace(metadata, codecs=_bounded_codecs(name, metadata.codecs))
    codecs = [*(metadata.filters or ()), *((metadata.compressor,) if metadata.compressor else ())]
    _check_harmless(name, [codec.codec_id for codec in codecs])
    nbytes = math.prod(metadata.chunks) * metadata.dtype.to_native_dtype().itemsize
    limit = most_stored(_WIDEST_FILTER * nbytes) if metadata.filters else nbytes
    wrapped = [_BoundedNumcodec(codec, limit, is_exact=not metadata.filters) for codec in codecs]
    filters = tuple(wrapped[: len(metadata.filters or ())])
    compressor = wrapped[-1] if metadata.compressor else None
    return replace(metadata, filters=filters or None, compressor=compressor)


def _bounded_codecs(name: str, codecs: tuple[Codec, ...]) -> tuple[Codec, ...]:
    out: list[Codec] = []
    for position, codec in enumerate(codecs):
        numcodec = _numcodec(codec)
        if numcodec is not None:
            _check_harmless(name, [numcodec.codec_id])
        if isinstance(codec, ShardingCodec):
            out.append(replace(codec, codecs=_bounded_codecs(name, codec.codecs)))
        elif isinstance(codec, BytesBytesCodec) and numcodec is not None:
            is_innermost = isinstance(codecs[position - 1], BytesCodec)
            out.append(_BoundedCodec(codec, numcodec, is_innermost))
        else:
            out.append(codec)
    return tuple(out)


def _check_harmless(name: str, ids: list[str]) -> None:
    if _RUNS_CODE in ids:
        raise DatasetMismatch(
            f"{name} has chunks that are pickles, which run code when they are read: allowed are numbers; "
            "write it again without the codec 'pickle'"
        )


def _numcodec(codec: Codec) -> Any:
    """The numcodecs decoder inside a codec of zarr v3; None if there is none."""
    for kind, of_numcodecs in (
        (ZstdCodec, numcodecs.Zstd),
        (BloscCodec, numcodecs.Blosc),
        (GzipCodec, numcodecs.GZip),
    ):
        if isinstance(codec, kind):
            return of_numcodecs()
    settings = getattr(codec, "codec_config", None)
    return None if settings is None else numcodecs.get_codec(dict(settings))


@dataclass(frozen=True)
class _BoundedCodec(BytesBytesCodec):
    """A codec of zarr v3 that decodes at most its chunk's size."""

    codec: BytesBytesCodec
    numcodec: Any
    is_innermost: bool
    """Whether it returns the chunk's pixels, of which the number of bytes is exact."""

    is_fixed_size = False

    def to_dict(self) -> dict[str, Any]:
        return self.codec.to_dict()

    async def _decode_single(self, chunk_data: Buffer, chunk_spec: ArraySpec) -> Buffer:
        nbytes = math.prod(chunk_spec.shape) * chunk_spec.dtype.to_native_dtype().itemsize
        limit = nbytes if self.is_innermost else most_stored(nbytes)
        data = chunk_data.as_numpy_array()
        decoded = await asyncio.to_thread(decode, self.numcodec, data, limit, is_exact=self.is_innermost)
        return chunk_spec.prototype.buffer.from_bytes(ensure_bytes(decoded))

    def compute_encoded_size(self, input_byte_length: int, chunk_spec: ArraySpec) -> int:
        raise NotImplementedError  # zarr's convention for a size that is not known in advance


class _BoundedNumcodec(numcodecs.abc.Codec):  # type: ignore[misc]  # numcodecs has no types
    """A codec of zarr v2 that decodes at most its chunk's size."""

    codec_id = "bounded"

    def __init__(self, codec: Any, limit: int, *, is_exact: bool) -> None:
        self._codec = codec
        self._limit = limit
        self._is_exact = is_exact

    def encode(self, buf: Any) -> Any:
        return self._codec.encode(buf)

    def decode(self, buf: Any, out: Any = None) -> Any:
        return decode(self._codec, buf, self._limit, is_exact=self._is_exact)

    def get_config(self) -> dict[str, Any]:
        config: dict[str, Any] = self._codec.get_config()
        return config


def decode(codec: Any, data: Any, limit: int, *, is_exact: bool) -> Any:
    """Decode ``data`` with a codec of numcodecs, to at most ``limit`` bytes.

    Parameters
    ----------
    is_exact : whether the result must have exactly ``limit`` bytes

    Raises
    ------
    CorruptImage
        If the result would have more, or the data are cut short or do not tell a size that is needed.
    """
    start = _STREAMS.get(codec.codec_id)
    if start is not None:
        return _inflate(lambda: start(codec), ensure_bytes(data), limit)
    announced = _announced(codec.codec_id, ensure_bytes(data[:_LONGEST_HEADER]))
    if announced is not None:
        if announced > limit:
            raise _too_much(announced, limit)
    elif codec.codec_id == "zstd":
        if not is_exact:
            raise CorruptImage("a chunk of zstd inside of other codecs does not say how long it is")
        return codec.decode(data, np.empty(limit, np.uint8))
    return codec.decode(data)


_LONGEST_HEADER = 18
_Decompressor = Any
_STREAMS: dict[str, Callable[[Any], _Decompressor]] = {
    "gzip": lambda codec: zlib.decompressobj(31),
    "zlib": lambda codec: zlib.decompressobj(),
    "bz2": lambda codec: bz2.BZ2Decompressor(),
    "lzma": lambda codec: lzma.LZMADecompressor(
        codec.format,
        None if codec.format == lzma.FORMAT_RAW else _LZMA_BYTES,
        codec.filters if codec.format == lzma.FORMAT_RAW else None,
    ),
}


def _inflate(start: Callable[[], _Decompressor], data: bytes, limit: int) -> bytes:
    """Decompress all streams in ``data``, one after the other."""
    pieces, total = [], 0
    while True:
        stream = start()
        piece = stream.decompress(data, limit - total + 1)
        total += len(piece)
        if total > limit:
            raise _too_much(total, limit)
        pieces.append(piece)
        if not stream.eof:
            raise CorruptImage("a chunk is cut short; copy the image again")
        data = stream.unused_data.lstrip(b"\0")  # gzip allows zeros after the last
        if not data:
            return b"".join(pieces)


def _announced(codec_id: str, head: bytes) -> int | None:
    """The decompressed size that a chunk announces; None if it announces none."""
    match codec_id:
        case "blosc":
            return int.from_bytes(head[4:8], "little")
        case "lz4":
            return int.from_bytes(head[:4], "little")
        case "zstd" if head[:4] == _ZSTD_MAGIC:
            return _announced_by_zstd(head)
    return None


def _announced_by_zstd(head: bytes) -> int | None:
    """The size in zstd's frame header: RFC 8878, section 3.1.1.1."""
    descriptor = head[4]
    is_single, size_flag = bool(descriptor & 0x20), descriptor >> 6
    num_bytes = (int(is_single), 2, 4, 8)[size_flag]
    if num_bytes == 0:
        return None
    start = 5 + (not is_single) + (0, 1, 2, 4)[descriptor & 3]
    size = int.from_bytes(head[start : start + num_bytes], "little")
    return size + 256 if num_bytes == 2 else size


def _too_much(found: int, limit: int) -> CorruptImage:
    return CorruptImage(
        f"a chunk inflates to {found} bytes or more, its array has place for {limit}; copy the image again"
    )
