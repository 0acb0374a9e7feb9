"""One scan is one image, in however many files it lies."""

from __future__ import annotations

import json
import os
import re
import struct
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import tifffile
import torch
from PIL import Image

from streamcnn import CorruptImage, DatasetMismatch
from streamcnn.data.dicom import series_uid
from streamcnn.data.file_dataset import open_dataset
from streamcnn.data.image_files import find_images
from streamcnn.data.sources import open_image, write_zarr_image
from streamcnn.regions import Region


def picture(path: Path, value: int = 0) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((6, 8, 3), value, np.uint8)).save(path)
    return path


def tiff(path: Path, value: int = 0) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    tifffile.imwrite(path, np.full((6, 8, 3), value, np.uint8), photometric="rgb")
    return path


def names(*paths: Path) -> list[str]:
    return [image.relative for image in find_images(paths)]


def element(group: int, number: int, kind: str, value: bytes, *, implicit: bool = False) -> bytes:
    value += b"\0" * (len(value) % 2)
    tag = struct.pack("<HH", group, number)
    if implicit:
        return tag + struct.pack("<I", len(value)) + value
    if kind in ("SQ", "OB"):
        return tag + kind.encode() + struct.pack("<HI", 0, len(value)) + value
    return tag + kind.encode() + struct.pack("<H", len(value)) + value


def dicom(path: Path, series: str, *, implicit: bool = False) -> Path:
    """The head of a DICOM file, with sequences of known and unknown length before its series."""
    syntax = b"1.2.840.10008.1.2" if implicit else b"1.2.840.10008.1.2.1"
    inner = element(0x0020, 0x000E, "UI", b"9.9", implicit=implicit)
    item = struct.pack("<HHI", 0xFFFE, 0xE000, len(inner)) + inner
    open_item = (
        struct.pack("<HHI", 0xFFFE, 0xE000, 0xFFFFFFFF) + inner + struct.pack("<HHI", 0xFFFE, 0xE00D, 0)
    )
    head = struct.pack("<HH", 0x0008, 0x1140) + (b"" if implicit else b"SQ\0\0") + b"\xff" * 4
    content = [
        element(0x0002, 0x0010, "UI", syntax),
        element(0x0008, 0x0060, "CS", b"SM", implicit=implicit),
        element(0x0008, 0x1115, "SQ", item, implicit=implicit),
        head + open_item + struct.pack("<HHI", 0xFFFE, 0xE0DD, 0),
        element(0x0010, 0x0010, "PN", b"X", implicit=implicit),
        element(0x0020, 0x000D, "UI", b"1.2", implicit=implicit),
        element(0x0020, 0x000E, "UI", series.encode(), implicit=implicit),
    ]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"\0" * 128 + b"DICM" + b"".join(content) + path.name.encode())
    return path


@pytest.mark.parametrize("implicit", [False, True])
def test_the_series_of_a_dicom_file_is_read(tmp_path: Path, implicit: bool) -> None:
    assert series_uid(dicom(tmp_path / "a.dcm", "1.2.3", implicit=implicit)) == "1.2.3"
    cut = (tmp_path / "a.dcm").read_bytes()
    for length in range(128, len(cut) - 14):
        (tmp_path / "b.dcm").write_bytes(cut[:length])
        assert series_uid(tmp_path / "b.dcm") is None
    assert series_uid(picture(tmp_path / "c.png")) is None


def test_a_dicom_series_is_one_image(tmp_path: Path) -> None:
    for number in range(3):
        dicom(tmp_path / f"cat/{number}.dcm", "1.2.3")
    dicom(tmp_path / "cat/other.dcm", "1.2.4")
    first, second = find_images([tmp_path])
    assert (first.relative, second.relative) == ("cat/0.dcm", "cat/other.dcm")
    assert first.others == (tmp_path / "cat/1.dcm", tmp_path / "cat/2.dcm")
    # Named one by one, as a shell does it.
    assert names(*sorted((tmp_path / "cat").iterdir())) == ["0.dcm", "other.dcm"]
    dicom(tmp_path / "dog/3.dcm", "1.2.3")
    with pytest.raises(
        DatasetMismatch, match=r"0\.dcm and .*3\.dcm are one image \(the DICOM series 1\.2\.3\)"
    ):
        find_images([tmp_path])


def ome(folder: Path, stem: str, *, images: int = 1, files: int = 3) -> list[Path]:
    """An OME-TIFF with a channel in each file, of which each file has the whole description."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"{stem}_{number}.ome.tif" for number in range(files)]
    planes = "".join(
        f'<TiffData FirstC="{n}" IFD="0" PlaneCount="1"><UUID FileName="{path.name}">urn:uuid:{n}</UUID>'
        "</TiffData>"
        for n, path in enumerate(paths)
    )
    channels = '<Channel SamplesPerPixel="1"/>' * files
    pixels = (
        f'<Pixels DimensionOrder="XYCZT" Type="uint8" SizeX="8" SizeY="6" SizeC="{files}" SizeZ="1" '
        f'SizeT="1" ID="Pixels:0">{channels}{planes}</Pixels>'
    )
    image = "".join(f'<Image ID="Image:{n}">{pixels}</Image>' for n in range(images))
    for n, path in enumerate(paths):
        text = (
            f'<?xml version="1.0"?><OME xmlns="http://www.openmicroscopy.org/Schemas/OME/2016-06" '
            f'UUID="urn:uuid:{n}">{image}</OME>'
        )
        tifffile.imwrite(path, np.full((6, 8), n, np.uint8), description=text, metadata=None)
    return paths


def test_an_ome_tiff_in_several_files_is_one_image(tmp_path: Path) -> None:
    ome(tmp_path / "cat", "a")
    paths = ome(tmp_path / "cat", "b")
    first, second = find_images([tmp_path])
    assert (first.relative, second.relative) == ("cat/a_0.ome.tif", "cat/b_0.ome.tif")
    assert second.others == tuple(paths[1:])
    source = open_image(second.path)
    assert source.shape == (3, 6, 8)
    assert source.read(Region.whole((6, 8)))[:, 0, 0].tolist() == [0, 1, 2]
    assert names(*paths) == ["b_0.ome.tif"]
    table = tmp_path / "labels.csv"
    table.write_text("image,label,split\ncat/b_0.ome.tif,0,train\ncat/b_1.ome.tif,0,test\n")
    with pytest.raises(DatasetMismatch, match=r"line 3: 'cat/b_1.ome.tif' is the same image as line 2"):
        open_dataset(table)


def test_ome_tiffs_that_cannot_be_told_apart_are_refused(tmp_path: Path) -> None:
    ome(tmp_path, "a", images=2)
    with pytest.raises(
        DatasetMismatch, match=r"a_0.ome.tif is a part of an OME-TIFF with 2 images in 3 files"
    ):
        find_images([tmp_path])
    text = '<OME><BinaryOnly MetadataFile="x.companion.ome" UUID="urn:uuid:1"/></OME>'
    tifffile.imwrite(tmp_path / "part.tif", np.zeros((6, 8), np.uint8), description=text, metadata=None)
    with pytest.raises(DatasetMismatch, match=r"several files, described by x\.companion\.ome"):
        find_images([tmp_path / "part.tif"])


def test_an_ome_tiff_that_was_renamed_is_itself(tmp_path: Path) -> None:
    (path,) = ome(tmp_path, "a", files=1)
    (tmp_path / "b.tif").write_bytes(path.read_bytes())
    assert names(tmp_path) == ["a_0.ome.tif", "b.tif"]


def test_what_lies_beside_an_image_is_none(tmp_path: Path) -> None:
    for value, name in enumerate(("a.tif", "b.tif")):
        tiff(tmp_path / name, value)
        for ending in (".ovr", ".msk"):
            tiff(tmp_path / f"{name}{ending}")
        for ending in (".aux.xml", ".tfw", ".prj"):
            (tmp_path / f"{name}{ending}").write_text("text")
    tiff(tmp_path / "b.ovr")
    tiff(tmp_path / "._a.tif")
    tiff(tmp_path / "__MACOSX/a.tif")
    tiff(tmp_path / "@eaDir/a.tif/SYNOPHOTO_THUMB_M.jpg.tif")
    (tmp_path / "Thumbs.db").write_bytes(b"II*\0")
    (tmp_path / "notes.txt").write_text("")
    assert names(tmp_path) == ["a.tif", "b.tif"]
    assert names(tmp_path / "a.tif.msk", tmp_path / "a.tif", tmp_path / "a.tif.ovr") == ["a.tif"]
    with pytest.raises(DatasetMismatch, match=r"a\.tif\.ovr is a part of another image; give that one"):
        find_images([tmp_path / "a.tif.ovr"])
    tiff(tmp_path / "c.tif.ovr")
    with pytest.raises(
        DatasetMismatch, match=r"c\.tif\.ovr is an overview or a mask of c\.tif, which is not"
    ):
        find_images([tmp_path])


def test_the_files_of_a_slide_are_one_image(tmp_path: Path) -> None:
    (tmp_path / "a.mrxs").write_bytes(b"\xff\xd8\xff")
    picture(tmp_path / "a/Data0000.png")
    (tmp_path / "b.vms").write_text(
        "[Virtual Microscope Specimen]\r\nNoLayers=1\r\nImageFile=b.jpg\r\nImageFile(1,0)=b(1,0).jpg\r\n"
        "MapFile=b_map2.jpg\r\nMacroImage=b_macro.jpg\r\n"
    )
    for name in ("b.jpg", "b(1,0).jpg", "b_map2.jpg", "b_macro.jpg", "own.jpg"):
        picture(tmp_path / name)
    assert names(tmp_path) == ["a.mrxs", "b.vms", "own.jpg"]


@pytest.mark.parametrize("name", ["a.vsi", "a.ndpis", "a.AFI"])
def test_scans_in_files_that_cannot_be_read_together_are_refused(tmp_path: Path, name: str) -> None:
    tiff(tmp_path / "a-DAPI.tif")
    (tmp_path / name).write_bytes(b"II*\0")
    with pytest.raises(DatasetMismatch, match=re.escape(name) + r" .* scan.*, which cannot be read: allowed"):
        find_images([tmp_path])


def test_thumbnails_are_no_images(tmp_path: Path) -> None:
    for name in ("cat/a.png", "dog/b.png", "thumbnails/a_thumb.png", "dog/Thumbs/b.png"):
        picture(tmp_path / name)
    assert names(tmp_path) == ["cat/a.png", "dog/b.png"]
    assert names(tmp_path / "thumbnails") == ["a_thumb.png"]
    picture(tmp_path / "thumbnails/c.png")
    with pytest.raises(
        DatasetMismatch, match=r"thumbnails/c\.png lies in a folder of thumbnails, and there is"
    ):
        find_images([tmp_path])


def raw(folder: Path, series: Sequence[str], *, version: int) -> None:
    """A folder as bioformats2raw writes it, one array standing for each image."""
    layout = {"bioformats2raw.layout": 3}
    (folder / "OME").mkdir(parents=True)
    if version == 3:
        attributes = {"zarr_format": 3, "node_type": "group", "attributes": {"ome": layout}}
        (folder / "zarr.json").write_text(json.dumps(attributes))
    else:
        (folder / ".zgroup").write_text('{"zarr_format": 2}')
        (folder / ".zattrs").write_text(json.dumps(layout))
    images = "".join(f'<Image Name="{name}"/>' for name in series)
    (folder / "OME/METADATA.ome.xml").write_text(f"<OME>{images}</OME>")
    for at in range(len(series)):
        write_zarr_image(folder / str(at), torch.full((3, 6, 8), at, dtype=torch.uint8))


@pytest.mark.parametrize("version", [2, 3])
def test_the_label_of_a_slide_is_no_image(tmp_path: Path, version: int) -> None:
    raw(tmp_path / "cat/a.zarr", ["a.svs", "label image", "macro image"], version=version)
    raw(tmp_path / "dog/b.zarr", ["b.svs"], version=version)
    first, second = find_images([tmp_path])
    assert (first.name, first.path, first.relative) == ("cat/a", tmp_path / "cat/a.zarr/0", "cat/a.zarr")
    assert second.name == "dog/b"
    assert open_dataset(tmp_path).labels == (0, 1)
    raw(tmp_path / "dog/c.zarr", ["scene 1", "scene 2", "label image"], version=version)
    with pytest.raises(DatasetMismatch, match=r"c\.zarr of bioformats2raw holds 2 images \('0', '1'\)"):
        find_images([tmp_path])
    assert names(tmp_path / "dog/c.zarr/1") == ["1"]


def test_levels_without_a_description_are_refused(tmp_path: Path) -> None:
    raw(tmp_path / "a.zarr", ["x", "y"], version=2)
    (tmp_path / "a.zarr/.zattrs").unlink()
    with pytest.raises(
        DatasetMismatch, match=r"a\.zarr is a zarr group with the arrays '0', '1', which may be"
    ):
        find_images([tmp_path])


@pytest.mark.parametrize("link", [os.symlink, os.link])
def test_links_to_one_file_are_one_image(tmp_path: Path, link: object) -> None:
    picture(tmp_path / "train/cat/a.png")
    (tmp_path / "val/cat").mkdir(parents=True)
    assert callable(link)
    link(tmp_path / "train/cat/a.png", tmp_path / "val/cat/b.png")
    with pytest.raises(DatasetMismatch, match=r"a\.png and .*b\.png are one image \(the file "):
        open_dataset(tmp_path)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (
            "a.png",
            b"",
            r"cat holds 'a\.png', called like an image and none that is known \(it is empty\): see",
        ),
        ("a.PNG", b"some text", r"'a\.PNG', called like .* \(it begins with b'some text'\)"),
        ("a.jp2", b"\0\0\0\x0cjP", r"'a\.jp2', called like .* convert it, copy it again, or move it away"),
        ("IM0001", b"\0" * 128 + b"DICM", r"'IM0001', called like an image"),
        ("a.zarr/readme.txt", b"x", r"'a\.zarr', called like .* \(a folder with no image in it\)"),
    ],
)
def test_what_only_looks_like_an_image_is_named(
    tmp_path: Path, name: str, content: bytes, message: str
) -> None:
    picture(tmp_path / "cat/good.png")
    (tmp_path / "cat" / name).parent.mkdir(exist_ok=True)
    (tmp_path / "cat" / name).write_bytes(content)
    with pytest.raises(CorruptImage, match=message):
        find_images([tmp_path])


def test_a_file_that_is_given_and_no_image_is_named_with_its_content(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_text("some text")
    with pytest.raises(
        CorruptImage, match=r"no image is known at .*a\.png \(it begins with b'some text'\): see"
    ):
        find_images([tmp_path / "a.png"])
