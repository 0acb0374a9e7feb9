"""TIFF files that hold several images, other colours than RGB, masks, or pixels that lie on their side."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile
import torch
from PIL import Image, ImageOps
from source_contract import assert_reads, channels_last, cut, pixels, region

from streamcnn.cli.images import info
from streamcnn.data.normalisation import Normalise
from streamcnn.data.sources import TiffSource, as_sources, open_image
from streamcnn.data.sources.orientation import Orientation
from streamcnn.errors import CorruptImage, DatasetMismatch
from streamcnn.geometry.regions import Region

PART = region(3, 40, 7, 50)
WHOLE = Region.whole((75, 101))
LARGE = pixels(3, size=(150, 202))


@pytest.mark.parametrize("kind", ["macro.ome.tif", "large macro.ome.tif", "reduced.tif", "raw.tif"])
def test_the_largest_image_that_is_no_macro_or_thumbnail_is_opened(tmp_path: Path, kind: str) -> None:
    is_ome = kind.endswith(".ome.tif")
    first = pixels(3, size=(300, 210)) if kind.startswith("large") else pixels(3, size=(50, 63))
    with tifffile.TiffWriter(tmp_path / kind, ome=is_ome) as file:
        for number, (image, name) in enumerate(((first, "Macro image"), (LARGE, "scan"))):
            options: dict[str, Any] = {"metadata": {"axes": "YXS", "Name": name} if is_ome else None}
            if number == 0 and not is_ome:
                options |= {"subfiletype": 1, "subifds": 1 if kind == "raw.tif" else 0}
            file.write(channels_last(image), photometric="rgb", **options)
    assert_reads(open_image(tmp_path / kind), LARGE, PART)
    assert_reads(open_image(tmp_path / kind, series=0), first, PART)


@pytest.mark.parametrize("orientation", range(10))
@pytest.mark.parametrize("options", [{}, {"tile": (32, 48), "compression": "zlib"}])
def test_pixels_are_turned_upright(tmp_path: Path, orientation: int, options: dict[str, Any]) -> None:
    path = tmp_path / "a.tif"
    tag = (274, "H", 1, orientation, True)
    tifffile.imwrite(path, channels_last(pixels()), photometric="rgb", extratags=[tag], **options)
    picture = Image.fromarray(channels_last(pixels()))
    picture.getexif()[274] = orientation
    expected = np.moveaxis(np.array(ImageOps.exif_transpose(picture)), -1, 0)
    source = TiffSource(path)
    assert source.shape == expected.shape
    assert_reads(source, expected, PART)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("options", [{}, {"tile": (32, 48), "compression": "zlib"}])
def test_single_rows_and_columns_are_turned_upright(
    tmp_path: Path, orientation: int, options: dict[str, Any]
) -> None:
    path = tmp_path / "a.tif"
    grey = pixels(1)
    tifffile.imwrite(path, grey[0], extratags=[(274, "H", 1, orientation, True)], **options)
    expected = Orientation(orientation).upright(grey)
    for asked in (region(7, 8, 2, 30), region(4, 21, 9, 10), region(5, 6, 5, 6)):
        assert_reads(TiffSource(path), expected, asked)


@pytest.mark.parametrize("dtype", ["u1", "u2"])
def test_grey_is_inverted_where_0_is_white(tmp_path: Path, dtype: str) -> None:
    image = pixels(1, dtype)
    tifffile.imwrite(tmp_path / "a.tif", image[0], photometric="miniswhite")
    assert_reads(TiffSource(tmp_path / "a.tif"), np.iinfo(dtype).max - image, PART)


def test_bits_are_inverted_where_0_is_white_and_go_into_a_model(tmp_path: Path) -> None:
    bits = pixels(1) > 99
    tifffile.imwrite(tmp_path / "a.tif", bits[0], photometric="miniswhite")
    source = TiffSource(tmp_path / "a.tif")
    assert_reads(source, ~bits, PART)
    normalised = Normalise()(source.read(PART))
    np.testing.assert_array_equal(normalised.numpy(), np.where(cut(bits, PART), -1, 1).astype("f4"))
    assert normalised.dtype == torch.float32


def test_cmyk_becomes_rgb_as_in_a_jpeg(tmp_path: Path) -> None:
    inks = pixels(4)
    tifffile.imwrite(tmp_path / "a.tif", channels_last(inks), photometric="separated")
    expected = np.array(Image.frombytes("CMYK", (101, 75), channels_last(inks).tobytes()).convert("RGB"))
    assert_reads(TiffSource(tmp_path / "a.tif"), np.moveaxis(expected, -1, 0), PART)


def test_colours_are_divided_by_associated_alpha(tmp_path: Path) -> None:
    stored = np.full((20, 20, 4), (60, 30, 0, 120), np.uint8)
    stored[0, 0] = 0
    tifffile.imwrite(tmp_path / "a.tif", stored, photometric="rgb", extrasamples=["assocalpha"])
    got = TiffSource(tmp_path / "a.tif").read(Region.whole((20, 20)))
    assert got[:, 5, 5].tolist() == [128, 64, 0, 120]
    assert got[:, 0, 0].tolist() == [0, 0, 0, 0]


@pytest.mark.parametrize("dtype", ["u1", "u2"])
@pytest.mark.parametrize("kind", ["cielab", "icclab"])
def test_refuses_lab_by_name(tmp_path: Path, dtype: str, kind: str) -> None:
    tifffile.imwrite(tmp_path / "a.tif", channels_last(pixels(3, dtype)), photometric=kind)
    with pytest.raises(DatasetMismatch, match=rf"a\.tif holds {kind.upper()} samples: allowed are grey, RGB"):
        TiffSource(tmp_path / "a.tif")


def test_aperios_luma_and_chroma_become_rgb(tmp_path: Path) -> None:
    pytest.importorskip("imagecodecs")
    rgb = np.full((75, 101, 3), (200, 90, 40), np.uint8)
    stored = np.array(Image.fromarray(rgb).convert("YCbCr"))
    options: Any = {"photometric": "rgb", "compressionargs": {"level": 0}, "tile": (64, 64)}
    for compression, image in ((33003, stored), (33005, rgb)):
        tifffile.imwrite(tmp_path / "a.tif", image, compression=compression, **options)
        got = TiffSource(tmp_path / "a.tif").read(WHOLE).numpy().astype(int)
        assert abs(got - np.moveaxis(rgb, -1, 0).astype(int)).max() <= 2


@pytest.mark.parametrize("dtype", ["f4", "u1"])
def test_what_a_lerc_mask_leaves_out_is_nan_or_refused(tmp_path: Path, dtype: str) -> None:
    codecs = pytest.importorskip("imagecodecs")
    image = pixels(1, dtype, size=(64, 64))[0]
    mask = np.ones((64, 64), bool)
    mask[3:7, 10:20] = False
    path = tmp_path / "a.tif"
    tile = codecs.lerc_encode(image, masks=mask)
    tifffile.imwrite(path, iter([tile]), shape=(64, 64), dtype=dtype, compression="lerc", tile=(64, 64))
    source = TiffSource(path)
    if dtype == "u1":
        with pytest.raises(CorruptImage, match=r"pixels that its LERC mask leaves out, in uint8, which has"):
            source.read(Region.whole((64, 64)))
        return
    np.testing.assert_array_equal(
        source.read(Region.whole((64, 64))).numpy()[0], np.where(mask, image, np.float32("nan"))
    )


def test_info_lists_all_images_and_levels(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with tifffile.TiffWriter(tmp_path / "a.tif") as file:
        file.write(channels_last(pixels(3, size=(50, 63))), photometric="rgb", subfiletype=1, metadata=None)
        file.write(channels_last(LARGE), photometric="rgb", metadata=None)
    info(tmp_path / "a.tif")
    lines = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    assert "series 0 name: reduced; levels: 50 x 63; opened: no" in lines
    assert "series 1 levels: 150 x 202; opened: yes" in lines


def test_images_of_different_depths_are_no_batch(tmp_path: Path) -> None:
    image = pixels(1, "u2")[0] // 16
    tifffile.imwrite(tmp_path / "full.tif", image, photometric="minisblack")
    tag = (341, "H", 1, 4095, True)
    tifffile.imwrite(tmp_path / "part.tif", image, photometric="minisblack", extratags=[tag])
    sources = [TiffSource(tmp_path / name) for name in ("full.tif", "part.tif")]
    with pytest.raises(
        DatasetMismatch, match=r"part\.tif holds torch\.uint16 up to 4095, .*full\.tif up to 65535"
    ):
        as_sources(sources)
