"""One function for every format, and every kind of source in a loader's processes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile
import torch
import zarr
from source_contract import (
    MEMORY_MAKERS,
    PICTURE_MAKERS,
    SIZE,
    SLIDE_MAKERS,
    TIFF_MAKERS,
    ZARR_MAKERS,
    Maker,
    RegionsOf,
    assert_reads,
    channels_last,
    cut,
    forbidden,
    pixels,
    random_regions,
    region,
    write_ome,
    write_pyramid,
)
from torch.utils.data import ConcatDataset, DataLoader

from streamcnn.data.sources import (
    ArraySource,
    PictureSource,
    SlideSource,
    TiffSource,
    ZarrSource,
    is_image,
    open_image,
    write_zarr_image,
)
from streamcnn.errors import CorruptImage, DatasetMismatch

ALL_MAKERS: dict[str, Maker] = {
    f"{kind}: {name}": maker
    for kind, makers in {
        "memory": MEMORY_MAKERS,
        "zarr": ZARR_MAKERS,
        "tiff": TIFF_MAKERS,
        "picture": PICTURE_MAKERS,
        "slide": SLIDE_MAKERS,
    }.items()
    for name, maker in makers.items()
}


@pytest.mark.parametrize("method", ["fork", "spawn"])
@pytest.mark.filterwarnings("ignore:This DataLoader will create:UserWarning")  # on one core
@pytest.mark.filterwarnings("ignore:.*use of fork.*:DeprecationWarning")  # from Python 3.12 on
def test_every_source_is_read_by_a_loaders_processes(tmp_path: Path, method: str) -> None:
    pytest.importorskip("imagecodecs")
    pytest.importorskip("openslide")
    expected, parts = [], []
    for number, maker in enumerate(ALL_MAKERS.values()):
        (tmp_path / str(number)).mkdir()
        source, image = maker(tmp_path / str(number))
        regions = random_regions(6, SIZE)
        source.read(regions[0])  # so that the parent has files, threads and decoders of its own
        parts.append(RegionsOf(source, regions))
        expected += [cut(image, asked) for asked in regions]
    loader: DataLoader[torch.Tensor] = DataLoader(
        ConcatDataset(parts), batch_size=None, num_workers=2, multiprocessing_context=method
    )
    got = list(loader)
    assert len(got) == len(expected)
    for tile, wanted in zip(got, expected, strict=True):
        np.testing.assert_array_equal(tile.numpy(), wanted)


def write_npy(path: Path) -> None:
    np.save(path, channels_last(pixels()))


def write_v2(path: Path) -> None:
    array = zarr.create_array(path, shape=SIZE, dtype="u1", zarr_format=2)
    array[:] = pixels(1)[0]


def write_picture(path: Path) -> None:
    pytest.importorskip("PIL.Image").fromarray(channels_last(pixels())).save(path)


def write_tiff(path: Path, **options: Any) -> None:
    tifffile.imwrite(path, channels_last(pixels()), photometric="rgb", tile=(16, 16), **options)


WRITERS: dict[str, tuple[Any, type]] = {
    "a.npy": (write_npy, ArraySource),
    "a.zarr": (lambda path: write_zarr_image(path, torch.from_numpy(pixels())), ZarrSource),
    "v2.zarr": (write_v2, ZarrSource),
    "0.4/ome.zarr": (lambda path: write_ome(path.parent, "0.4", "cyx", [pixels()]), ZarrSource),
    "0.5/ome.zarr": (lambda path: write_ome(path.parent, "0.5", "cyx", [pixels()]), ZarrSource),
    "a.tif": (write_tiff, TiffSource),
    "BIG.TIFF": (lambda path: write_tiff(path, bigtiff=True, byteorder=">"), TiffSource),
    "of some kind": (lambda path: write_tiff(path, byteorder=">"), TiffSource),
    "a.svs": (lambda path: write_tiff(path, compression="zlib"), SlideSource),
    "a.png": (write_picture, PictureSource),
    "a.jpeg": (write_picture, PictureSource),
    "a.webp": (write_picture, PictureSource),
    "a.bmp": (write_picture, PictureSource),
    "a.gif": (write_picture, PictureSource),
    "a.ppm": (write_picture, PictureSource),
}


@pytest.mark.parametrize("name", WRITERS)
def test_opens_what_is_there(tmp_path: Path, name: str) -> None:
    write, kind = WRITERS[name]
    if kind is SlideSource:
        pytest.importorskip("openslide")
    (tmp_path / name).parent.mkdir(exist_ok=True)
    write(tmp_path / name)
    assert is_image(tmp_path / name)
    source = open_image(str(tmp_path / name))
    assert isinstance(source, kind)
    assert source.shape[1:] == SIZE
    if name not in ("a.jpeg", "a.webp", "a.gif"):  # which lose something
        assert_reads(source, pixels()[: source.shape[0]], region(3, 40, 7, 50))


def test_options_go_to_the_sources_that_have_them(tmp_path: Path) -> None:
    write_pyramid(tmp_path / "a.tif", [pixels(3, size=(150, 202)), pixels()])
    tifffile.imwrite(tmp_path / "a.tif", pixels(5), photometric="minisblack", append=True)
    assert open_image(tmp_path / "a.tif", level=1).shape == (3, 75, 101)
    assert open_image(tmp_path / "a.tif", series=1, channels_last=False).shape == (5, 75, 101)
    path = write_ome(tmp_path, "0.5", "cyx", [pixels(3, size=(150, 202)), pixels()])
    assert open_image(path, level=1).shape == (3, 75, 101)
    np.save(tmp_path / "a.npy", np.zeros((6, 20, 5)))
    assert open_image(tmp_path / "a.npy", channels_last=False).shape == (6, 20, 5)
    for options, message in (
        ({"level": 1}, r"a\.npy has one resolution: allowed is level 0"),
        ({"series": 1}, r"a\.npy is no TIFF or OME-Zarr: allowed is series 0; leave series= out"),
    ):
        with pytest.raises(DatasetMismatch, match=message):
            open_image(tmp_path / "a.npy", **options)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", r"is an empty file: allowed are folders of a zarr array .* and slides \(\.bif, .*convert"),
        (
            b"%PDF-1.7 and so on",
            r"is no image that is known \(it begins with b'%PDF-1\.7 and so '\): allowed",
        ),
        (b"RIFF....WAVE", r"a\.png: cannot identify image file"),
    ],
)
def test_names_what_is_no_image(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "a.png").write_bytes(content)
    with pytest.raises(CorruptImage, match=message):
        open_image(tmp_path / "a.png")
    assert is_image(tmp_path / "a.png") == content.startswith(b"RIFF")


def test_names_what_is_missing_forbidden_or_a_mere_folder(tmp_path: Path) -> None:
    for look in (open_image, is_image):
        with pytest.raises(CorruptImage, match=r"no image at .*gone: give the path"):
            look(tmp_path / "gone")
    (tmp_path / "a.png").write_bytes(b"")
    with forbidden(tmp_path), pytest.raises(CorruptImage, match=r"cannot open .*a\.png: .*Permission denied"):
        open_image(tmp_path / "a.png")
    with pytest.raises(
        CorruptImage, match=r"is a folder without zarr\.json, \.zarray, \.zgroup: allowed are"
    ):
        open_image(tmp_path)
    assert not is_image(tmp_path)


@pytest.mark.parametrize("zarr_format", [2, 3])
def test_a_group_of_images_is_none_itself(tmp_path: Path, zarr_format: Any) -> None:
    group = zarr.create_group(tmp_path / "all", zarr_format=zarr_format)
    group.create_array("one", shape=SIZE, dtype="u1")
    assert not is_image(tmp_path / "all")
    assert is_image(tmp_path / "all/one")
    with pytest.raises(
        CorruptImage, match=r"all is a zarr group that says nothing of an image, with one inside"
    ):
        open_image(tmp_path / "all")


def test_damaged_metadata_is_taken_for_an_image_and_refused_when_it_is_opened(tmp_path: Path) -> None:
    for metadata in ("{", "[]", "{}"):
        (tmp_path / "zarr.json").write_text(metadata)
        assert is_image(tmp_path)
        with pytest.raises(CorruptImage):
            open_image(tmp_path)
