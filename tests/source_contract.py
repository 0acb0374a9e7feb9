"""The contract of all image sources, and a maker for each kind of image."""

from __future__ import annotations

import builtins
import errno
import io
import os
import pickle
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import tifffile
import torch
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset

from streamcnn.data.sources import (
    ArraySource,
    ImageSource,
    PictureSource,
    SlideSource,
    TensorSource,
    TiffSource,
    ZarrSource,
    write_zarr_image,
)
from streamcnn.geometry.regions import Interval, Region

Array = NDArray[Any]
Made = tuple[ImageSource, Array]
"""A source and its pixels (C, H, W)."""
Maker = Callable[[Path], Made]

SIZE = (75, 101)


class RegionsOf(Dataset[Tensor]):
    """A dataset of regions of a source, for loaders that read them in other processes."""

    def __init__(self, source: ImageSource, regions: list[Region]) -> None:
        self.source = source
        self.regions = regions

    def __len__(self) -> int:
        return len(self.regions)

    def __getitem__(self, index: int) -> Tensor:
        return self.source.read(self.regions[index])


def region(top: int, bottom: int, left: int, right: int) -> Region:
    return Region(Interval(top, bottom), Interval(left, right))


def pixels(channels: int = 3, dtype: str = "u1", size: tuple[int, int] = SIZE) -> Array:
    """Random pixels (C, H, W), the same for the same arguments."""
    values = np.random.default_rng(0).integers(0, 256, (channels, *size))
    return (values * 255 if np.dtype(dtype).itemsize > 1 else values).astype(dtype)


def channels_last(image: Array) -> Array:
    return np.ascontiguousarray(np.moveaxis(image, 0, -1))


def cut(image: Array, asked: Region) -> Array:
    rows, cols = asked
    return image[:, rows.start : rows.stop, cols.start : cols.stop]


def random_regions(count: int, size: tuple[int, int]) -> list[Region]:
    draw = np.random.default_rng(1).integers
    bounds = [sorted(map(int, draw(0, extent + 1, 2))) for _ in range(count) for extent in size]
    return [region(*rows, *cols) for rows, cols in zip(bounds[::2], bounds[1::2], strict=True)]


@contextmanager
def forbidden(path: Path) -> Iterator[None]:
    """A block in which opening the file, or files of the folder, fails as for a user who may not read them.

    Permissions would not stop root.
    """
    really = builtins.open

    def refuse(file: Any, *args: Any, **options: Any) -> Any:
        if Path(os.fsdecode(file) if not isinstance(file, int) else "").is_relative_to(path):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(file))
        return really(file, *args, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(builtins, "open", refuse)
        patch.setattr(io, "open", refuse)
        yield


def flip_a_bit(path: Path, position: int) -> None:
    data = bytearray(path.read_bytes())
    data[position] ^= 1
    path.write_bytes(bytes(data))


def assert_reads(source: ImageSource, image: Array, asked: Region) -> None:
    """Assert that the region's pixels and type are those of ``image``."""
    got = source.read(asked)
    assert got.dtype == source.dtype
    np.testing.assert_array_equal(got.numpy(), cut(image, asked), strict=True)


class SourceContract:
    """The tests of the contract, which a subclass runs for each of its ``makers``."""

    makers: ClassVar[dict[str, Maker]]

    def pytest_generate_tests(self, metafunc: pytest.Metafunc) -> None:
        metafunc.parametrize("made", self.makers, indirect=True)

    @pytest.fixture
    def made(self, request: pytest.FixtureRequest, tmp_path: Path) -> Made:
        return self.makers[request.param](tmp_path)

    def test_describes_the_image(self, made: Made) -> None:
        source, image = made
        assert source.shape == image.shape
        assert str(source.dtype).removeprefix("torch.") == image.dtype.name
        assert source.name
        assert source.bytes_read == 0

    def test_reads_corners_and_edges(self, made: Made) -> None:
        source, image = made
        _, height, width = image.shape
        for asked in (
            Region.whole((height, width)),
            region(0, 1, 0, 1),
            region(height - 1, height, width - 1, width),
            region(0, height, width - 3, width),
            region(height - 3, height, 0, width),
            region(5, 5, 0, 9),
        ):
            assert_reads(source, image, asked)

    def test_reads_what_indexing_gives(self, made: Made) -> None:
        source, image = made
        _, height, width = image.shape

        @settings(max_examples=20)
        @given(st.data())
        def check(data: st.DataObject) -> None:
            top, left = data.draw(st.integers(0, height)), data.draw(st.integers(0, width))
            bottom, right = data.draw(st.integers(top, height)), data.draw(st.integers(left, width))
            assert_reads(source, image, region(top, bottom, left, right))

        check()

    def test_is_read_by_eight_threads(self, made: Made) -> None:
        source, image = made
        regions = random_regions(64, source.shape[1:])
        with ThreadPoolExecutor(8) as pool:
            for asked, got in zip(regions, pool.map(source.read, regions), strict=True):
                np.testing.assert_array_equal(got.numpy(), cut(image, asked))
        assert source.bytes_read == sum(cut(image, asked).nbytes for asked in regions)

    def test_a_copy_opens_its_file_again(self, made: Made) -> None:
        source, image = made
        source.read(region(0, 10, 0, 20))
        copy = pickle.loads(pickle.dumps(source))
        assert (copy.shape, copy.dtype, copy.name, copy.bytes_read) == (
            *(source.shape, source.dtype, source.name),
            0,
        )
        assert_reads(copy, image, region(3, 40, 7, 50))

    def test_counts_the_bytes_that_it_hands_out(self, made: Made) -> None:
        source, image = made
        source.read(region(0, 10, 0, 20))
        source.read(region(5, 10, 0, 20))
        assert source.bytes_read == image.shape[0] * image.dtype.itemsize * (10 * 20 + 5 * 20)

    def test_refuses_regions_beyond_the_image(self, made: Made) -> None:
        source, image = made
        _, height, width = image.shape
        for beyond in (region(0, height + 1, 0, 1), region(0, 1, width - 1, width + 1), region(-1, 3, 0, 1)):
            with pytest.raises(ValueError, match=rf"allowed is rows 0\.\.{height}, cols 0\.\.{width}"):
                source.read(beyond)
        assert source.bytes_read == 0


def _tensor(folder: Path) -> Made:
    return TensorSource(torch.from_numpy(pixels())), pixels()


def _array(image: Array, stored: Array) -> Maker:
    return lambda folder: (ArraySource(stored), image)


def _npy(image: Array, stored: Array) -> Maker:
    def make(folder: Path) -> Made:
        np.save(folder / "a.npy", stored)
        return ArraySource(folder / "a.npy"), image

    return make


def _memmap(folder: Path) -> Made:
    (folder / "a.raw").write_bytes(bytes(16) + pixels(2, ">u2").tobytes())
    mapped = np.memmap(folder / "a.raw", ">u2", "r", 16, (2, *SIZE))
    return ArraySource(mapped, channels_last=False), pixels(2, "u2")


MEMORY_MAKERS: dict[str, Maker] = {
    "tensor": _tensor,
    "array hwc": _array(pixels(), channels_last(pixels())),
    "array chw f2": _array(pixels(4, "f2"), pixels(4, "f2")),
    "array hw bool": _array(pixels(1) > 99, pixels(1)[0] > 99),
    "npy": _npy(pixels(7, "i4"), channels_last(pixels(7, "i4"))),
    "npy in Fortran order": _npy(pixels(3, "f8"), np.asfortranarray(pixels(3, ">f8"))),
    "memory map": _memmap,
}


def _zarr(image: Array, stored: Array, **options: Any) -> Maker:
    def make(folder: Path) -> Made:
        array = zarr.create_array(folder / "a.zarr", shape=stored.shape, dtype=stored.dtype, **options)
        array[:] = stored
        return ZarrSource(folder / "a.zarr"), image

    return make


def _written(folder: Path) -> Made:
    write_zarr_image(folder / "a.zarr", torch.from_numpy(pixels(4, "u2")), chunk=32)
    return ZarrSource(folder / "a.zarr", missing_chunks="error"), pixels(4, "u2")


def write_ome(folder: Path, version: str, axes: str, levels: list[Array]) -> Path:
    """Write an OME-Zarr image with the given levels, whose axes are one letter each."""
    group = zarr.create_group(folder / "ome.zarr", zarr_format=3 if version == "0.5" else 2)
    for number, stored in enumerate(levels):
        chunks = tuple(min(extent, 32) for extent in stored.shape)
        array = group.create_array(f"s{number}", shape=stored.shape, chunks=chunks, dtype=stored.dtype)
        array[:] = stored
    image = {
        "axes": [{"name": axis, "type": "space" if axis in "zyx" else "other"} for axis in axes],
        "datasets": [{"path": f"s{number}"} for number in range(len(levels))],
    }
    if version == "0.5":
        group.attrs["ome"] = {"version": "0.5", "multiscales": [image]}
    else:
        group.attrs["multiscales"] = [{**image, "version": version}]
    return folder / "ome.zarr"


def _ome(version: str, axes: str, stored: Array, image: Array) -> Maker:
    def make(folder: Path) -> Made:
        path = write_ome(folder, version, axes, [np.zeros_like(stored[..., :2, :2]), stored])
        return ZarrSource(path, level=1), image

    return make


def _zip(folder: Path) -> Made:
    with zarr.storage.ZipStore(folder / "a.zip", mode="w") as store:
        array = zarr.create_array(store, shape=(*SIZE, 3), chunks=(32, 32, 3), dtype="u1")
        array[:] = channels_last(pixels())
    return ZarrSource(zarr.open_array(zarr.storage.ZipStore(folder / "a.zip", mode="r"), mode="r")), pixels()


ZARR_MAKERS: dict[str, Maker] = {
    "zarr": _zarr(pixels(), pixels(), chunks=(3, 32, 32)),
    "zarr of shards": _zarr(pixels(), channels_last(pixels()), chunks=(16, 16, 3), shards=(64, 64, 3)),
    "zarr v2": _zarr(pixels(1, "u2"), pixels(1, ">u2")[0], chunks=(20, 30), zarr_format=2),
    "zarr with all chunks": _written,
    "zarr in a zip": _zip,
    "OME-Zarr 0.4": _ome("0.4", "tczyx", pixels(5)[None, :, None], pixels(5)),
    "OME-Zarr 0.5": _ome("0.5", "zyxc", channels_last(pixels(3, "f4"))[None], pixels(3, "f4")),
}


def _tiff(image: Array, stored: Array, **options: Any) -> Maker:
    def make(folder: Path) -> Made:
        tifffile.imwrite(folder / "a.tif", stored, **options)
        return TiffSource(folder / "a.tif"), image

    return make


def _pyramid(folder: Path) -> Made:
    write_pyramid(folder / "a.tif", [pixels(3, size=(150, 202)), pixels()])
    return TiffSource(folder / "a.tif", level=1), pixels()


def write_pyramid(path: Path, levels: list[Array], **options: Any) -> None:
    """Write RGB images as levels of a tiled TIFF, which tifffile and OpenSlide read as a pyramid."""
    with tifffile.TiffWriter(path) as file:
        for number, image in enumerate(levels):
            file.write(
                channels_last(image),
                subfiletype=int(number > 0),
                tile=(32, 48),
                photometric="rgb",
                compression="zlib",
                **options,
            )


def _jpeg_tiff(folder: Path) -> Made:
    pytest.importorskip("imagecodecs")
    stored = channels_last(pixels())
    tifffile.imwrite(folder / "a.tif", stored, photometric="rgb", compression="jpeg", tile=(32, 48))
    return TiffSource(folder / "a.tif"), np.moveaxis(tifffile.imread(folder / "a.tif"), -1, 0)


def _lzw_tiff(folder: Path) -> Made:
    pytest.importorskip("imagecodecs")
    options: Any = {"planarconfig": "separate", "compression": "lzw", "tile": (32, 48)}
    tifffile.imwrite(folder / "a.tif", pixels(), photometric="rgb", **options)
    return TiffSource(folder / "a.tif"), pixels()


_RGB: dict[str, Any] = {"photometric": "rgb"}
_GREY: dict[str, Any] = {"photometric": "minisblack"}
_TILES: dict[str, Any] = {"tile": (32, 48), "compression": "zlib"}
TIFF_MAKERS: dict[str, Maker] = {
    "tiles": _tiff(pixels(), channels_last(pixels()), **_RGB, **_TILES),
    "BigTIFF": _tiff(pixels(4), channels_last(pixels(4)), bigtiff=True, **_RGB, **_TILES),
    "strips": _tiff(pixels(), channels_last(pixels()), rowsperstrip=16, compression="zlib", **_RGB),
    "other byte order": _tiff(
        pixels(3, "u2"), channels_last(pixels(3, "u2")), byteorder=">", **_RGB, **_TILES
    ),
    "in one piece": _tiff(pixels(3, "u2"), channels_last(pixels(3, "u2")), byteorder=">", **_RGB),
    "in one strip": _tiff(pixels(), channels_last(pixels()), rowsperstrip=75, compression="zlib", **_RGB),
    "planes": _tiff(pixels(), pixels(), planarconfig="separate", **_RGB, **_TILES),
    "seven channels": _tiff(
        pixels(7, "u2"), channels_last(pixels(7, "u2")), planarconfig="contig", **_GREY, **_TILES
    ),
    "predictor": _tiff(pixels(1, "u2"), pixels(1, "u2")[0], predictor=True, **_GREY, **_TILES),
    "float": _tiff(pixels(1, "f4"), pixels(1, "f4")[0], **_GREY, **_TILES),
    "one bit": _tiff(pixels(1) > 99, pixels(1)[0] > 99, **_GREY, **_TILES),
    "OME stack": _tiff(
        pixels(5), pixels(5)[None, :, None], ome=True, metadata={"axes": "TCZYX"}, **_GREY, **_TILES
    ),
    "pyramid": _pyramid,
    "JPEG": _jpeg_tiff,
    "LZW planes": _lzw_tiff,
}


def _picture(image: Array, **options: Any) -> Maker:
    """Make a source of a picture file, saved without loss if ``options`` say so."""

    def make(folder: Path) -> Made:
        pillow = pytest.importorskip("PIL.Image")
        stored = image[0] if len(image) == 1 else channels_last(image)
        path = folder / f"a.{options.get('format', 'png')}"
        pillow.fromarray(stored).save(path, **options)
        return PictureSource(path), image

    return make


def _jpeg(folder: Path) -> Made:
    pillow = pytest.importorskip("PIL.Image")
    pillow.fromarray(channels_last(pixels())).save(folder / "a.jpg")
    with pillow.open(folder / "a.jpg") as picture:
        return PictureSource(folder / "a.jpg"), np.moveaxis(np.array(picture), -1, 0)


PICTURE_MAKERS: dict[str, Maker] = {
    "PNG": _picture(pixels()),
    "PNG with alpha": _picture(pixels(4)),
    "PNG of grey": _picture(pixels(1)),
    "PNG of grey and alpha": _picture(pixels(2)),
    "PNG of 16 bits": _picture(pixels(1, "u2")),
    "BMP": _picture(pixels(), format="bmp"),
    "WebP": _picture(pixels(), format="webp", lossless=True),
    "PPM": _picture(pixels(), format="ppm"),
    "PGM of 16 bits": _picture(pixels(1, "u2"), format="ppm"),
    "JPEG": _jpeg,
}


def _slide(folder: Path) -> Made:
    pytest.importorskip("openslide")
    tifffile.imwrite(folder / "a.tif", channels_last(pixels()), **_RGB, **_TILES)
    return SlideSource(folder / "a.tif"), pixels()


def _slide_level(folder: Path) -> Made:
    pytest.importorskip("openslide")
    write_pyramid(folder / "a.tif", [pixels(3, size=(150, 202)), pixels()])
    return SlideSource(folder / "a.tif", level=1), pixels()


SLIDE_MAKERS: dict[str, Maker] = {"slide": _slide, "slide level": _slide_level}
