"""Images in zarr arrays, alone or as levels of an OME-Zarr image."""

from __future__ import annotations

import functools
import math
import pickle
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, final

import numpy as np
import torch
import zarr
from numpy.typing import NDArray
from torch import Tensor
from zarr.codecs import ZstdCodec
from zarr.storage import LocalStore, MemoryStore

from streamcnn.data.sources.axes import Axes, array_axes
from streamcnn.data.sources.base import FileSource
from streamcnn.data.sources.chunk_cache import CACHE_BYTES, ChunkCache, Window
from streamcnn.data.sources.chunk_keys import with_present_chunks
from streamcnn.data.sources.costs import chunked_cost, described
from streamcnn.data.sources.files import MAX_PIXELS, PerProcess, check_piece, check_shape, opening
from streamcnn.data.sources.guard import GuardedStore, MissingChunks, ZarrArray, guarded
from streamcnn.data.sources.layout import Layout, layout_by_names, layout_by_shape, torch_dtype
from streamcnn.data.sources.ome import level_spacing, open_level
from streamcnn.data.sources.placement import Placement
from streamcnn.data.sources.places import base_store, place, zarr_store
from streamcnn.data.sources.remote import trouble
from streamcnn.data.sources.threads import start_zarr_threads
from streamcnn.errors import CorruptImage, DatasetMismatch
from streamcnn.geometry.regions import Region
from streamcnn.plan.reading import ReadingCost
from streamcnn.support.text import without_secrets

CHUNK = 512
"""Rows and columns of the chunks that are written."""
_CHUNK_COPIES = 2
"""A chunk as stored, which need not be smaller, and decoded."""


@final
class ZarrSource(FileSource):
    """An image in a zarr array or OME-Zarr group, of which only the chunks under a region are read.

    Chunks of 4 MiB and more that are larger than the part that is read are kept, decoded, in a cache; others
    are decoded each time.

    Parameters
    ----------
    array_or_path : zarr array, or folder, zip file or URL of one or of an OME-Zarr image
        OME metadata, ``dimension_names`` or xarray's ``_ARRAY_DIMENSIONS`` name its axes: rows and columns,
        in any order, and channels; others, such as time or depth, may have extent 1. Without names, two axes
        ``(H, W)`` are one channel; three are ``(C, H, W)`` or ``(H, W, C)``.
    channels_last : bool, optional
        Which of the two a three-axis array without names is, or whether an axis of an unknown name is the
        channels. By default the shape decides, if it leaves no doubt.
    level : resolution of an OME-Zarr image; 0 is full
    series : which of several images, as bioformats2raw writes them
        By default the first that is not a slide's label or overview.
    index : plane to take of each other axis longer than 1, by the axis's name
    missing_chunks : ``"some"``, ``"fill"`` or ``"error"``
        Whether a missing chunk reads as the array's fill value, which is how zarr stores constant areas, or
        raises `CorruptImage` (``"error"``). With ``"some"``, an array without any chunk is refused on
        opening; with ``"fill"`` it is not. Images written by `write_zarr_image` have all their chunks; other
        writers leave out those that hold only the fill value, unless told to ``write_empty_chunks``.
    max_pixels : largest chunk, in pixels, that may be decoded
    cache_bytes : limit on kept bytes of decoded chunks
    largest : largest possible value of a pixel, if below its dtype's, which no zarr array stores

    Raises
    ------
    CorruptImage
        If there is no zarr array or OME-Zarr image at the path, its metadata cannot be read, or all of its
        chunks are missing.
    DatasetMismatch
        If the image has other or uncertain axes, no such level, series or plane, or too large chunks, or
        PyTorch lacks its dtype.
    MissingExtra
        If reading from a URL needs a package that is not installed.
    """

    def __init__(
        self,
        array_or_path: ZarrArray | str | Path,
        *,
        channels_last: bool | None = None,
        level: int = 0,
        series: int | None = None,
        index: Mapping[str, int] | None = None,
        missing_chunks: MissingChunks = "some",
        max_pixels: int = MAX_PIXELS,
        cache_bytes: int = CACHE_BYTES,
        largest: int | None = None,
    ) -> None:
        if missing_chunks not in ("some", "fill", "error"):
            raise ValueError(f'missing_chunks={missing_chunks!r}: allowed are "some", "fill" and "error"')
        self._request = functools.partial(
            ZarrSource,
            array_or_path,
            channels_last=channels_last,
            level=level,
            series=series,
            index=None if index is None else dict(index),
            missing_chunks=missing_chunks,
            max_pixels=max_pixels,
            cache_bytes=cache_bytes,
            largest=largest,
        )
        name = _name(array_or_path, level, series)
        array, axes = _open(name, array_or_path, level, series)
        self._layout = _layout(name, array, axes, channels_last, index)
        shape = self._layout.image_shape(array.shape)
        check_shape(name, shape)
        _check_chunks(name, array, self._layout, max_pixels)
        dtype = torch_dtype(name, array.dtype)
        with opening(name, "zarr array"):
            self._guarded = PerProcess(_Guarding(name, array, missing_chunks))
            self._guarded.get()
            if missing_chunks != "fill" or array.metadata.zarr_format == 2:  # v3 stores how chunks are named
                array = with_present_chunks(name, array, may_be_empty=missing_chunks == "fill")
                self._guarded = PerProcess(_Guarding(name, array, missing_chunks))
        self._array = array
        cache = functools.partial(ChunkCache, array.chunks, array.shape, array.dtype.itemsize, cache_bytes)
        self._caches = PerProcess(cache)
        self._caches.get().warn_if_too_small(name, "chunks")
        super().__init__(shape, dtype, name, largest=largest)

    @property
    def chunks(self) -> tuple[int, ...]:
        """Extents of the array's chunks in pixels, in the array's own axis order."""
        return self._array.chunks

    @property
    def held_bytes(self) -> int:
        """Bytes of decoded chunks that the source keeps in memory now."""
        return self._caches.get().held_bytes()

    @property
    def most_held_bytes(self) -> int:
        """Largest number of bytes of decoded chunks that the source may keep."""
        return self._caches.get().most_bytes()

    @property
    def pieces(self) -> str:
        """Text on the chunks, with their extents in the array's own axis order."""
        return described("zarr chunks", self.chunks)

    @property
    def reading_cost(self) -> ReadingCost:
        """Chunks under a region, as stored and decoded, and those kept.

        For an array with shards, all chunks under a region are in memory at once, else a few at a time.
        """
        array = self._array
        at_once = zarr.config.get("async.concurrency") if array.shards is None else None
        cost = chunked_cost(
            self._layout,
            array.shape,
            array.chunks,
            array.dtype,
            copies=_CHUNK_COPIES,
            at_once=at_once,
        )
        return replace(cost, held=self.most_held_bytes)

    @property
    def placement(self) -> Placement:
        """The size of a pixel of this level, from OME-Zarr metadata."""
        (array_or_path,), chosen = self._request.args, self._request.keywords
        node = array_or_path if isinstance(array_or_path, zarr.Array) else open_node(array_or_path)
        if isinstance(node, zarr.Array):
            return super().placement
        spacing, unit = level_spacing(self.name, node, chosen["level"], chosen["series"]) or (None, "")
        return replace(super().placement, spacing=spacing, unit=unit)

    def start(self) -> None:
        """Start zarr's threads."""
        start_zarr_threads()

    def release(self) -> None:
        """Release the chunks that `held_bytes` counts; the next read decodes them again."""
        self._caches.get().clear()

    def __reduce__(self) -> tuple[object, ...]:
        return _reopen, (self._request,)

    def _load(self, region: Region) -> NDArray[Any]:
        return self._layout.channels_first(self._caches.get().read(self._layout.window(region), self._decode))

    def _decode(self, window: Window) -> NDArray[Any]:
        array, store = self._guarded.get()
        pixels = np.asarray(array[window])
        store.check_window(array, window)
        return pixels


def write_zarr_image(path: str | Path, image: Tensor, *, chunk: int = CHUNK) -> None:
    """Write an image ``(C, H, W)`` as a compressed zarr array with a checksum in every chunk.

    Chunks of zeros are written too, so that a lost chunk can be distinguished from them.

    Parameters
    ----------
    path : folder of the array; an existing array is replaced
    image : Tensor ``(C, H, W)`` of a dtype that NumPy has
    chunk : height and width of the chunks in pixels; each holds all channels
    """
    channels, height, width = image.shape
    write_zarr_bands(
        path, (channels, height, width), image.dtype, torch.split(image, chunk, dim=1), chunk=chunk
    )


def write_zarr_bands(
    path: str | Path,
    shape: tuple[int, int, int],
    dtype: torch.dtype,
    bands: Iterable[Tensor],
    *,
    chunk: int = CHUNK,
) -> None:
    """Write an image as `write_zarr_image` does, from bands of ``chunk`` rows, from the top."""
    channels, height, width = shape
    array = zarr.create_array(
        str(path),
        shape=shape,
        chunks=(channels, min(chunk, height), min(chunk, width)),
        dtype=torch.empty(0, dtype=dtype).numpy().dtype,
        compressors=ZstdCodec(level=1, checksum=True),
        dimension_names=("c", "y", "x"),
        overwrite=True,
        config={"write_empty_chunks": True},
    )
    for row, band in zip(range(0, height, chunk), bands, strict=True):
        array[:, row : row + chunk] = band.numpy()


class _Guarding:
    """Opens the array for one process; a store that may hold open files is copied in a forked process."""

    def __init__(self, name: str, array: ZarrArray, missing: MissingChunks) -> None:
        self._name = name
        self._array = array
        self._missing = missing
        self._is_first = True

    def __call__(self) -> tuple[ZarrArray, GuardedStore]:
        array = self._array
        if not self._is_first and not isinstance(base_store(array.store), LocalStore | MemoryStore):
            array = pickle.loads(pickle.dumps(array))
        self._is_first = False
        return guarded(self._name, array, self._missing)


def _name(array_or_path: ZarrArray | str | Path, level: int, series: int | None) -> str:
    if isinstance(array_or_path, zarr.Array):
        return without_secrets(str(array_or_path.store_path))
    shown = without_secrets(str(array_or_path))
    parts = [f"{what} {n}" for what, n in (("series", series), ("level", level)) if n]
    return f"{shown} ({', '.join(parts)})" if parts else shown


def _open(
    name: str, array_or_path: ZarrArray | str | Path, level: int, series: int | None
) -> tuple[ZarrArray, Axes | None]:
    """The array of the level, and its axes if they are named."""
    node = array_or_path if isinstance(array_or_path, zarr.Array) else open_node(array_or_path)
    if isinstance(node, zarr.Group):
        with opening(name, "OME-Zarr image"):
            array, axes = open_level(name, node, level, series)
            return array, axes or array_axes(array.metadata, array.attrs)
    for what, asked in (("level", level), ("series", series or 0)):
        if asked != 0:
            raise DatasetMismatch(
                f"{name} is one array: allowed is {what} 0; give an OME-Zarr image for others"
            )
    with opening(name, "zarr array"):
        return node, array_axes(node.metadata, node.attrs)


def open_node(path: str | Path) -> ZarrArray | zarr.Group:
    """The array or the group at a path.

    Raises
    ------
    CorruptImage
        If there is neither, or its metadata is damaged.
    """
    where = place(path)
    with opening(str(where), "zarr array"):
        store, root = zarr_store(where)
        try:
            return zarr.open(store, path=root or None, mode="r")
        except FileNotFoundError as error:
            if trouble(error) is not None:
                raise
            shown = without_secrets(str(path))
            raise CorruptImage(f"no zarr array at {shown}: give the folder that holds its zarr.json") from (
                error if isinstance(where, Path) else None
            )


def _layout(
    name: str,
    array: ZarrArray,
    axes: Axes | None,
    channels_last: bool | None,
    index: Mapping[str, int] | None,
) -> Layout:
    if axes is not None:
        return layout_by_names(name, axes, array.shape, channels_last=channels_last, index=index or {})
    if index:
        raise DatasetMismatch(f"{name} does not name its axes: leave index= out")
    return layout_by_shape(name, array.shape, channels_last)


def _check_chunks(name: str, array: ZarrArray, layout: Layout, max_pixels: int) -> None:
    """Raise `DatasetMismatch` if a chunk, including other planes that it holds, is too large."""
    channels, height, width = layout.image_shape(array.chunks)
    others = [extent for axis, extent in zip(layout.axes, array.chunks, strict=True) if axis not in "CYX"]
    check_piece(name, "chunks", (height, width), channels * math.prod(others), max_pixels)


def _reopen(request: Callable[[], ZarrSource]) -> ZarrSource:
    """Make a `ZarrSource` again from its arguments, which are its pickle."""
    return request()
