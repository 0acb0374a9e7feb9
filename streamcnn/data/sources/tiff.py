"""Images in TIFF, BigTIFF and OME-TIFF files, read tile by tile or strip by strip."""

from __future__ import annotations

import functools
import os
import weakref
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, final

import numpy as np
import zarr
from numpy.typing import NDArray
from tifffile import TiffFile, TiffPageSeries
from tifffile.zarr import ZarrTiffStore

from streamcnn.data.sources.axes import Axes
from streamcnn.data.sources.base import FileSource
from streamcnn.data.sources.chunk_cache import CACHE_BYTES, ChunkCache, Window
from streamcnn.data.sources.costs import REGION_COPIES, chunked_cost, described
from streamcnn.data.sources.files import MAX_PIXELS, FileStamp, PerProcess, ProcessLock, opening
from streamcnn.data.sources.layout import Layout, layout_by_names, torch_dtype
from streamcnn.data.sources.mapped import copied, mapped_bytes
from streamcnn.data.sources.orientation import Orientation
from streamcnn.data.sources.placement import Placement, placement_of_tiff
from streamcnn.data.sources.places import place
from streamcnn.data.sources.remote import REMOTE_BYTES
from streamcnn.data.sources.threads import start_zarr_threads
from streamcnn.data.sources.tiff_bounds import bound_pictures, check_chunk
from streamcnn.data.sources.tiff_checks import check_complete, check_decodable, check_directories, chunk_size
from streamcnn.data.sources.tiff_colours import COLOUR_BYTES, Colours, colours_of
from streamcnn.data.sources.tiff_lerc import keep_lerc_masks
from streamcnn.data.sources.tiff_series import check_number, chosen_series, tiff_file, told_if_opened
from streamcnn.errors import DatasetMismatch
from streamcnn.geometry.regions import Region
from streamcnn.plan.reading import ReadingCost
from streamcnn.support.extras import require
from streamcnn.support.text import without_secrets

_ORIENTATION = 274
_CHUNK_COPIES = 3
"""Copies of a tile or strip: as stored, decoded, and one of the codec or a predictor."""
_UNKNOWN_AXES = set("QI")  # tifffile's letters for an axis of unknown meaning


@final
class TiffSource(FileSource):
    """One level of one image of a TIFF file, of which only the tiles or strips under a region are decoded.

    Uncompressed, contiguous pixels are mapped into memory. An image with a single compressed tile or strip
    per plane is decoded whole at its first read and kept. Of several tiles or strips, those of 4 MiB and more
    that are larger than the part that is read are kept, decoded, in a cache; others are decoded each time.
    The file is open only while it is read. Tiles that a sparse file lacks read as its fill value.

    Pixels are made upright by the file's orientation. Grey is inverted if 0 is white, CMYK and Aperio's YCbCr
    become RGB, and colours multiplied by alpha are divided by it. Pixels outside a LERC mask are NaN.

    Parameters
    ----------
    path : file, or URL of a remote one
    series : int, optional
        Which image of the file. By default the largest of full resolution that is not a macro, label or
        thumbnail; the first of equals.
    level : resolution of a pyramid; 0 is full
    channels_last : bool, optional
        Which axis of a stack of three axes is the channels, if the file does not say it; if it does, this may
        only agree.
    max_pixels : largest tile or strip, in pixels, that may be decoded
    cache_bytes : limit on kept bytes of decoded tiles or strips, unless a plane is a single one

    Raises
    ------
    CorruptImage
        If there is no such file, or it is not a TIFF, damaged or truncated.
    DatasetMismatch
        If there is no such image or level, it has other axes or too large strips, ``channels_last``
        contradicts it, its colours are of an unknown kind, or PyTorch lacks its dtype.
    MissingExtra
        If its compression needs imagecodecs, which is not installed.
    """

    def __init__(
        self,
        path: str | Path,
        *,
        series: int | None = None,
        level: int = 0,
        channels_last: bool | None = None,
        max_pixels: int = MAX_PIXELS,
        cache_bytes: int = CACHE_BYTES,
    ) -> None:
        self._request = _Request(place(path), series, level, channels_last, max_pixels, cache_bytes)
        name = self._request.name
        self._is_remote = isinstance(self._request.path, str)
        with opening(name, "TIFF"), told_if_opened():
            self._files = PerProcess(functools.partial(_open, self._request))
            opened = self._files.get()
        if opened.cache is not None:
            opened.cache.warn_if_too_small(name, opened.pieces)
        self._layout = opened.layout
        self._stamps = opened.stamps
        self._piece = opened.piece
        self._colours = opened.colours
        self._orientation = opened.orientation
        channels, *stored = opened.layout.image_shape(opened.pixels.shape)
        self._stored_size = (stored[0], stored[1])
        shape = (self._colours.num_channels(channels), *self._orientation.size(self._stored_size))
        dtype = torch_dtype(name, opened.pixels.dtype)
        super().__init__(shape, dtype, name, largest=self._colours.largest)

    @property
    def held_bytes(self) -> int:
        """Bytes of decoded tiles or strips that the source keeps in memory now."""
        return self._files.get().held_bytes()

    @property
    def pieces(self) -> str:
        """Text on the tiles or strips of the image, with their extents in pixels."""
        return self._piece

    @property
    def reading_cost(self) -> ReadingCost:
        """Tiles or strips under a region, a few at a time, and those kept."""
        opened = self._files.get()
        channels, height, width = self._layout.image_shape(opened.pixels.shape)
        pixel = channels * opened.pixels.dtype.itemsize
        if opened.store is None:
            assert isinstance(opened.pixels, np.ndarray)
            fixed = mapped_bytes(opened.pixels, self._layout)
            cost = ReadingCost((height, width), pixel=REGION_COPIES * pixel, fixed=fixed)
        elif opened.is_one_chunk:
            held = pixel * height * width
            copies = REGION_COPIES * pixel
            cost = ReadingCost((height, width), held=held, opening=_CHUNK_COPIES * held, pixel=copies)
        else:
            assert isinstance(opened.pixels, zarr.Array)
            cost = chunked_cost(
                self._layout,
                opened.pixels.shape,
                opened.pixels.chunks,
                opened.pixels.dtype,
                copies=_CHUNK_COPIES,
                at_once=zarr.config.get("async.concurrency"),
            )
            assert opened.cache is not None
            cost = replace(cost, held=opened.cache.most_bytes())
        if self._is_remote:
            cost = replace(cost, fixed=cost.fixed + REMOTE_BYTES)
        if not self._colours.is_plain:
            cost = replace(cost, pixel=cost.pixel + pixel + COLOUR_BYTES)
        return cost.transposed() if cost.size != self.shape[1:] else cost

    @property
    def placement(self) -> Placement:
        """The placement of the full resolution, by OME-XML and GeoTIFF tags, if it is stored upright."""
        with opening(self.name, "TIFF"), tiff_file(self._request.path) as file:
            image, _ = _level(self._request, file)
            is_upright = self._orientation.is_upright
            return placement_of_tiff(file, image) if is_upright else super().placement

    def start(self) -> None:
        """Start the threads that decode tiles and strips."""
        if self._files.get().store is not None:
            start_zarr_threads()

    def release(self) -> None:
        """Release the tiles or strips that `held_bytes` counts; the next read decodes them again."""
        self._files.get().release()

    def __reduce__(self) -> tuple[object, ...]:
        return _reopen, (self._request,)

    def _load(self, region: Region) -> NDArray[Any]:
        for stamp in self._stamps:
            stamp.check()
        stored = self._orientation.stored_region(region, self._stored_size)
        try:
            opened = self._files.get()
            if opened.store is None:
                assert isinstance(opened.pixels, np.ndarray)
                pixels = copied(opened.pixels, self._layout, stored)
            else:
                pixels = self._layout.channels_first(opened.cut(self._layout.window(stored)))
        except NotImplementedError:
            require("imagecodecs", extra="tiff")  # tifffile's methods without zarr do not handle all cases
            raise
        coloured = pixels if self._colours.is_plain else self._colours.apply(pixels)
        return self._orientation.upright(coloured)


@dataclass(frozen=True, slots=True)
class _Request:
    """The arguments with which a source was opened."""

    path: Path | str
    series: int | None
    level: int
    channels_last: bool | None
    max_pixels: int
    cache_bytes: int

    @property
    def name(self) -> str:
        parts = [f"{what} {n}" for what, n in (("image", self.series), ("level", self.level)) if n]
        shown = without_secrets(str(self.path))
        return f"{shown} ({', '.join(parts)})" if parts else shown


@dataclass(slots=True, weakref_slot=True, eq=False)
class _Opened:
    """The pixels of a level, as an array that reads on indexing."""

    pixels: zarr.Array[Any] | NDArray[Any]
    store: ZarrTiffStore | None
    layout: Layout
    colours: Colours
    orientation: Orientation
    stamps: tuple[FileStamp, ...]
    pieces: str
    """Kind of its pieces, ``"tiles"`` or ``"strips"``."""
    piece: str
    """Kind of its pieces with their extents, for messages."""
    is_one_chunk: bool = False
    cache: ChunkCache | None = None
    """Cache of tiles or strips, if there are several."""
    decoded: NDArray[Any] | None = None
    """All pixels, once read, if they are a single tile or strip."""
    lock: ProcessLock = field(default_factory=ProcessLock)

    def __post_init__(self) -> None:
        if self.store is not None:
            # When a read fails, zarr lets other tiles' reads continue, and they open the file again.
            weakref.finalize(self, _close, self.store, os.getpid())

    def held_bytes(self) -> int:
        """Bytes of decoded pixels that are kept now."""
        if self.cache is not None:
            return self.cache.held_bytes()
        return 0 if self.decoded is None else self.decoded.nbytes

    def release(self) -> None:
        """Release all decoded pixels."""
        if self.cache is not None:
            self.cache.clear()
        with self.lock:
            self.decoded = None

    def cut(self, window: Window) -> NDArray[Any]:
        """The pixels of a window; no file stays open afterwards."""
        if self.is_one_chunk:
            with self.lock:
                if self.decoded is None:
                    self.decoded = self._decode(tuple(slice(None) for _ in self.pixels.shape))
                return self.decoded[window]
        assert self.cache is not None, "what is neither mapped nor one piece has several"
        return self.cache.read(window, self._decode)

    def _decode(self, window: Window) -> NDArray[Any]:
        try:
            return np.asarray(self.pixels[window])
        finally:
            if self.store is not None:
                self.store.close()  # it opens its file again when needed


def _close(store: ZarrTiffStore, process: int) -> None:
    if os.getpid() == process:  # a forked child must not touch its parent's files and locks
        store.close()


def _open(request: _Request) -> _Opened:
    stamps = [FileStamp.of(request.path)] if isinstance(request.path, Path) else []
    with tiff_file(request.path) as file:
        check_directories(request.name, file)
        image, data = _level(request, file)
        layout = _layout(request, data)
        colours = colours_of(request.name, data, is_ome=file.is_ome)
        orientation = _orientation(image, data)
        check_decodable(request.name, data.keyframe)
        _refuse_several_files_elsewhere(request, data)
        check_complete(request.name, data)
        is_one_chunk = _is_one_chunk(request, data)
        stamps += _stamps_of_others(data, stamps)
        pieces = "tiles" if data.keyframe.is_tiled else "strips"
        piece = described(f"TIFF {pieces}", chunk_size(data.keyframe))
        if _is_mappable(data):
            return _Opened(_mapped(data), None, layout, colours, orientation, tuple(stamps), pieces, piece)
        bound_pictures(request.name, data.keyframe, chunk_size(data.keyframe))
        keep_lerc_masks(request.name, data.keyframe)
        store = data.aszarr(level=0, squeeze=False)
        array = zarr.open_array(store, mode="r")
        cache = None
        if not is_one_chunk:
            cache = ChunkCache(array.chunks, array.shape, array.dtype.itemsize, request.cache_bytes)
        return _Opened(
            array, store, layout, colours, orientation, tuple(stamps), pieces, piece, is_one_chunk, cache
        )


def _level(request: _Request, file: TiffFile) -> tuple[TiffPageSeries, TiffPageSeries]:
    """The image, and the requested resolution of it."""
    shown = without_secrets(str(request.path))
    image = chosen_series(shown, file, request.series)
    check_number(shown, "level", request.level, len(image.levels))
    return image, image.levels[request.level]


def _orientation(image: TiffPageSeries, data: TiffPageSeries) -> Orientation:
    """The level's orientation, else that of the full resolution, as many writers store only this."""
    at_full = image.keyframe.tags.valueof(_ORIENTATION, 1)
    return Orientation(int(data.keyframe.tags.valueof(_ORIENTATION, at_full)))


def _layout(request: _Request, data: TiffPageSeries) -> Layout:
    axes, shape = data.get_axes(False), data.get_shape(False)
    long = [axis for axis, extent in zip(axes, shape, strict=True) if axis in "YX" or extent != 1]
    if len(long) != 3 or not _UNKNOWN_AXES & set(long):
        names = Axes(tuple(axes), tuple(axes))
        return layout_by_names(request.name, names, shape, channels_last=request.channels_last)
    if request.channels_last is None:
        raise DatasetMismatch(
            f"{request.name} has {_planes(axes, shape)}: allowed is one axis of channels, and nothing says "
            "that these are: give channels_last=False if each plane is a channel, or "
            "channels_last=True if the last of these axes is the channels"
        )
    letters = iter("YXC" if request.channels_last else "CYX")
    kept = (axis in "YX" or extent != 1 for axis, extent in zip(axes, shape, strict=True))
    return Layout("".join(next(letters) if each else "." for each in kept))


def _planes(axes: str, shape: tuple[int, ...]) -> str:
    return " and ".join(
        f"{extent} planes along {axis!r}"
        for axis, extent in zip(axes, shape, strict=True)
        if axis not in "YX" and extent != 1
    )


def _is_one_chunk(request: _Request, data: TiffPageSeries) -> bool:
    """Whether one tile or strip holds a whole plane.

    Raises
    ------
    DatasetMismatch
        If a tile or strip has more pixels than are allowed.
    """
    page = data.keyframe
    height, width = chunk_size(page)
    if not _is_mappable(data):
        check_chunk(request.name, page, (height, width), request.max_pixels)
    return height >= page.imagelength and width >= page.imagewidth


def _is_mappable(data: TiffPageSeries) -> bool:
    return data.dataoffset is not None and data.keyframe.is_memmappable and data.transform is None


def _mapped(data: TiffPageSeries) -> NDArray[Any]:
    """The pixels, uncompressed and contiguous, as a memory map of the file."""
    file = data.keyframe.parent
    dtype = np.dtype(file.byteorder + data.dtype.char)
    assert data.dataoffset is not None
    return np.memmap(file.filehandle.path, dtype, "r", data.dataoffset, data.get_shape(False))


def _refuse_several_files_elsewhere(request: _Request, data: TiffPageSeries) -> None:
    """Raise `DatasetMismatch` if planes of an image at a URL are in other files, which cannot be read."""
    if isinstance(request.path, str) and (data.is_multifile or any(page is None for page in data)):
        raise DatasetMismatch(
            f"{request.name} lies in several files: allowed elsewhere than on this machine are images in one "
            "file; download them, or write the image as one"
        )


def _stamps_of_others(data: TiffPageSeries, main: list[FileStamp]) -> list[FileStamp]:
    """The stamps of the other files of an image in several files."""
    if not data.is_multifile:
        return []
    paths = {page.parent.filehandle.path for page in data if page is not None}
    return [FileStamp.of(path) for path in sorted(paths) if not Path(path).samefile(main[0].path)]


def _reopen(request: _Request) -> TiffSource:
    return TiffSource(
        request.path,
        series=request.series,
        level=request.level,
        channels_last=request.channels_last,
        max_pixels=request.max_pixels,
        cache_bytes=request.cache_bytes,
    )
