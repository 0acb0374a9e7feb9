"""Images that are read region by region: in memory as a tensor, on disk as a zarr array.

An `ImageSource` says what an image is without reading it and reads any region of it. It neither
converts nor normalises pixels; that is the model's ``preprocess``. This is the only module of
``streamcnn.data`` that knows zarr.
"""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any, final

import numpy as np
import torch
import zarr
from torch import Tensor
from zarr.codecs import ZstdCodec

from streamcnn.errors import CorruptImage, DatasetMismatch
from streamcnn.regions import Region

ZarrArray = zarr.Array[Any]  # of either format version


class ImageSource(ABC):
    """One image ``(C, H, W)`` that is read lazily.

    Subclasses implement `_read`. A source may be read by several threads at once and can be
    pickled; a copy made by pickling opens its file again and starts counting at zero.

    Attributes
    ----------
    shape : tuple of three int
        Channels, height and width in pixels.
    dtype : torch.dtype
        Type of the pixels as stored.
    """

    shape: tuple[int, int, int]
    dtype: torch.dtype

    def __init__(self, shape: tuple[int, int, int], dtype: torch.dtype) -> None:
        self.shape = shape
        self.dtype = dtype
        self._bytes_read = 0
        self._count_lock = threading.Lock()

    @property
    def bytes_read(self) -> int:
        """Bytes of pixels handed out so far, decoded; a pixel read twice counts twice."""
        return self._bytes_read

    @final
    def read(self, region: Region) -> Tensor:
        """The pixels of ``region`` for all channels.

        Returns
        -------
        Tensor ``(C, h, w)`` of `dtype` on the CPU
            It may share the source's memory: copy it before writing to it.

        Raises
        ------
        ValueError
            If the region goes beyond the image.
        CorruptImage
            If the pixels cannot be read or decoded.
        """
        _, height, width = self.shape
        if not Region.whole((height, width)).contains(region):
            raise ValueError(
                f"region {region} goes beyond the image: allowed is rows 0..{height}, cols 0..{width}"
            )
        pixels = self._read(region)
        assert pixels.shape == (self.shape[0], *region.size)
        assert pixels.dtype == self.dtype
        with self._count_lock:
            self._bytes_read += pixels.nbytes
        return pixels

    @abstractmethod
    def _read(self, region: Region) -> Tensor:
        """The pixels of a region that is known to lie inside the image."""


@final
class TensorSource(ImageSource):
    """An image that is in memory already; regions are views of it.

    Parameters
    ----------
    tensor : Tensor ``(C, H, W)`` on the CPU
    """

    def __init__(self, tensor: Tensor) -> None:
        if tensor.ndim != 3:
            raise DatasetMismatch(
                f"image tensor has shape {tuple(tensor.shape)}: allowed is (C, H, W); "
                "wrap each image of a batch in a source of its own"
            )
        channels, height, width = tensor.shape
        super().__init__((channels, height, width), tensor.dtype)
        self._tensor = tensor.detach()

    def __reduce__(self) -> tuple[type[TensorSource], tuple[Tensor]]:
        return TensorSource, (self._tensor,)

    def _read(self, region: Region) -> Tensor:
        rows, cols = region
        return self._tensor[:, rows.start : rows.stop, cols.start : cols.stop]


@final
class ZarrSource(ImageSource):
    """An image in a zarr array, of which only the chunks under a region are read.

    Chunks that were never written read as the array's fill value: this is how zarr stores
    constant areas, so a lost chunk file cannot be told from one.

    Parameters
    ----------
    array_or_path : zarr array, or folder of one
        Two axes ``(H, W)`` are one channel; three are ``(C, H, W)`` or ``(H, W, C)``.
    channels_last : bool, optional
        Which of the two a three-axis array is. By default it is ``(H, W, C)`` when its last axis
        is shorter than its first, as it is whenever an image has fewer channels than rows.

    Raises
    ------
    CorruptImage
        If there is no zarr array at the path, or its metadata cannot be read.
    DatasetMismatch
        If the array has another number of axes, or pixels of a type that PyTorch lacks.
    """

    def __init__(self, array_or_path: ZarrArray | str | Path, *, channels_last: bool | None = None) -> None:
        array = array_or_path if isinstance(array_or_path, zarr.Array) else _open(Path(array_or_path))
        self._array = array
        self._origin = array_or_path
        self._requested_layout = channels_last
        self.name = str(array.store_path) if array is array_or_path else str(array_or_path)
        self._channels_last = _is_channels_last(self.name, array.shape, channels_last)
        super().__init__(_image_shape(array.shape, self._channels_last), _torch_dtype(self.name, array.dtype))

    @property
    def chunks(self) -> tuple[int, ...]:
        """Extents of the array's chunks in pixels, in the array's own axis order."""
        return self._array.chunks

    def __reduce__(self) -> tuple[object, ...]:
        return _reopen, (self._origin, self._requested_layout)

    def _read(self, region: Region) -> Tensor:
        rows, cols = region
        window: tuple[slice, ...] = (slice(rows.start, rows.stop), slice(cols.start, cols.stop))
        if self._array.ndim == 3 and not self._channels_last:
            window = (slice(None), *window)
        pixels = self._decode(window, region)
        if self._array.ndim == 2:
            pixels = pixels[None]
        elif self._channels_last:
            pixels = np.moveaxis(pixels, -1, 0)
        # PyTorch takes no foreign byte order; in the common case nothing is copied.
        return torch.from_numpy(np.ascontiguousarray(pixels, dtype=pixels.dtype.newbyteorder("=")))

    def _decode(self, window: tuple[slice, ...], region: Region) -> np.ndarray:
        try:
            return np.asarray(self._array[window])
        except MemoryError:
            raise
        except Exception as error:  # each codec fails with errors of its own
            raise CorruptImage(
                f"cannot read rows {region.rows.start}..{region.rows.stop}, cols {region.cols.start}.."
                f"{region.cols.stop} of {self.name}: {error}; a chunk there is damaged, write the image again"
            ) from error


def as_sources(image: ImageSource | Sequence[ImageSource]) -> list[ImageSource]:
    """The images of a batch as a list, where all have one shape and dtype.

    Raises
    ------
    DatasetMismatch
        If there is no image, or one differs from the first.
    TypeError
        If something in the sequence is no `ImageSource`.
    """
    sources = [image] if isinstance(image, ImageSource) else list(image)
    if not sources:
        raise DatasetMismatch("a batch of 0 images: allowed are 1 and more")
    for position, source in enumerate(sources):
        if not isinstance(source, ImageSource):
            raise TypeError(
                f"image {position} of the batch is a {type(source).__name__}: allowed is an ImageSource; "
                "wrap a tensor in TensorSource, a zarr array in ZarrSource"
            )
        if (source.shape, source.dtype) != (sources[0].shape, sources[0].dtype):
            raise DatasetMismatch(
                f"image {position} of the batch is {source.shape} {source.dtype}, image 0 is "
                f"{sources[0].shape} {sources[0].dtype}: allowed is one shape and dtype; "
                "put images that differ into batches of their own"
            )
    return sources


def write_zarr_image(path: str | Path, image: Tensor, *, chunk: int = 512) -> None:
    """Write an image ``(C, H, W)`` as a compressed zarr array with a checksum in every chunk.

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
    )
    array[:] = pixels


def _open(path: Path) -> ZarrArray:
    try:
        return zarr.open_array(str(path), mode="r")
    except FileNotFoundError as error:
        raise CorruptImage(f"no zarr array at {path}: give the folder that holds its zarr.json") from error
    except Exception as error:  # damaged metadata fails in as many ways as there are fields
        raise CorruptImage(f"cannot open {path} as a zarr array: {error}; write the image again") from error


def _reopen(array_or_path: ZarrArray | str | Path, channels_last: bool | None) -> ZarrSource:
    """The pickle of a `ZarrSource` is what it was made from."""
    return ZarrSource(array_or_path, channels_last=channels_last)


def _is_channels_last(name: str, shape: tuple[int, ...], requested: bool | None) -> bool:
    if len(shape) not in (2, 3):
        raise DatasetMismatch(
            f"{name} has {len(shape)} axes {shape}: allowed are (H, W), (C, H, W) and (H, W, C); "
            "store one image per array"
        )
    if len(shape) == 2:
        return False
    return shape[2] < shape[0] if requested is None else requested


def _image_shape(shape: tuple[int, ...], channels_last: bool) -> tuple[int, int, int]:
    if len(shape) == 2:
        return (1, *shape)
    first, second, third = shape
    return (third, first, second) if channels_last else (first, second, third)


def _torch_dtype(name: str, dtype: np.dtype) -> torch.dtype:
    try:
        return torch.from_numpy(np.empty(0, dtype.newbyteorder("="))).dtype
    except TypeError as error:
        raise DatasetMismatch(
            f"{name} has pixels of type {dtype}: allowed are the integers and floats that PyTorch has; "
            "convert the image"
        ) from error
