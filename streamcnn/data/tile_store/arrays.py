"""Writing of one image as an OME-Zarr 0.5 folder of sharded arrays, shard by shard.

A shard is the unit of writing, and so of memory; an inner chunk is the unit of reading. Codec and chunk size
were chosen with ``benchmarks/tile_codecs.py``.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
import zarr
from torch import Tensor
from zarr.codecs import BloscCodec, Crc32cCodec
from zarr.storage import LocalStore

from streamcnn.data.sources import ImageSource, ZarrSource
from streamcnn.data.tile_store.checks import record_shard
from streamcnn.data.tile_store.format import ShardRecord
from streamcnn.data.tile_store.metadata import chunks_per_shard
from streamcnn.geometry.regions import Interval, Region

CHUNK = 512
"""Edge of an inner chunk in pixels."""
SHARD_BYTES = 2**24
"""Largest number of pixel bytes in a shard: a 4000x4000 image of one byte is one shard."""
_SMALLEST_LEVEL = 1024
"""Edge in pixels below which a viewer needs no further level."""
_MEAN_ROWS = 16
"""Rows of a smaller image that are averaged at a time."""
_RGB = (("R", "FF0000"), ("G", "00FF00"), ("B", "0000FF"))

ZarrArray = zarr.Array[Any]


def num_levels(size: tuple[int, int]) -> int:
    """Number of resolutions that a viewer needs for an image of ``size`` (H, W)."""
    return 1 + max(0, math.ceil(math.log2(max(size) / _SMALLEST_LEVEL)))


def write_image(
    folder: Path,
    source: ImageSource,
    *,
    name: str,
    levels: int,
    on_shard: Callable[[int, int], None] | None = None,
    pixel: tuple[float, float] | None = None,
) -> None:
    """Write ``source`` and its lower resolutions into the empty ``folder``.

    A few shards of ``SHARD_BYTES`` are in memory at a time, whatever the image's size. Each level halves the
    one before by averaging 2x2 pixels. ``on_shard`` is called with the pixels written so far and in total,
    over all levels. ``pixel`` is the height and width of a pixel in pixels of another image that ``source``
    covers exactly; None if there is no such image.

    Raises
    ------
    CorruptImage
        If the source cannot be read.
    OSError
        If the disk is full, or the folder cannot be written to.
    """
    group = zarr.create_group(LocalStore(folder), attributes=_attributes(source, name, levels, pixel))
    smaller, done, total = source, 0, sum(map(math.prod, _level_sizes(source, levels)))
    for level, size in enumerate(_level_sizes(source, levels)):
        array = create_array(group, str(level), smaller)
        for region in shards_of(size, array):
            write_shard(array, region, smaller)
            done += math.prod(region.size)
            if on_shard is not None:
                on_shard(done, total)
        smaller = _Halved(ZarrSource(array, channels_last=False, largest=source.largest))


def _level_sizes(source: ImageSource, levels: int) -> list[tuple[int, int]]:
    """Height and width of each level."""
    _, height, width = source.shape
    return [(-(-height // 2**level), -(-width // 2**level)) for level in range(levels)]


def record_files(folder: Path) -> tuple[dict[str, str], dict[str, ShardRecord]]:
    """SHA-256 of all metadata, and the records of all shards, of a written image."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    files = {path.relative_to(folder).as_posix(): path for path in paths}
    metadata = {key: path.read_bytes() for key, path in files.items() if path.name == "zarr.json"}
    chunks = chunks_per_shard(folder, metadata)
    shards = {
        key: record_shard(path, chunks[key.partition("/")[0]])
        for key, path in files.items()
        if key not in metadata
    }
    return {key: hashlib.sha256(content).hexdigest() for key, content in metadata.items()}, shards


def create_array(group: zarr.Group, path: str, source: ImageSource, *, chunk: int = CHUNK) -> ZarrArray:
    """Create an array for the pixels of ``source``, in shards of whole chunks of edge ``chunk``."""
    shape = source.shape
    dtype = np.dtype(str(source.dtype).removeprefix("torch."))
    return group.create_array(
        path,
        shape=shape,
        chunks=(shape[0], chunk, chunk),
        shards=(shape[0], *shard_size(shape, dtype.itemsize, chunk)),
        dtype=dtype,
        compressors=(
            BloscCodec(cname="zstd", clevel=5, shuffle="bitshuffle", typesize=dtype.itemsize),
            Crc32cCodec(),
        ),
        dimension_names=("c", "y", "x"),
        # Black chunks are written too, so that a missing chunk is a lost one.
        config={"write_empty_chunks": True},
    )


def shard_size(shape: tuple[int, int, int], itemsize: int, chunk: int = CHUNK) -> tuple[int, int]:
    """Height and width of a shard: whole chunks, up to the image's size and ``SHARD_BYTES``."""
    channels, height, width = shape
    most = max(1, math.isqrt(SHARD_BYTES // (channels * itemsize * chunk**2)))
    return min(most, math.ceil(height / chunk)) * chunk, min(most, math.ceil(width / chunk)) * chunk


def write_shard(array: ZarrArray, region: Region, source: ImageSource) -> None:
    """Write the pixels of ``source`` in ``region``, which is one shard."""
    rows, cols = region
    array[:, rows.start : rows.stop, cols.start : cols.stop] = source.read(region).numpy()


def shards_of(size: tuple[int, int], array: ZarrArray) -> Iterator[Region]:
    """The regions of an image of ``size`` (H, W) that are one shard each."""
    assert array.shards is not None
    for top in range(0, size[0], array.shards[1]):
        for left in range(0, size[1], array.shards[2]):
            rows = Interval(top, min(top + array.shards[1], size[0]))
            yield Region(rows, Interval(left, min(left + array.shards[2], size[1])))


class _Halved(ImageSource):
    """An image at half the resolution: means of 2x2 pixels, or of fewer at the far edges."""

    def __init__(self, source: ImageSource) -> None:
        channels, height, width = source.shape
        size = math.ceil(height / 2), math.ceil(width / 2)
        super().__init__((channels, *size), source.dtype, largest=source.largest)
        self._source = source

    def _read(self, region: Region) -> Tensor:
        rows, cols = region
        found = torch.empty((self.shape[0], *region.size), dtype=self.dtype)
        # By rows of chunks, and only a part of each as floats at a time, which take four times as many bytes:
        # large temporary blocks fragment the heap.
        for strip in _parts(rows, CHUNK // 2):
            pixels = self._pixels(Region(strip, cols))
            for part in _parts(Interval(0, strip.size), _MEAN_ROWS):
                there = strip.start - rows.start + part.start
                found[:, there : there + part.size] = self._means(pixels[:, 2 * part.start : 2 * part.stop])
        return found

    def _pixels(self, region: Region) -> Tensor:
        """The pixels of the original image for a region of this one."""
        _, height, width = self._source.shape
        rows, cols = region
        wanted = Region(
            Interval(2 * rows.start, min(2 * rows.stop, height)),
            Interval(2 * cols.start, min(2 * cols.stop, width)),
        )
        return self._source.read(wanted)

    def _means(self, pixels: Tensor) -> Tensor:
        # Exact for integers of up to 32 bits, as the sum of four has less than 53 bits.
        narrow = self.dtype == torch.float32 or self.dtype.itemsize <= 2
        floats = pixels.to(torch.float32 if narrow else torch.float64)
        means = torch.nn.functional.avg_pool2d(floats, 2, ceil_mode=True)
        return means if self.dtype.is_floating_point else means.round_()


def _parts(whole: Interval, extent: int) -> Iterator[Interval]:
    """Divide an interval into parts of ``extent``; the last may be shorter."""
    for start in range(whole.start, whole.stop, extent):
        yield Interval(start, min(start + extent, whole.stop))


def _attributes(
    source: ImageSource, name: str, levels: int, pixel: tuple[float, float] | None
) -> dict[str, Any]:
    """OME-Zarr 0.5 metadata: what napari, vizarr and others need to show the image."""
    axes: list[Mapping[str, str]] = [
        {"name": "c", "type": "channel"},
        {"name": "y", "type": "space"},
        {"name": "x", "type": "space"},
    ]
    datasets = [
        {"path": str(level), "coordinateTransformations": _transformations(level, pixel)}
        for level in range(levels)
    ]
    multiscale = {"name": name, "axes": axes, "datasets": datasets, "type": "mean"}
    ome: dict[str, Any] = {"version": "0.5", "multiscales": [multiscale]}
    if source.dtype == torch.uint8 and source.shape[0] in (1, 3):
        ome["omero"] = {"channels": _channels(source.shape[0], source.largest or 255)}
    return {"ome": ome}


def _transformations(level: int, pixel: tuple[float, float] | None) -> list[dict[str, Any]]:
    """Transformations of a level's pixel coordinates, by pixels' centres, as in OME-Zarr and napari."""
    height, width = (edge * 2.0**level for edge in pixel or (1.0, 1.0))
    scale = {"type": "scale", "scale": [1.0, height, width]}
    if pixel is None:
        return [scale]
    return [scale, {"type": "translation", "translation": [0.0, (height - 1) / 2, (width - 1) / 2]}]


def _channels(count: int, largest: int) -> list[dict[str, Any]]:
    """Display settings for grey or red, green and blue, with ``largest`` as the brightest value."""
    colours = _RGB if count == 3 else (("grey", "FFFFFF"),)
    window = {"min": 0, "max": largest, "start": 0, "end": largest}
    return [{"label": label, "color": colour, "active": True, "window": window} for label, colour in colours]
