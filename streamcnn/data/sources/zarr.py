"""Images in zarr arrays, alone or as levels of an OME-Zarr image."""

from __future__ import annotations

import pickle
from collections.abc import Sequence
from pathlib import Path
from typing import Any, final

import numpy as np
import zarr
from numpy.typing import NDArray
from torch import Tensor
from zarr.codecs import ZstdCodec
from zarr.storage import LocalStore, MemoryStore

from streamcnn.data.sources.base import FileSource
from streamcnn.data.sources.costs import chunked_cost, described
from streamcnn.data.sources.files import PerProcess, opening
from streamcnn.data.sources.guard import GuardedStore, MissingChunks, ZarrArray, guarded
from streamcnn.data.sources.layout import Layout, layout_by_names, layout_by_shape, torch_dtype
from streamcnn.data.sources.ome import open_level
from streamcnn.data.sources.threads import start_zarr_threads
from streamcnn.errors import CorruptImage, DatasetMismatch
from streamcnn.reading import ReadingCost
from streamcnn.regions import Region

_CHUNK_COPIES = 2
"""A chunk as stored, which need not be smaller, and decoded."""


@final
class ZarrSource(FileSource):
    """An image in a zarr array or OME-Zarr group, of which only the chunks under a region are read.

    By default, chunks that were never written read as the array's fill value: this is how zarr stores
    constant areas, so a lost chunk file cannot be told from one.

    Parameters
    ----------
    array_or_path : zarr array, or folder of one or of an OME-Zarr image
        Two axes ``(H, W)`` are one channel; three are ``(C, H, W)`` or ``(H, W, C)``. The axes of an
        OME-Zarr image are those of its metadata; time and depth may be there with extent 1.
    channels_last : bool, optional
        Which of the two a three-axis array is. By default it is ``(H, W, C)`` when its last axis
        is shorter than its first, as it is whenever an image has fewer channels than rows. OME-Zarr
        images say it themselves.
    level : resolution of an OME-Zarr image; 0 is full
    missing_chunks : ``"fill"`` or ``"error"``
        Whether reading a chunk that is not in the store gives the fill value or a `CorruptImage`. Images
        written by `write_zarr_image` have all their chunks; other writers leave out those that hold the
        fill value alone unless they are told to ``write_empty_chunks``.

    Raises
    ------
    CorruptImage
        If there is no zarr array or OME-Zarr image at the path, or its metadata cannot be read.
    DatasetMismatch
        If the image has other axes, no such level, or pixels of a type that PyTorch lacks.
    """

    def __init__(
        self,
        array_or_path: ZarrArray | str | Path,
        *,
        channels_last: bool | None = None,
        level: int = 0,
        missing_chunks: MissingChunks = "fill",
    ) -> None:
        if missing_chunks not in ("fill", "error"):
            raise ValueError(f'missing_chunks={missing_chunks!r}: allowed are "fill" and "error"')
        self._request = (array_or_path, channels_last, level, missing_chunks)
        name = _name(array_or_path, level)
        array, axes = _open(name, array_or_path, level)
        self._layout = _layout(name, array, axes, channels_last)
        self._array = array
        self._guarded = PerProcess(_Guarding(name, array, missing_chunks))
        with opening(name, "zarr array"):
            self._guarded.get()
        super().__init__(self._layout.image_shape(array.shape), torch_dtype(name, array.dtype), name)

    @property
    def chunks(self) -> tuple[int, ...]:
        """Extents of the array's chunks in pixels, in the array's own axis order."""
        return self._array.chunks

    @property
    def pieces(self) -> str:
        """Extents of the chunks, in the array's own axis order."""
        return described("zarr chunks", self.chunks)

    @property
    def reading_cost(self) -> ReadingCost:
        """Chunks under a region, as stored and decoded: of an array with shards all, else a few at a time."""
        array = self._array
        at_once = zarr.config.get("async.concurrency") if array.shards is None else None
        return chunked_cost(
            self._layout,
            array.shape,
            array.chunks,
            array.dtype,
            copies=_CHUNK_COPIES,
            at_once=at_once,
        )

    def start(self) -> None:
        """Start zarr's threads."""
        start_zarr_threads()

    def __reduce__(self) -> tuple[object, ...]:
        return _reopen, self._request

    def _load(self, region: Region) -> NDArray[Any]:
        array, store = self._guarded.get()
        window = self._layout.window(region)
        pixels = np.asarray(array[window])
        store.check_window(array, window)
        return self._layout.channels_first(pixels)


def write_zarr_image(path: str | Path, image: Tensor, *, chunk: int = 512) -> None:
    """Write an image ``(C, H, W)`` as a compressed zarr array with a checksum in every chunk.

    Chunks that hold nothing but zeros are written too, so that a lost one can be told from them.

    Parameters
    ----------
    path : folder of the array; an array that is there is replaced
    image : Tensor ``(C, H, W)`` of a dtype that NumPy has
    chunk : height and width of the chunks in pixels; each holds all channels
    """
    channels, height, width = image.shape
    pixels = image.numpy()
    array = zarr.create_array(
        str(path),
        shape=pixels.shape,
        chunks=(channels, min(chunk, height), min(chunk, width)),
        dtype=pixels.dtype,
        compressors=ZstdCodec(level=1, checksum=True),
        overwrite=True,
        config={"write_empty_chunks": True},
    )
    array[:] = pixels


class _Guarding:
    """Opens the array for one process; a store that may hold open files is copied for a forked one."""

    def __init__(self, name: str, array: ZarrArray, missing: MissingChunks) -> None:
        self._name = name
        self._array = array
        self._missing = missing
        self._is_first = True

    def __call__(self) -> tuple[ZarrArray, GuardedStore]:
        array = self._array
        if not self._is_first and not isinstance(array.store, LocalStore | MemoryStore):
            array = pickle.loads(pickle.dumps(array))
        self._is_first = False
        return guarded(self._name, array, self._missing)


def _name(array_or_path: ZarrArray | str | Path, level: int) -> str:
    if isinstance(array_or_path, zarr.Array):
        return str(array_or_path.store_path)
    return f"{array_or_path} (level {level})" if level else str(array_or_path)


def _open(
    name: str, array_or_path: ZarrArray | str | Path, level: int
) -> tuple[ZarrArray, Sequence[str] | None]:
    """The array of the level, and the names of its axes if they are known."""
    node = array_or_path if isinstance(array_or_path, zarr.Array) else _open_node(Path(array_or_path))
    if isinstance(node, zarr.Group):
        with opening(name, "OME-Zarr image"):
            return open_level(name, node, level)
    if level != 0:
        raise DatasetMismatch(f"{name} is one array: allowed is level 0; give an OME-Zarr image for others")
    return node, None


def _open_node(path: Path) -> ZarrArray | zarr.Group:
    try:
        with opening(str(path), "zarr array"):
            return zarr.open(str(path), mode="r")
    except CorruptImage as error:
        if isinstance(error.__cause__, FileNotFoundError):
            raise CorruptImage(
                f"no zarr array at {path}: give the folder that holds its zarr.json"
            ) from error.__cause__
        raise


def _layout(name: str, array: ZarrArray, axes: Sequence[str] | None, channels_last: bool | None) -> Layout:
    if axes is None:
        return layout_by_shape(name, array.shape, channels_last)
    return layout_by_names(name, axes, array.shape)


def _reopen(
    array_or_path: ZarrArray | str | Path, channels_last: bool | None, level: int, missing: MissingChunks
) -> ZarrSource:
    """The pickle of a `ZarrSource` is what it was made from."""
    return ZarrSource(array_or_path, channels_last=channels_last, level=level, missing_chunks=missing)
