"""Pictures and slides as image sources."""

from __future__ import annotations

import os
import pickle
import struct
import sys
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from source_contract import (
    PICTURE_MAKERS,
    SLIDE_MAKERS,
    SourceContract,
    assert_reads,
    channels_last,
    flip_a_bit,
    forbidden,
    pixels,
    region,
    write_pyramid,
)

from streamcnn.data.sources import PictureSource, SlideSource
from streamcnn.errors import CorruptImage, DatasetMismatch
from streamcnn.geometry.regions import Region
from streamcnn.support.extras import MissingExtra

Image = pytest.importorskip("PIL.Image")

WHOLE = region(0, 75, 0, 101)


class TestPicture(SourceContract):
    makers = PICTURE_MAKERS


class TestSlide(SourceContract):
    makers = SLIDE_MAKERS


def save(path: Path, image: Any = None, **options: Any) -> Path:
    (Image.fromarray(channels_last(pixels())) if image is None else image).save(path, **options)
    return path


def test_a_palette_becomes_colours(tmp_path: Path) -> None:
    palette = pixels(3, size=(1, 256))[:, 0].T.copy()
    numbers = pixels(1)[0]
    picture = Image.new("P", (101, 75))
    picture.frombytes(numbers.tobytes())
    picture.putpalette(palette.tobytes())
    save(tmp_path / "a.png", picture)
    expected = np.moveaxis(palette[numbers], -1, 0)
    assert_reads(PictureSource(tmp_path / "a.png"), expected, region(3, 40, 7, 50))
    alpha = pixels(1, size=(1, 256))[0, 0]
    save(tmp_path / "a.png", picture, transparency=alpha.tobytes())
    expected = np.concatenate([expected, alpha[numbers][None]])
    assert_reads(PictureSource(tmp_path / "a.png"), expected, region(3, 40, 7, 50))


def test_cmyk_becomes_rgb(tmp_path: Path) -> None:
    save(tmp_path / "a.jpg", Image.fromarray(channels_last(pixels())).convert("CMYK"))
    with Image.open(tmp_path / "a.jpg") as picture:
        expected = np.moveaxis(np.array(picture.convert("RGB")), -1, 0)
    assert_reads(PictureSource(tmp_path / "a.jpg"), expected, region(3, 40, 7, 50))


def test_an_animation_is_its_first_frame(tmp_path: Path) -> None:
    frames = [Image.fromarray(np.full((75, 101), 40 * n, np.uint8)) for n in range(1, 4)]
    save(tmp_path / "a.gif", frames[0], save_all=True, append_images=frames[1:])
    assert PictureSource(tmp_path / "a.gif").read(WHOLE).unique().tolist() == [40]


def write_deep_png(path: Path, color_type: int, channels: int) -> None:
    def chunk(kind: bytes, content: bytes) -> bytes:
        checksum = struct.pack(">I", zlib.crc32(kind + content))
        return struct.pack(">I", len(content)) + kind + content + checksum

    rows = b"".join(b"\0" + os.urandom(2 * channels * 5) for _ in range(4))
    head = struct.pack(">IIBBBBB", 5, 4, 16, color_type, 0, 0, 0)
    parts = chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + parts)


def test_refuses_colours_whose_bits_would_be_dropped(tmp_path: Path) -> None:
    for color_type, channels in ((2, 3), (4, 2), (6, 4)):
        write_deep_png(tmp_path / "a.png", color_type, channels)
        with pytest.raises(DatasetMismatch, match=r"a\.png has colours of more than 8 bits, .* as a TIFF"):
            PictureSource(tmp_path / "a.png")
    (tmp_path / "a.ppm").write_bytes(b"P6 2 1 65535\n" + bytes(12))
    with pytest.raises(DatasetMismatch, match=r"a\.ppm has colours of more than 8 bits"):
        PictureSource(tmp_path / "a.ppm")


def test_the_limit_is_ours_and_not_pillows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = save(tmp_path / "a.png")
    with pytest.raises(
        DatasetMismatch, match=r"75 x 101 = 7575 pixels: allowed are 7574, .* give max_pixels="
    ):
        PictureSource(path, max_pixels=7574)
    for limit in (5000, 1000):  # Pillow warns beyond its limit and refuses beyond twice that
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
        source = pickle.loads(pickle.dumps(PictureSource(path, max_pixels=7575)))
        assert_reads(source, pixels(), WHOLE)
        assert limit == Image.MAX_IMAGE_PIXELS


def test_is_decoded_once_and_not_before_it_is_read(tmp_path: Path) -> None:
    path = save(tmp_path / "a.png")
    source, unread = PictureSource(path), PictureSource(path)
    source.read(region(0, 1, 0, 1))
    assert len(pickle.dumps(source)) < 1000
    path.unlink()
    assert_reads(source, pixels(), region(3, 40, 7, 50))
    with pytest.raises(CorruptImage, match=r"rows 0\.\.1, .*a\.png: the file is gone since it was opened"):
        unread.read(region(0, 1, 0, 1))


def test_what_was_read_may_be_written_to(tmp_path: Path) -> None:
    source = PictureSource(save(tmp_path / "a.png"))
    source.read(WHOLE).zero_()
    assert_reads(source, pixels(), WHOLE)


@pytest.mark.parametrize("ending", ["png", "jpg", "webp", "bmp", "gif"])
@pytest.mark.parametrize("kept", [0.3, 0.7, 0.95])
def test_names_a_picture_that_is_cut_short(tmp_path: Path, ending: str, kept: float) -> None:
    path = save(tmp_path / f"a.{ending}")
    os.truncate(path, int(kept * path.stat().st_size))
    with pytest.raises(CorruptImage, match=rf"a\.{ending}"):
        PictureSource(path).read(WHOLE)


def test_finds_a_flipped_bit_in_a_png(tmp_path: Path) -> None:
    path = save(tmp_path / "a.png")
    flip_a_bit(path, path.stat().st_size // 2)
    with pytest.raises(CorruptImage, match=r"rows 0\.\.75, cols 0\.\.101 of .*a\.png: .*image is damaged"):
        PictureSource(path).read(WHOLE)


def test_names_what_is_missing_forbidden_or_no_picture(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    with pytest.raises(CorruptImage, match=r"no picture at .*a\.png: give the path"):
        PictureSource(path)
    path.write_text("<!DOCTYPE html>")
    with pytest.raises(CorruptImage, match=r"cannot open .*a\.png: cannot identify .* \(PNG, JPEG, "):
        PictureSource(path)
    source = PictureSource(save(path))
    with forbidden(tmp_path):
        with pytest.raises(CorruptImage, match=r"cannot open .*a\.png: .*Permission denied"):
            PictureSource(path)
        with pytest.raises(CorruptImage, match=r"cannot read rows .*a\.png: .*Permission denied"):
            source.read(WHOLE)


@pytest.mark.parametrize("size", [(38, 51), (37, 51), (30, 40)])
def test_a_slides_pixels_do_not_depend_on_the_region(tmp_path: Path, size: tuple[int, int]) -> None:
    """Levels that are no whole fraction of the first can only be met to a part of a pixel."""
    pytest.importorskip("openslide")
    scale = 12
    small = (size[0] * scale, size[1] * scale)
    full = (small[0] * 4 + 1, small[1] * 4 + 3)
    write_pyramid(tmp_path / "a.tif", [pixels(3, size=full), pixels(3, size=small)])
    source = SlideSource(tmp_path / "a.tif", level=1)
    assert source.shape == (3, *small)
    whole = source.read(Region.whole(small))
    for asked in (region(200, 300, 240, 300), region(255, 257, 250, 270), region(13, 14, 1, 400)):
        rows, cols = (slice(axis.start, axis.stop) for axis in asked)
        assert torch.equal(source.read(asked), whole[:, rows, cols])
    # The first block begins where level 0 begins: nothing is interpolated there.
    assert_reads(source, pixels(3, size=small), region(0, 256, 0, 256))


def test_names_a_slide_that_is_none(tmp_path: Path) -> None:
    pytest.importorskip("openslide")
    path = tmp_path / "a.svs"
    with pytest.raises(CorruptImage, match=r"no slide at .*a\.svs"):
        SlideSource(path)
    path.write_text("no slide")
    with pytest.raises(CorruptImage, match=r"a\.svs as a slide: Unsupported or missing image file"):
        SlideSource(path)
    write_pyramid(path, [pixels(3, size=(150, 202)), pixels()])
    for level in (-1, 2):
        with pytest.raises(DatasetMismatch, match=rf"has no level {level}: allowed are 0\.\.1"):
            SlideSource(path, level=level)
    source = SlideSource(path)
    os.truncate(path, 1000)
    with pytest.raises(CorruptImage, match=r"a\.svs: the file was changed"):
        source.read(WHOLE)


def test_names_a_damaged_tile_and_reads_on(tmp_path: Path) -> None:
    pytest.importorskip("openslide")
    path = tmp_path / "a.tif"
    write_pyramid(path, [pixels()])
    source = SlideSource(path)
    status = path.stat()
    good = path.read_bytes()
    path.write_bytes(good[:700] + bytes(3000) + good[3700:])
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    with pytest.raises(
        CorruptImage, match=r"rows 0\.\.75, cols 0\.\.101 of .*a\.tif: .*; the image is damaged"
    ):
        source.read(WHOLE)
    path.write_bytes(good)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert_reads(source, pixels(), WHOLE)


@pytest.mark.parametrize(
    ("source", "module", "extra"),
    [(SlideSource, "openslide", "slides"), (PictureSource, "PIL.Image", "pictures")],
)
def test_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: Any, module: str, extra: str
) -> None:
    path = save(tmp_path / "a.png")
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(
        MissingExtra, match=rf"{module} cannot be imported .*pip install 'streamcnn\[{extra}\]'"
    ):
        source(path)
