"""Values of pictures are those in the file, whatever Pillow makes of them."""

from __future__ import annotations

import pickle
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from source_contract import assert_reads, channels_last, pixels, region

from streamcnn.data.sources import PictureSource
from streamcnn.errors import CorruptImage

PART = region(3, 40, 7, 50)
WHOLE = region(0, 75, 0, 101)


def write_grey_png(path: Path, grey: np.ndarray[Any, Any], bits: int) -> None:
    """A grey PNG of 1, 2 or 4 bits, which Pillow does not write."""
    width = grey.shape[1]
    digits = [np.binary_repr(value, bits) for value in range(2**bits)]
    rows = ["".join(digits[value] for value in row) for row in grey]
    padded = [row.ljust(-(-width * bits // 8) * 8, "0") for row in rows]
    content = b"".join(b"\0" + int(row, 2).to_bytes(len(row) // 8, "big") for row in padded)
    head = struct.pack(">IIBBBBB", width, len(grey), bits, 0, 0, 0, 0)
    parts = (b"IHDR", head), (b"IDAT", zlib.compress(content)), (b"IEND", b"")
    chunks = (
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        for kind, data in parts
    )
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(chunks))


def stored(maxval: int, channels: int = 1) -> np.ndarray[Any, Any]:
    """Values from 0 to maxval, both among them."""
    draw = np.random.default_rng(maxval)
    found = draw.integers(0, maxval + 1, (channels, 75, 101)).astype("u1" if maxval < 256 else "u2")
    found[:, 0, 0], found[:, 0, 1] = 0, maxval
    return found


@pytest.mark.parametrize("bits", [1, 2, 4])
def test_grey_of_few_bits_in_png(tmp_path: Path, bits: int) -> None:
    grey = stored(2**bits - 1)
    write_grey_png(tmp_path / "a.png", grey[0], bits)
    source = pickle.loads(pickle.dumps(PictureSource(tmp_path / "a.png")))
    assert_reads(source, grey, PART)
    assert_reads(source, grey, WHOLE)
    assert source.largest == 2**bits - 1


def test_a_mask_that_pillow_wrote(tmp_path: Path) -> None:
    bits = pixels(1) > 99
    Image.fromarray(bits[0]).save(tmp_path / "a.png")
    assert_reads(PictureSource(tmp_path / "a.png"), bits.astype("u1"), PART)


@pytest.mark.parametrize("magic", ["P1", "P4"])
def test_a_bitmap_is_0_where_it_is_black(tmp_path: Path, magic: str) -> None:
    white = pixels(1)[0] > 99
    ink = ~white
    packed = np.packbits(ink, axis=1).tobytes()
    text = "\n".join(" ".join(str(int(bit)) for bit in row) for row in ink).encode()
    (tmp_path / "a.pbm").write_bytes(f"{magic}\n101 75\n".encode() + (packed if magic == "P4" else text))
    source = PictureSource(tmp_path / "a.pbm")
    assert_reads(source, white[None].astype("u1"), PART)
    assert source.largest == 1


@pytest.mark.parametrize(
    ("magic", "maxval"),
    [
        *(("P5", maxval) for maxval in (1, 100, 254, 255, 256, 1000, 4095, 65534, 65535)),
        *(("P2", maxval) for maxval in (1, 100, 255, 4095, 65535)),
        *(("P6", maxval) for maxval in (7, 100, 255)),
        *(("P3", maxval) for maxval in (100, 255)),
    ],
)
def test_any_maxval(tmp_path: Path, magic: str, maxval: int) -> None:
    image = stored(maxval, 3 if magic in ("P3", "P6") else 1)
    last = channels_last(image)
    if magic in ("P5", "P6"):
        content = last.astype("u1" if maxval < 256 else ">u2").tobytes()
    else:
        content = " ".join(map(str, last.ravel())).encode()
    (tmp_path / "a.pnm").write_bytes(f"{magic}\n# a comment\n101 75\n{maxval}\n".encode() + content)
    source = pickle.loads(pickle.dumps(PictureSource(tmp_path / "a.pnm")))
    assert source.largest == maxval
    assert_reads(source, image, PART)
    assert_reads(source, image, WHOLE)


@pytest.mark.parametrize(
    ("maxval", "content", "message"),
    [
        (100, b"\1" * 7574, "the file ends before its pixels do"),
        (100, b"\1" * 7574 + b"\x65", "a pixel of 101 where maxval is 100"),
        (4095, b"\x0f\xff" * 7574 + b"\x10\x00", "a pixel of 4096 where maxval is 4095"),
    ],
)
def test_what_no_maxval_allows_is_damage(tmp_path: Path, maxval: int, content: bytes, message: str) -> None:
    (tmp_path / "a.pgm").write_bytes(f"P5 101 75 {maxval}\n".encode() + content)
    source = PictureSource(tmp_path / "a.pgm")
    with pytest.raises(CorruptImage, match=rf"cannot read rows .*a\.pgm: {message}; the image is damaged"):
        source.read(WHOLE)


def test_palettes_of_few_bits_are_colours_of_eight(tmp_path: Path) -> None:
    picture = Image.new("P", (101, 75))
    picture.putpalette([0, 0, 0, 255, 255, 255])
    picture.frombytes((pixels(1)[0] > 99).astype("u1").tobytes())
    picture.save(tmp_path / "a.png", bits=1)
    source = PictureSource(tmp_path / "a.png")
    assert (source.shape[0], source.largest) == (3, 255)
    assert source.read(WHOLE).unique().tolist() == [0, 255]
