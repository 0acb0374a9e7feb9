"""Series of DICOM files: slides in several levels and files, which are read, and others, which are not."""

from __future__ import annotations

import re
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from source_contract import assert_reads, pixels, region
from typer.testing import CliRunner

from streamcnn.cli.command_line import app
from streamcnn.data.image_files import find_images
from streamcnn.data.sources import open_image
from streamcnn.data.tile_store import TileStore
from streamcnn.errors import CorruptImage

WHOLE_SLIDE = "1.2.840.10008.5.1.4.1.1.77.1.6"
CT = "1.2.840.10008.5.1.4.1.1.2"
EXPLICIT = "1.2.840.10008.1.2.1"
TILE = 64
IMAGE = pixels(3, size=(150, 202))


def element(group: int, number: int, kind: str, value: str | int | bytes) -> bytes:
    """A data element of explicit type in little endian."""
    if isinstance(value, int):
        value = struct.pack({"US": "<H", "UL": "<I"}[kind], value)
    elif isinstance(value, str):
        value = value.encode()
        value += (b"\0" if kind == "UI" else b" ") * (len(value) % 2)
    head = struct.pack("<HH", group, number) + kind.encode()
    long = kind in ("OB", "OW")
    return head + (struct.pack("<HI", 0, len(value)) if long else struct.pack("<H", len(value))) + value


def dicom(path: Path, sop_class: str, series: str, number: int, elements: list[tuple[Any, ...]]) -> Path:
    """A DICOM file; ``elements`` are (group, number, kind, value)."""
    instance = f"{series}.{number}"
    meta = b"".join(
        element(0x0002, *each)
        for each in (
            (0x0001, "OB", b"\0\1"),
            (0x0002, "UI", sop_class),
            (0x0003, "UI", instance),
            (0x0010, "UI", EXPLICIT),
            (0x0012, "UI", "1.2.3.4"),
        )
    )
    every = [
        *((0x0008, 0x0016, "UI", sop_class), (0x0008, 0x0018, "UI", instance)),
        *((0x0020, 0x000D, "UI", "1.2.9"), (0x0020, 0x000E, "UI", series)),
        *((0x0020, 0x0013, "IS", str(number)), (0x0028, 0x0103, "US", 0)),
        *elements,
    ]
    content = b"".join(element(*each) for each in sorted(every, key=lambda each: each[:2]))
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(bytes(128) + b"DICM" + element(0x0002, 0, "UL", len(meta)) + meta + content)
    return path


def level(path: Path, image: NDArray[np.uint8], series: str, number: int, kind: str = "VOLUME") -> Path:
    """One level of a slide, (3, H, W), in uncompressed tiles."""
    _, height, width = image.shape
    padded = np.zeros((-(-height // TILE) * TILE, -(-width // TILE) * TILE, 3), np.uint8)
    padded[:height, :width] = np.moveaxis(image, 0, -1)
    down, across = padded.shape[0] // TILE, padded.shape[1] // TILE
    tiles = padded.reshape(down, TILE, across, TILE, 3).transpose(0, 2, 1, 3, 4)
    made = "ORIGINAL\\PRIMARY\\{}\\NONE" if number == 0 else "DERIVED\\PRIMARY\\{}\\RESAMPLED"
    elements: list[tuple[Any, ...]] = [
        *((0x0008, 0x0008, "CS", made.format(kind)), (0x0008, 0x0060, "CS", "SM")),
        (0x0020, 0x9311, "CS", "TILED_FULL"),
        *((0x0028, 0x0002, "US", 3), (0x0028, 0x0004, "CS", "RGB"), (0x0028, 0x0006, "US", 0)),
        (0x0028, 0x0008, "IS", str(down * across)),
        *((0x0028, 0x0010, "US", TILE), (0x0028, 0x0011, "US", TILE)),
        *((0x0028, 0x0100, "US", 8), (0x0028, 0x0101, "US", 8), (0x0028, 0x0102, "US", 7)),
        *((0x0048, 0x0006, "UL", width), (0x0048, 0x0007, "UL", height)),
        *((0x0048, 0x0302, "UL", 1), (0x0048, 0x0303, "UL", 1)),
        (0x7FE0, 0x0010, "OB", tiles.tobytes()),
    ]
    return dicom(path, WHOLE_SLIDE, series, number, elements)


def ct_slice(path: Path, series: str, number: int) -> Path:
    elements: list[tuple[Any, ...]] = [
        *((0x0008, 0x0008, "CS", "ORIGINAL\\PRIMARY\\AXIAL"), (0x0008, 0x0060, "CS", "CT")),
        *((0x0028, 0x0002, "US", 1), (0x0028, 0x0004, "CS", "MONOCHROME2")),
        *((0x0028, 0x0010, "US", 16), (0x0028, 0x0011, "US", 16)),
        *((0x0028, 0x0100, "US", 16), (0x0028, 0x0101, "US", 12), (0x0028, 0x0102, "US", 11)),
        (0x7FE0, 0x0010, "OW", bytes(512)),
    ]
    return dicom(path, CT, series, number, elements)


@pytest.fixture
def slide(tmp_path: Path) -> Path:
    """A slide in two levels and the picture of its label, in files whose names say nothing of that."""
    pytest.importorskip("openslide")
    level(tmp_path / "slides/b.dcm", IMAGE, "1.2.5", 0)
    level(tmp_path / "slides/a.dcm", IMAGE[:, ::2, ::2], "1.2.5", 1)
    level(tmp_path / "slides/c.dcm", IMAGE[:, :40, :50], "1.2.5", 2, kind="LABEL")
    return tmp_path / "slides"


@pytest.mark.parametrize("name", ["a.dcm", "b.dcm", "c.dcm"])
def test_a_slide_is_opened_by_any_of_its_files(slide: Path, name: str) -> None:
    assert_reads(open_image(slide / name), IMAGE, region(5, 140, 10, 202))
    assert_reads(open_image(slide / name, level=1), IMAGE[:, ::2, ::2], region(5, 70, 10, 101))


def test_a_slide_in_several_files_is_one_image_for_every_command(slide: Path) -> None:
    level(slide / "other.dcm", IMAGE[:, :70, :80], "1.2.6", 0)
    first, second = find_images([slide])
    assert (first.relative, first.others) == ("a.dcm", (slide / "b.dcm", slide / "c.dcm"))
    assert second.relative == "other.dcm"
    result = CliRunner().invoke(app, ["convert", str(slide), str(slide.parent / "out")])
    assert result.exit_code == 0, result.exception
    store = TileStore(slide.parent / "out")
    assert [record.name for record in store.records] == ["a", "other"]
    assert_reads(store.source(store.records[0]), IMAGE, region(0, 150, 0, 202))
    assert_reads(store.source(store.records[1]), IMAGE[:, :70, :80], region(0, 70, 0, 80))
    result = CliRunner().invoke(app, ["info", str(slide / "c.dcm")])
    assert "3 x 150 x 202" in result.output


def test_a_series_of_slices_is_refused_by_name(tmp_path: Path) -> None:
    pytest.importorskip("openslide")
    for number in range(3):
        ct_slice(tmp_path / f"ct/{number}.dcm", "1.2.7", number)
    (image,) = find_images([tmp_path / "ct"])
    assert len(image.others) == 2
    message = (
        f"{image.path} is no whole slide (VL Whole Slide Microscopy) that OpenSlide knows, or is damaged: of "
        "DICOM files only these can be read, no slices of CT or MR; write each image as a TIFF or a zarr "
        "array"
    )
    with pytest.raises(CorruptImage, match=re.escape(message)):
        open_image(image.path)


@pytest.mark.parametrize("num_bytes", [0, 100, 132, 600, 5000])
def test_a_slide_that_is_cut_short_is_named(slide: Path, num_bytes: int) -> None:
    path = slide / "b.dcm"
    path.write_bytes(path.read_bytes()[:num_bytes])
    with pytest.raises(CorruptImage, match=r"b\.dcm"):
        open_image(path).read(region(0, 150, 0, 202))
