"""Images in TIFF, BigTIFF and OME-TIFF files, read tile by tile or strip by strip."""

from __future__ import annotations

import functools
import os
import weakref
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, final

import numpy as np
import zarr
from numpy.typing import NDArray
from tifffile import TiffFile, TiffPageSeries
from tifffile.zarr import ZarrTiffStore

from streamcnn.data.sources.base import FileSource
from streamcnn.data.sources.costs import REGION_COPIES, chunked_cost, described
from streamcnn.data.sources.files import MAX_PIXELS, FileStamp, PerProcess, ProcessLock, opening
from streamcnn.data.sources.layout import Layout, layout_by_names, torch_dtype
from streamcnn.data.sources.mapped import copied, mapped_bytes
from streamcnn.data.sources.threads import start_zarr_threads
from streamcnn.data.sources.tiff_checks import check_complete, check_decodable, check_directories, chunk_size
from streamcnn.errors import DatasetMismatch
from streamcnn.extras import require
from streamcnn.reading import ReadingCost
from streamcnn.regions import Region

_CHUNK_COPIES = 3
"""A tile or strip as stored, decoded, and once more where the codec or a predictor makes a copy."""
_UNKNOWN_AXES = set("QI")  # tifffile's letters for an axis that nothing says a word about


@final
class TiffSource(FileSource):
    """One level of one image of a TIFF file, of which only the tiles or strips under a region are decoded.

    Pixels that lie uncompressed in one piece are mapped into memory. An image that is one compressed tile
    or strip is decoded whole when it is first read and kept from then on. The file is open only while it
    is read. Tiles that a sparse file leaves out read as its fill value.

    Parameters
    ----------
    path : file
    series : which image of the file
    level : resolution of a pyramid; 0 is full
    channels_last : bool, optional
        Which axis of a stack of three axes is the channels, where the file does not say it.
    max_pixels : largest tile or strip, in pixels, that may be decoded

    Raises
    ------
    CorruptImage
        If there is no such file, it is no TIFF, damaged or cut short.
    DatasetMismatch
        If there is no such image or level, it has other axes, too large strips, or pixels of a type that
        PyTorch lacks.
    MissingExtra
        If its compression needs imagecodecs, which is not installed.
    """

    def __init__(
        self,
        path: str | Path,
        *,
        series: int = 0,
        level: int = 0,
        channels_last: bool | None = None,
        max_pixels: int = MAX_PIXELS,
    ) -> None:
        self._request = _Request(str(path), series, level, channels_last, max_pixels)
        name = self._request.name
        with opening(name, "TIFF"):
            self._files = PerProcess(functools.partial(_open, self._request))
            opened = self._files.get()
        self._layout = opened.layout
        self._stamps = opened.stamps
        self._piece = opened.piece
        shape = opened.layout.image_shape(opened.pixels.shape)
        super().__init__(shape, torch_dtype(name, opened.pixels.dtype), name)

    @property
    def held_bytes(self) -> int:
        """Bytes of an image that is one tile or strip, once it has been decoded."""
        decoded = self._files.get().decoded
        return 0 if decoded is None else decoded.nbytes

    @property
    def pieces(self) -> str:
        """Whether the image is in tiles or strips, and their extents in pixels."""
        return self._piece

    @property
    def reading_cost(self) -> ReadingCost:
        """Tiles or strips under a region, a few at a time, or all of an image that is a single one."""
        opened = self._files.get()
        channels, height, width = self.shape
        pixel = channels * self.dtype.itemsize
        if opened.store is None:
            assert isinstance(opened.pixels, np.ndarray)
            fixed = mapped_bytes(opened.pixels, self._layout)
            return ReadingCost((height, width), pixel=REGION_COPIES * pixel, fixed=fixed)
        assert isinstance(opened.pixels, zarr.Array)
        if opened.is_one_chunk:
            held = pixel * height * width
            return ReadingCost(
                (height, width), held=held, opening=_CHUNK_COPIES * held, pixel=REGION_COPIES * pixel
            )
        return chunked_cost(
            self._layout,
            opened.pixels.shape,
            opened.pixels.chunks,
            opened.pixels.dtype,
            copies=_CHUNK_COPIES,
            at_once=zarr.config.get("async.concurrency"),
        )

    def start(self) -> None:
        """Start the threads that decode tiles and strips."""
        if self._files.get().store is not None:
            start_zarr_threads()

    def release(self) -> None:
        """Let go of an image that is one tile or strip."""
        opened = self._files.get()
        with opened.lock:
            opened.decoded = None

    def __reduce__(self) -> tuple[object, ...]:
        return _reopen, (self._request,)

    def _load(self, region: Region) -> NDArray[Any]:
        for stamp in self._stamps:
            stamp.check()
        try:
            opened = self._files.get()
            if opened.store is None:
                assert isinstance(opened.pixels, np.ndarray)
                return copied(opened.pixels, self._layout, region)
            return self._layout.channels_first(opened.cut(self._layout.window(region)))
        except NotImplementedError:
            require("imagecodecs", extra="tiff")  # what does without it for other files lacks some cases
            raise


@dataclass(frozen=True, slots=True)
class _Request:
    """What a source was asked to open."""

    path: str
    series: int
    level: int
    channels_last: bool | None
    max_pixels: int

    @property
    def name(self) -> str:
        parts = [f"{what} {n}" for what, n in (("image", self.series), ("level", self.level)) if n]
        return f"{self.path} ({', '.join(parts)})" if parts else self.path


@dataclass(slots=True, weakref_slot=True, eq=False)
class _Opened:
    """The pixels of a level as an array that reads when it is indexed."""

    pixels: zarr.Array[Any] | NDArray[Any]
    store: ZarrTiffStore | None
    layout: Layout
    stamps: tuple[FileStamp, ...]
    is_one_chunk: bool
    piece: str
    """What it is cut into, for messages."""
    decoded: NDArray[Any] | None = None
    """All pixels, if they are one tile or strip that has been read."""
    lock: ProcessLock = field(default_factory=ProcessLock)

    def __post_init__(self) -> None:
        if self.store is not None:
            # When a read fails, zarr lets the other tiles' reads run on, and they open the file again.
            weakref.finalize(self, _close, self.store, os.getpid())

    def cut(self, window: tuple[slice | int, ...]) -> NDArray[Any]:
        """The pixels of a window; no file stays open after it."""
        if self.is_one_chunk:
            with self.lock:
                if self.decoded is None:
                    self.decoded = self._decode(tuple(slice(None) for _ in self.pixels.shape))
                return self.decoded[window]
        return self._decode(window)

    def _decode(self, window: tuple[slice | int, ...]) -> NDArray[Any]:
        try:
            return np.asarray(self.pixels[window])
        finally:
            if self.store is not None:
                self.store.close()  # it opens its file again when it needs it


def _close(store: ZarrTiffStore, process: int) -> None:
    if os.getpid() == process:  # a forked child leaves its parent's files and locks alone
        store.close()


def _open(request: _Request) -> _Opened:
    stamp = FileStamp.of(request.path)
    with TiffFile(request.path) as file:
        check_directories(request.name, file)
        data = _level(request, file)
        layout = _layout(request, data)
        check_decodable(request.name, data.keyframe)
        check_complete(request.name, data)
        is_one_chunk = _is_one_chunk(request, data)
        stamps = (stamp, *_stamps_of_others(data, stamp))
        piece = described(
            f"TIFF {'tiles' if data.keyframe.is_tiled else 'strips'}", chunk_size(data.keyframe)
        )
        if _is_mappable(data):
            return _Opened(_mapped(data), None, layout, stamps, is_one_chunk=False, piece=piece)
        store = data.aszarr(level=0, squeeze=False)
        return _Opened(zarr.open_array(store, mode="r"), store, layout, stamps, is_one_chunk, piece)


def _level(request: _Request, file: TiffFile) -> TiffPageSeries:
    images = file.series
    _check_number(request.path, "image", request.series, len(images))
    levels = images[request.series].levels
    _check_number(request.path, "level", request.level, len(levels))
    return levels[request.level]


def _check_number(path: str, what: str, asked: int, found: int) -> None:
    if not 0 <= asked < found:
        raise DatasetMismatch(f"{path} has no {what} {asked}: allowed are 0..{found - 1}")


def _layout(request: _Request, data: TiffPageSeries) -> Layout:
    axes, shape = data.get_axes(False), data.get_shape(False)
    if len(axes) == 3 and request.channels_last is not None and _UNKNOWN_AXES & set(axes):
        return Layout("YXC" if request.channels_last else "CYX")
    return layout_by_names(request.name, axes, shape)


def _is_one_chunk(request: _Request, data: TiffPageSeries) -> bool:
    """Whether one tile or strip holds a whole plane; refused where one is too large to be decoded.

    Raises
    ------
    DatasetMismatch
        If a tile or strip has more pixels than are allowed.
    """
    page = data.keyframe
    height, width = chunk_size(page)
    if height * width > request.max_pixels and not _is_mappable(data):
        raise DatasetMismatch(
            f"{request.name} is compressed in pieces of {height} x {width} = {height * width} pixels: "
            f"allowed are {request.max_pixels}, for each is decoded whole; give max_pixels= or write it with "
            "tiles"
        )
    return height >= page.imagelength and width >= page.imagewidth


def _is_mappable(data: TiffPageSeries) -> bool:
    return data.dataoffset is not None and data.keyframe.is_memmappable and data.transform is None


def _mapped(data: TiffPageSeries) -> NDArray[Any]:
    """The pixels, uncompressed and in one piece, as a map of the file."""
    file = data.keyframe.parent
    dtype = np.dtype(file.byteorder + data.dtype.char)
    assert data.dataoffset is not None
    return np.memmap(file.filehandle.path, dtype, "r", data.dataoffset, data.get_shape(False))


def _stamps_of_others(data: TiffPageSeries, main: FileStamp) -> list[FileStamp]:
    """The other files of an image that lies in several."""
    paths = {page.parent.filehandle.path for page in data if page is not None} if data.is_multifile else set()
    return [FileStamp.of(path) for path in sorted(paths) if not Path(path).samefile(main.path)]


def _reopen(request: _Request) -> TiffSource:
    return TiffSource(
        request.path,
        series=request.series,
        level=request.level,
        channels_last=request.channels_last,
        max_pixels=request.max_pixels,
    )
