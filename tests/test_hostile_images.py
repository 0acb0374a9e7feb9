"""TIFF files that are damaged or hostile: refused, with bounded memory."""

from __future__ import annotations

import json
import os
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import imagecodecs
import numpy as np
import pytest
import tifffile
import zarr
from hostile import SIZE, find_images_of, refused_or_not
from source_contract import pixels, region

from streamcnn.data.image_files import find_images
from streamcnn.data.sources import (
    TiffSource,
    ZarrSource,
    open_image,
)
from streamcnn.data.sources.picture_heads import picture_size
from streamcnn.data.sources.tiff_bounds import check_micromanager
from streamcnn.data.sources.tiff_series import tiff_series
from streamcnn.errors import CorruptImage, DatasetMismatch


def ome(parts: str = "<TiffData/>", **sizes: object) -> str:
    """OME-XML of one image."""
    known = {"SizeC": 1, "SizeT": 1, "SizeZ": 1, "SizeX": SIZE[1], "SizeY": SIZE[0], **sizes}
    attributes = " ".join(f'{key}="{value}"' for key, value in known.items())
    return (
        '<OME xmlns="http://www.openmicroscopy.org/Schemas/OME/2016-06"><Image ID="Image:0"><Pixels '
        f'DimensionOrder="XYCZT" ID="Pixels:0" {attributes} Type="uint8">{parts}</Pixels></Image></OME>'
    )


def write_ome(folder: Path, text: str) -> Path:
    path = folder / "a.tif"
    image = pixels(1, size=SIZE)[0]
    tifffile.imwrite(path, image, description=text, metadata=None, tile=(16, 16))
    return path


@pytest.mark.parametrize(
    ("text", "count"),
    [
        (ome(SizeC=10**14), 10**14),
        (ome(SizeT=10**7, SizeZ=10**7), 10**14),
        (ome('<TiffData IFD="0" PlaneCount="100000000000000"/>'), 10**14),
        (ome('<TiffData IFD="0" NumPlanes="1048577"/>'), 2**20 + 1),
        (ome('<TiffData FirstC="99999999"/>', SizeC=10**6), 99_999_999),
        (ome('<TiffData IFD="99999999"/>'), 99_999_999),
        (ome(SizeX=10**6, SizeY=10**6), 10**12 // (40 * 30)),
    ],
)
def test_a_tiff_that_tells_of_more_planes_than_can_be_is_refused(
    tmp_path: Path, text: str, count: int
) -> None:
    path = write_ome(tmp_path, text)
    for open_it in (open_image, TiffSource, tiff_series):
        with pytest.raises(
            DatasetMismatch, match=rf"a\.tif has metadata that tell of {count} planes or parts: allowed"
        ):
            open_it(path)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (ome(SizeC="x"), "SizeC is 'x': allowed are whole numbers"),
        (ome(SizeC="9" * 5000), "SizeC is '9{80}': allowed are whole numbers"),
        (ome(SizeC="٣"), "SizeC is '٣': allowed are whole numbers"),
        (ome("<TiffData>"), "a description in damaged OME-XML"),
    ],
)
def test_a_tiff_with_damaged_numbers_is_refused(tmp_path: Path, text: str, said: str) -> None:
    path = tmp_path / "a.tif"
    image = pixels(1, size=SIZE)[0]
    tifffile.imwrite(path, image, description=text.encode(), metadata=None, tile=(16, 16))
    with pytest.raises(CorruptImage, match=said):
        TiffSource(path)


LAUGHS = "".join(f'<!ENTITY e{n} "{f"&e{n - 1};" * 10}">' for n in range(1, 12))
XML_BOMBS = [
    f'<?xml version="1.0"?><!DOCTYPE x [<!ENTITY e0 "ha">{LAUGHS}]><OME>&e11;</OME>',
    f"<OME>{'<a>' * 300_000}{'</a>' * 300_000}</OME>",
]


@pytest.mark.parametrize("text", XML_BOMBS, ids=["laughs", "depth"])
def test_xml_that_grows_without_end_is_read_no_further(tmp_path: Path, text: str) -> None:
    tiff = tmp_path / "tiff" / "a.tif"
    tiff.parent.mkdir()
    tifffile.imwrite(tiff, pixels(1, size=SIZE)[0], description=text, metadata=None, tile=(16, 16))
    raw = tmp_path / "raw"
    group = zarr.create_group(raw, zarr_format=2)
    group.attrs["bioformats2raw.layout"] = 3
    group.create_group("0")
    (raw / "OME").mkdir()
    (raw / "OME" / "METADATA.ome.xml").write_text(text)
    for use in (open_image, tiff_series, find_images_of):
        with refused_or_not():
            use(tiff)
    with refused_or_not():
        find_images([raw])
    with pytest.raises(CorruptImage):
        ZarrSource(raw)


@pytest.mark.parametrize("name", ["../b.tif", "{elsewhere}/b.tif", "inside/../../b.tif"])
def test_a_tiff_that_goes_on_in_another_folder_is_refused(tmp_path: Path, name: str) -> None:
    folder, elsewhere = tmp_path / "folder", tmp_path
    folder.mkdir()
    tifffile.imwrite(elsewhere / "b.tif", pixels(1, size=SIZE)[0])
    part = (
        f'<TiffData IFD="0"><UUID FileName="{name.format(elsewhere=elsewhere)}">urn:uuid:1</UUID></TiffData>'
    )
    path = write_ome(folder, ome(part))
    for open_it in (open_image, tiff_series):
        with pytest.raises(
            CorruptImage, match=r"b\.tif leads to .*b\.tif: allowed are files and links inside"
        ):
            open_it(path)


def test_a_tiff_that_goes_on_in_a_pipe_is_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "b.tif")
    part = '<TiffData IFD="0"><UUID FileName="b.tif">urn:uuid:1</UUID></TiffData>'
    with pytest.raises(CorruptImage, match=r"b\.tif is a named pipe"):
        TiffSource(write_ome(tmp_path, ome(part)))


def ndtiff_index(*names: str) -> bytes:
    """The index of an NDTiff dataset: a plane of uint8 in each file."""
    parts = []
    for at, name in enumerate(names):
        axes, encoded = json.dumps({"channel": at}).encode(), name.encode()
        parts += [struct.pack("<I", len(axes)), axes, struct.pack("<I", len(encoded)), encoded]
        parts.append(struct.pack("<8I", 8, 30, 40, 0, 0, 0, 0, 0))
    return b"".join(parts)


@pytest.mark.parametrize("name", ["../b.tif", "/etc/passwd", "b.tif"])
def test_an_ndtiff_that_goes_on_elsewhere_or_in_a_pipe_is_refused(tmp_path: Path, name: str) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    path = folder / "a.tif"
    tifffile.imwrite(path, pixels(1, size=SIZE)[0], metadata=None)
    os.mkfifo(folder / "b.tif")
    (folder / "NDTiff.index").write_bytes(ndtiff_index("a.tif", name))
    with tifffile.TiffFile(path) as file:
        file.__dict__["is_ndtiff"] = True
        file.__dict__["is_mmstack"] = False
        with pytest.raises(CorruptImage, match=r"leads to .*: allowed are files|b\.tif is a named pipe"):
            check_micromanager("a.tif", file)


def change_tag(path: Path, code: int, value: int) -> None:
    """Change a tag of the first page in place."""
    with tifffile.TiffFile(path) as file:
        tag = file.pages.first.tags[code]
    content = bytearray(path.read_bytes())
    struct.pack_into("<H" if tag.dtype == 3 else "<I", content, tag.offset + 8, value)
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("options", "tags", "said"),
    [
        (
            {"tile": (4096, 4096)},
            {277: 65_535},
            "tiles of 4096 x 4096 = 16777216 pixels with 65535 values",
        ),
        ({"rowsperstrip": 2000}, {277: 65_535}, "strips of 2000 x 2000 = 4000000 pixels with 65535 values"),
        ({"tile": (16, 16)}, {322: 2**28}, "tiles of 16 x 268435456 = 4294967296 pixels"),
        ({"tile": (16, 16)}, {323: 2**28}, "tiles of 268435456 x 16 = 4294967296 pixels"),
        ({"rowsperstrip": 2000}, {256: 2**30}, "strips of 2000 x 1073741824 = 2147483648000 pixels"),
    ],
)
def test_tiles_and_strips_of_any_size_are_not_decoded(
    tmp_path: Path, options: dict[str, Any], tags: dict[int, int], said: str
) -> None:
    path = tmp_path / "a.tif"
    image = np.zeros((2000, 2000, 3), np.uint8)
    tifffile.imwrite(path, image, photometric="rgb", compression="deflate", **options)
    for code, value in tags.items():
        change_tag(path, code, value)
    with pytest.raises(DatasetMismatch, match=rf"a\.tif has {said}"):
        TiffSource(path)


@pytest.mark.parametrize("codec", ["jpeg", "jpeg2k", "jpegxl", "jpegxr", "png", "webp", "lerc"])
def test_a_tile_that_holds_a_larger_picture_is_not_decoded(tmp_path: Path, codec: str) -> None:
    path = tmp_path / "a.tif"
    names = {"jpeg2k": "jpeg2000"}
    options = {"photometric": "rgb", "compression": names.get(codec, codec), "tile": (64, 64)}
    if codec == "webp":
        options["compressionargs"] = {"lossless": True}
    tifffile.imwrite(path, np.zeros((128, 128, 3), np.uint8), **options)
    TiffSource(path).read(region(0, 9, 0, 9))
    bomb = getattr(imagecodecs, f"{codec}_encode")(np.zeros((1500, 1400, 3), np.uint8))
    with tifffile.TiffFile(path) as file:
        tags = file.pages.first.tags
        counts, offsets = (tags[code].valueoffset for code in (325, 324))
        assert tags[325].dtype == tags[324].dtype == 4
    content = bytearray(path.read_bytes())
    struct.pack_into("<I", content, counts, len(bomb))
    struct.pack_into("<I", content, offsets, len(content))
    path.write_bytes(content + bomb)
    with pytest.raises(
        CorruptImage, match=r"a tile or strip of .*a\.tif holds a picture of 1500 x 1400 pixels.* 64 x 64"
    ):
        TiffSource(path).read(region(0, 9, 0, 9))


HEADS = [
    ("jpeg", 7),
    ("jpeg2k", 34712),
    ("jpegxl", 50002),
    ("jpegxr", 34934),
    ("png", 34933),
    ("webp", 50001),
]


@pytest.mark.parametrize(("codec", "compression"), HEADS)
def test_the_size_of_a_picture_stands_in_its_head(codec: str, compression: int) -> None:
    encode = getattr(imagecodecs, f"{codec}_encode")
    for height, width in ((30, 20), (64, 64), (40, 80), (600, 1500), (1, 9)):
        whole = bytes(encode(np.zeros((height, width, 3), np.uint8)))
        assert picture_size(whole, compression) == (height, width)
        assert picture_size(whole[:3], compression) is None
    sizes = {picture_size(whole[:length], compression) for length in range(len(whole))}
    assert sizes <= {None, (1, 9)}


def test_the_size_of_a_lossy_webp_stands_in_its_head() -> None:
    image = np.ascontiguousarray(pixels(3, size=(30, 20)).transpose(1, 2, 0))
    lossy = bytes(imagecodecs.webp_encode(image, lossless=False))
    assert lossy[12:16] == b"VP8 "
    assert picture_size(lossy, 50001) == (30, 20)


def test_memory_for_a_hostile_tiff_is_bounded(tmp_path: Path) -> None:
    """Without the checks the first takes a list of a billion planes, the second three gigabytes of pixels."""
    path = write_ome(tmp_path, ome(SizeC=10**9))
    big = tmp_path / "b.tif"
    image = np.zeros((4000, 4000, 3), np.uint8)
    tifffile.imwrite(big, image, photometric="rgb", compression="deflate", rowsperstrip=4000)
    change_tag(big, 277, 200)
    program = (
        "import resource, sys\n"
        "from streamcnn.data.sources import open_image\n"
        "from streamcnn.errors import StreamError\n"
        "resource.setrlimit(resource.RLIMIT_DATA, (3 * 2**30, 3 * 2**30))\n"
        "for path in sys.argv[1:]:\n"
        "    try:\n"
        "        open_image(path)\n"
        "    except StreamError as error:\n"
        "        print(type(error).__name__)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, path, big], capture_output=True, text=True, check=True, timeout=120
    )
    assert done.stdout.split() == ["DatasetMismatch"] * 2
