"""TIFF files as image sources: which part of them is read, and what happens when they are damaged."""

from __future__ import annotations

import logging
import os
import pickle
import struct
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile
from hypothesis import given, settings
from hypothesis import strategies as st
from source_contract import (
    TIFF_MAKERS,
    SourceContract,
    assert_reads,
    channels_last,
    flip_a_bit,
    forbidden,
    pixels,
    region,
    write_pyramid,
)

from streamcnn.data.sources import TiffSource
from streamcnn.data.sources.tiff_series import told_if_opened
from streamcnn.errors import CorruptImage, DatasetMismatch
from streamcnn.geometry.regions import Region

WHOLE = region(0, 75, 0, 101)
TILES: dict[str, Any] = {"photometric": "rgb", "tile": (32, 48), "compression": "zlib"}


class TestTiff(SourceContract):
    makers = TIFF_MAKERS


def segments(path: Path) -> list[tuple[int, int]]:
    """Offset and size in bytes of each tile or strip of the first page."""
    with tifffile.TiffFile(path) as file:
        page = file.pages.first
        return list(zip(page.dataoffsets, page.databytecounts, strict=True))


def write(path: Path, **options: Any) -> Path:
    tifffile.imwrite(path, channels_last(pixels()), **{**TILES, **options})
    return path


def overwrite(path: Path, position: int, content: bytes) -> None:
    with path.open("r+b") as file:
        file.seek(position)
        file.write(content)


def test_reads_only_the_tiles_under_the_region(tmp_path: Path) -> None:
    path = write(tmp_path / "a.tif")
    for number, (offset, size) in enumerate(segments(path)):
        if number != 4:  # second of three rows of tiles, second of three in it
            overwrite(path, offset, bytes(size))
    source = TiffSource(path)
    assert_reads(source, pixels(), region(32, 64, 48, 96))
    with pytest.raises(CorruptImage, match=r"rows 31\.\.64, cols 48\.\.96 of .*a\.tif: "):
        source.read(region(31, 64, 48, 96))


def test_no_file_is_open_between_reads(tmp_path: Path) -> None:
    sources = [TiffSource(write(tmp_path / f"{n}.tif")) for n in range(3)]
    for source in sources:
        source.read(region(3, 40, 7, 50))
    open_files = {os.path.realpath(link) for link in Path("/proc/self/fd").iterdir()}
    assert not [file for file in open_files if file.startswith(str(tmp_path.resolve()))]
    assert_reads(sources[0], pixels(), WHOLE)


@pytest.mark.parametrize("options", [{}, {"compression": None}, {"tile": None, "rowsperstrip": 16}])
def test_a_flipped_bit_is_found_where_there_is_a_checksum(tmp_path: Path, options: dict[str, Any]) -> None:
    path = write(tmp_path / "a.tif", **options)
    offset, size = segments(path)[1]
    flip_a_bit(path, offset + size // 2)
    if options.get("compression", "zlib") is None:
        assert (TiffSource(path).read(WHOLE).numpy() != pixels()).sum() == 1
        return
    with pytest.raises(
        CorruptImage, match=r"rows 0\.\.75, cols 0\.\.101 of .*a\.tif: .*; the image is damaged"
    ):
        TiffSource(path).read(WHOLE)


LAYOUTS: dict[str, dict[str, Any]] = {
    "tiles": {},
    "BigTIFF": {"bigtiff": True, "byteorder": ">"},
    "uncompressed tiles": {"compression": None},
    "strips": {"tile": None, "rowsperstrip": 16},
    "one piece": {"tile": None, "compression": None},
    "JPEG": {"compression": "jpeg"},
    "LZW": {"compression": "lzw", "predictor": True},
    "PackBits": {"compression": "packbits", "planarconfig": "separate"},
}


@pytest.mark.parametrize("options", LAYOUTS.values(), ids=LAYOUTS)
@given(part=st.integers(0, 999_999))
@settings(max_examples=25)
def test_a_file_that_was_cut_short_never_gives_pixels(
    tmp_path_factory: pytest.TempPathFactory, options: dict[str, Any], part: int
) -> None:
    if options.get("compression", "zlib") not in ("zlib", None):
        pytest.importorskip("imagecodecs")
    path = tmp_path_factory.mktemp("cut") / "a.tif"
    image = pixels() if "planarconfig" in options else channels_last(pixels())
    tifffile.imwrite(path, image, **{**TILES, **options})
    (offset, size) = max(segments(path))
    os.truncate(path, part * (offset + size) // 1_000_000)  # what follows the pixels may be lost
    with pytest.raises(CorruptImage, match=r"a\.tif.*(cut short|complete|damaged)"):
        TiffSource(path).read(WHOLE)


def test_names_the_first_tile_that_is_lost(tmp_path: Path) -> None:
    path = write(tmp_path / "a.tif")
    offset, size = segments(path)[5]
    os.truncate(path, offset + size - 1)
    with pytest.raises(
        CorruptImage,
        match=rf"a\.tif has {offset + size - 1} bytes, its tile of rows 32\.\.64, cols 96\.\.101 would be "
        rf"{size} bytes at {offset}; it was cut short",
    ):
        TiffSource(path)
    tifffile.imwrite(path, channels_last(pixels()), photometric="rgb")
    os.truncate(path, segments(path)[0][0] + 101 * 3 * 7 + 5)
    with pytest.raises(CorruptImage, match=r"ends at byte \d+, in row 7 of its pixels; it was cut short"):
        TiffSource(path)


def test_names_a_stack_whose_later_pages_are_lost(tmp_path: Path) -> None:
    """What is left is a whole image of fewer channels."""
    path = tmp_path / "a.tif"
    tifffile.imwrite(path, pixels(), photometric="minisblack", compression="zlib", metadata=None)
    with tifffile.TiffFile(path) as file:
        last = file.pages[2].offset
    os.truncate(path, last)
    with pytest.raises(
        CorruptImage, match=rf"ends at byte {last}, its directory goes on at {last}; it was cut"
    ):
        TiffSource(path, channels_last=False)


def test_tiles_that_were_left_out_are_fill_and_damaged_lists_are_errors(tmp_path: Path) -> None:
    path = tmp_path / "a.tif"
    tiles = [np.full((16, 16), n + 1, "u1") if n != 1 else None for n in range(4)]
    tifffile.imwrite(path, iter(tiles), shape=(32, 32), dtype="u1", tile=(16, 16), compression="zlib")
    got = TiffSource(path).read(Region.whole((32, 32))).numpy()[0]
    np.testing.assert_array_equal(got[::16, ::16], [[1, 0], [3, 4]])
    with tifffile.TiffFile(path) as file:
        offsets = file.pages.first.tags["TileOffsets"]
    overwrite(path, offsets.valueoffset, struct.pack("<I", 0))
    with pytest.raises(CorruptImage, match=r"its tile of rows 0\.\.16, cols 0\.\.16 would be \d+ bytes at 0"):
        TiffSource(path)


def test_tifffile_logs_of_files_that_are_opened_alone(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Of one that is refused the error says what is wrong, once."""
    whole, pixels = (
        tmp_path / "whole.tif",
        np.random.default_rng(0).integers(255, size=(300, 300), dtype="u1"),
    )
    with tifffile.TiffWriter(whole) as writer:
        writer.write(pixels, subifds=1, tile=(64, 64))
        writer.write(pixels[::2, ::2], subfiletype=1, tile=(64, 64))
    content = whole.read_bytes()
    (cut := tmp_path / "cut.tif").write_bytes(content[: len(content) // 3])
    with pytest.raises(CorruptImage, match=r"cut\.tif"):
        TiffSource(cut)
    assert caplog.records == []
    with told_if_opened():
        logging.getLogger("tifffile").warning("an odd tag")
        assert caplog.messages == []
    assert caplog.messages == ["an odd tag"]


@pytest.mark.parametrize("content", [b"", b"II*\0", b"II*\0\x08\0\0\0", b"II*\0" + b"\xff" * 50, b"hello"])
def test_names_what_is_no_tiff(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a.tif").write_bytes(content)
    with pytest.raises(CorruptImage, match=r"a\.tif.*(damaged|cut short)"):
        TiffSource(tmp_path / "a.tif")


def test_names_a_file_that_is_missing_or_forbidden(tmp_path: Path) -> None:
    with pytest.raises(CorruptImage, match=r"no TIFF at .*a\.tif: give the path"):
        TiffSource(tmp_path / "a.tif")
    source = TiffSource(write(tmp_path / "a.tif"))
    with forbidden(tmp_path):
        with pytest.raises(CorruptImage, match=r"cannot open .*a\.tif: .*Permission denied"):
            TiffSource(tmp_path / "a.tif")
        with pytest.raises(CorruptImage, match=r"cannot read rows .* of .*a\.tif: .*Permission denied"):
            source.read(WHOLE)


@pytest.mark.parametrize("options", [TILES, {"photometric": "rgb"}], ids=["tiles", "one piece"])
def test_names_a_file_that_changes_after_it_was_opened(tmp_path: Path, options: dict[str, Any]) -> None:
    path = tmp_path / "a.tif"
    tifffile.imwrite(path, channels_last(pixels()), **options)
    source, gone = TiffSource(path), TiffSource(path)
    os.truncate(path, path.stat().st_size - 1)
    with pytest.raises(CorruptImage, match=r"of .*a\.tif: the file was changed since it was opened"):
        source.read(WHOLE)
    path.unlink()
    with pytest.raises(CorruptImage, match=r"of .*a\.tif: the file is gone since it was opened"):
        gone.read(WHOLE)


def test_one_strip_is_decoded_once_and_only_up_to_a_limit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(tmp_path / "a.tif", tile=None, rowsperstrip=75)
    with pytest.raises(
        DatasetMismatch,
        match=r"strips of 75 x 101 = 7575 pixels with 3 values each: allowed are 7574 .*max_pixels=",
    ):
        TiffSource(path, max_pixels=7574)
    source = pickle.loads(pickle.dumps(TiffSource(path, max_pixels=7575)))
    assert_reads(source, pixels(), region(3, 40, 7, 50))
    monkeypatch.setattr("zarr.Array.__getitem__", None)
    assert_reads(source, pixels(), WHOLE)
    # What is not compressed is mapped, of whatever size it is.
    tifffile.imwrite(path, channels_last(pixels()), photometric="rgb")
    assert_reads(TiffSource(path, max_pixels=1), pixels(), region(3, 40, 7, 50))


def test_images_and_levels_are_chosen_by_number(tmp_path: Path) -> None:
    path = tmp_path / "a.tif"
    sizes = [(150, 202), (75, 101), (38, 51)]
    write_pyramid(path, [pixels(3, size=size) for size in sizes])
    for level, size in enumerate(sizes):
        assert_reads(TiffSource(path, level=level), pixels(3, size=size), region(1, 38, 3, 51))
    assert TiffSource(path, level=2).name == f"{path} (level 2)"
    with pytest.raises(DatasetMismatch, match=r"a\.tif has no level 3: allowed are 0\.\.2"):
        TiffSource(path, level=3)
    tifffile.imwrite(path, pixels(1)[0], append=True, tile=(16, 16))
    assert_reads(TiffSource(path, series=1), pixels(1), region(3, 40, 7, 50))
    with pytest.raises(DatasetMismatch, match=r"a\.tif has no image 2: allowed are 0\.\.1"):
        TiffSource(path, series=2)


def test_a_stack_that_does_not_say_what_it_is_must_be_told(tmp_path: Path) -> None:
    path = tmp_path / "a.tif"
    tifffile.imwrite(path, pixels(5), photometric="minisblack", compression="zlib")
    with pytest.raises(DatasetMismatch, match=r"has 5 planes along 'Q': allowed is one axis of channels"):
        TiffSource(path)
    source = pickle.loads(pickle.dumps(TiffSource(path, channels_last=False)))
    assert_reads(source, pixels(5), region(3, 40, 7, 50))
    tifffile.imwrite(path, channels_last(pixels(5)), photometric="minisblack")
    assert_reads(TiffSource(path, channels_last=True), pixels(5), region(3, 40, 7, 50))


@pytest.mark.parametrize("axes", ["ZYX", "TYX"])
def test_refuses_depth_and_time(tmp_path: Path, axes: str) -> None:
    metadata = {"axes": axes}
    tifffile.imwrite(tmp_path / "a.ome.tif", pixels(5), photometric="minisblack", metadata=metadata)
    for told in (None, False):
        with pytest.raises(DatasetMismatch, match=rf"has 5 planes along '{axes[0]}': allowed is one axis"):
            TiffSource(tmp_path / "a.ome.tif", channels_last=told)


def test_refuses_palettes_and_colours_that_are_no_rgb(tmp_path: Path) -> None:
    path = tmp_path / "a.tif"
    colors = np.zeros((3, 256), "u2")
    tifffile.imwrite(path, pixels(1)[0], photometric="palette", colormap=colors)
    with pytest.raises(DatasetMismatch, match=r"a\.tif holds numbers of colours in a palette: .* to RGB"):
        TiffSource(path)
    tifffile.imwrite(path, channels_last(pixels()), photometric="ycbcr", compression="zlib")
    with pytest.raises(DatasetMismatch, match=r"a\.tif holds YCbCr colours that are not JPEG-compressed"):
        TiffSource(path)


def test_names_the_file_of_a_plane_that_is_not_there(tmp_path: Path) -> None:
    """An OME-TIFF may spread its planes over several files."""
    names = [f"{n}.ome.tif" for n in range(3)]
    planes = "".join(
        f'<TiffData FirstC="{n}" IFD="0" PlaneCount="1"><UUID FileName="{name}">urn:uuid:{n}</UUID>'
        "</TiffData>"
        for n, name in enumerate(names)
    )
    for n, name in enumerate(names):
        description = (
            '<?xml version="1.0" encoding="UTF-8"?>'
            f'<OME xmlns="http://www.openmicroscopy.org/Schemas/OME/2016-06" UUID="urn:uuid:{n}">'
            '<Image ID="Image:0"><Pixels ID="Pixels:0" DimensionOrder="XYCZT" Type="uint8" '
            f'SizeX="101" SizeY="75" SizeC="3" SizeZ="1" SizeT="1">{planes}</Pixels></Image></OME>'
        )
        tifffile.imwrite(
            tmp_path / name, pixels()[n], description=description, metadata=None, compression="zlib"
        )
    source = TiffSource(tmp_path / names[0])
    assert_reads(source, pixels(), region(3, 40, 7, 50))
    (tmp_path / names[1]).touch()
    with pytest.raises(CorruptImage, match=r"0\.ome\.tif: the file was changed since"):
        source.read(WHOLE)
    (tmp_path / names[2]).unlink()
    with pytest.raises(
        CorruptImage, match=r"0\.ome\.tif lacks its plane 2: the file that holds it is not there"
    ):
        TiffSource(tmp_path / names[0])


def run(script: str, *arguments: object) -> str:
    """What a fresh interpreter prints."""
    command = [sys.executable, "-c", textwrap.dedent(script), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_says_what_to_install_for_codecs_that_are_missing(tmp_path: Path) -> None:
    pytest.importorskip("imagecodecs")
    write(tmp_path / "lzw.tif", compression="lzw")
    write(tmp_path / "zlib.tif", predictor=True)
    tifffile.imwrite(tmp_path / "packed.tif", pixels(1)[0] // 16, bitspersample=4, tile=(16, 16))
    printed = run(
        """
        import sys
        sys.modules["imagecodecs"] = None
        from streamcnn.data.sources import TiffSource
        from streamcnn.geometry.regions import Region
        print(TiffSource(sys.argv[1] + "/zlib.tif").read(Region.whole((75, 101))).sum().item())
        for name in ("lzw", "packed"):
            try:
                TiffSource(f"{sys.argv[1]}/{name}.tif").read(Region.whole((75, 101)))
            except ImportError as error:
                print(error)
        """,
        tmp_path,
    )
    total, *errors = printed.splitlines()
    assert int(total) == pixels().sum()
    assert len(errors) == 2
    assert all("imagecodecs cannot be imported" in error for error in errors)
    assert all("pip install 'streamcnn[tiff]'" in error for error in errors)


MAKE_LARGE = """
    import sys, numpy as np, tifffile
    def tiles():
        for row in range(40):
            for col in range(40):
                yield np.full((512, 512, 3), (row * 5, col * 5, (row + col) % 251), np.uint8)
    tifffile.imwrite(
        sys.argv[1], tiles(), shape=(20_000, 20_000, 3), dtype="u1", tile=(512, 512), bigtiff=True,
        photometric="rgb", compression="zlib", compressionargs={"level": 1}, maxworkers=1,
    )
"""
READ_LARGE = """
    import resource, sys
    import streamcnn, torch
    from streamcnn.data.sources import open_image
    from streamcnn.geometry.regions import Interval, Region
    def peak():
        with open("/proc/self/status") as file:
            return next(int(line.split()[1]) * 1024 for line in file if line.startswith("VmHWM"))
    baseline = peak()
    source = open_image(sys.argv[1])
    assert source.shape == (3, 20_000, 20_000)
    for top in range(0, 20_000, 2000):
        for left in range(0, 20_000, 2000):
            tile = source.read(Region(Interval(top, top + 2000), Interval(left, left + 2000)))
            rows, cols = torch.arange(top, top + 2000) // 512, torch.arange(left, left + 2000) // 512
            assert torch.equal(tile[0], (rows * 5).to(torch.uint8)[:, None].expand(2000, 2000))
            assert torch.equal(tile[1], (cols * 5).to(torch.uint8)[None].expand(2000, 2000))
    print(peak() - baseline)
"""


def test_an_image_of_1_2_gb_is_read_in_a_fraction_of_that(tmp_path: Path) -> None:
    path = tmp_path / "large.tif"
    run(MAKE_LARGE, path)
    assert path.stat().st_size < 30e6
    assert int(run(READ_LARGE, path)) < 150e6
