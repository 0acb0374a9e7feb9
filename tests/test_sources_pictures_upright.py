"""Pictures that lie on their side in the file."""

from __future__ import annotations

import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageOps, PngImagePlugin
from source_contract import assert_reads, channels_last, pixels, region

from streamcnn.data.sources import PictureSource
from streamcnn.errors import CorruptImage


@pytest.mark.parametrize("orientation", range(10))
@pytest.mark.parametrize("ending", ["png", "jpg", "webp"])
def test_pixels_are_turned_upright(tmp_path: Path, ending: str, orientation: int) -> None:
    exif = Image.Exif()
    exif[274] = orientation
    path = tmp_path / f"a.{ending}"
    Image.fromarray(channels_last(pixels())).save(path, exif=exif)
    with Image.open(path) as picture:
        expected = np.moveaxis(np.array(ImageOps.exif_transpose(picture)), -1, 0)
    source = PictureSource(path)
    assert source.shape == expected.shape
    assert_reads(source, expected, region(3, 40, 7, 50))


def chunk(kind: bytes, content: bytes) -> bytes:
    checksum = struct.pack(">I", zlib.crc32(kind + content))
    return struct.pack(">I", len(content)) + kind + content + checksum


def behind_the_pixels(path: Path, *notes: bytes) -> None:
    """A PNG with more chunks between its pixels and its end."""
    Image.fromarray(channels_last(pixels())).save(path)
    path.write_bytes(path.read_bytes()[:-12] + b"".join(notes) + chunk(b"IEND", b""))


def exif_of(orientation: int) -> bytes:
    exif = Image.Exif()
    exif[274] = orientation
    return exif.tobytes().removeprefix(b"Exif\0\0")


def hexadecimal(content: bytes) -> bytes:
    """As ImageMagick writes EXIF into a text: a name, a length and the bytes."""
    return b"Raw profile type exif\0\0" + zlib.compress(
        f"\nexif\n{len(content):8}\n{content.hex()}\n".encode()
    )


XMP = (
    b"XML:com.adobe.xmp\0\0\0\0\0<x:xmpmeta xmlns:x='adobe:ns:meta/'>"
    b'<rdf:Description tiff:Orientation="6"/></x:xmpmeta>'
)


@pytest.mark.parametrize(
    "note",
    [
        chunk(b"eXIf", exif_of(6)),
        chunk(b"zTXt", hexadecimal(exif_of(6))),
        chunk(b"iTXt", XMP),
    ],
    ids=["exif", "profile", "xmp"],
)
def test_an_orientation_behind_the_pixels_of_a_png(tmp_path: Path, note: bytes) -> None:
    path = tmp_path / "a.png"
    behind_the_pixels(path, chunk(b"tEXt", b"Software\0any"), note)
    expected = np.rot90(pixels(), -1, (1, 2))
    source = PictureSource(path)
    assert source.shape == expected.shape
    assert_reads(source, expected, region(3, 40, 7, 50))


def test_notes_behind_the_pixels_that_tell_no_orientation(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    exif = Image.Exif()
    exif[305] = "any"
    note = chunk(b"eXIf", exif.tobytes().removeprefix(b"Exif\0\0"))
    behind_the_pixels(path, chunk(b"tEXt", b"Software\0any"), note)
    assert_reads(PictureSource(path), pixels(), region(3, 40, 7, 50))


def test_an_orientation_is_found_without_decoding(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.png"
    for where in ("before", "behind"):
        if where == "before":
            text = PngImagePlugin.PngInfo()
            text.add(b"zTXt", hexadecimal(exif_of(3)))
            Image.fromarray(channels_last(pixels())).save(path, pnginfo=text)
        else:
            behind_the_pixels(path, chunk(b"eXIf", exif_of(3)))
        with monkeypatch.context() as patch:
            patch.setattr(PngImagePlugin.PngImageFile, "load", None)
            source = PictureSource(path)
        assert_reads(source, pixels()[:, ::-1, ::-1], region(3, 40, 7, 50))


def test_notes_behind_the_pixels_have_a_limit(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    behind_the_pixels(path, chunk(b"tEXt", b"a\0" + b"b" * 2**24))
    with pytest.raises(
        CorruptImage, match=r"a\.png has notes of 16777218 bytes behind its pixels \(tEXt\): .*"
    ):
        PictureSource(path)
