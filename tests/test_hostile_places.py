"""Pipes, sockets, devices, folders and files elsewhere where an image or a table should be."""

from __future__ import annotations

import gzip
import json
import os
import socket
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hostile import SIZE
from PIL import Image
from source_contract import pixels, region

from streamcnn.data.file_dataset import open_dataset, open_table
from streamcnn.data.fingerprints import fingerprint
from streamcnn.data.image_files import find_images
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
from streamcnn.data.sources.tiff_series import tiff_series
from streamcnn.data.ultramnist import load_digits
from streamcnn.errors import CorruptImage, DatasetMismatch, StreamError

# --- TIFF ------------------------------------------------------------------------------------------------


READERS = [open_image, TiffSource, PictureSource, ArraySource, SlideSource, tiff_series]


# --- what is no file -------------------------------------------------------------------------------------


def make_pipe(path: Path) -> None:
    os.mkfifo(path)


def make_socket(path: Path) -> None:
    place = os.open(path.parent, os.O_RDONLY)
    try:  # a socket's path may have 108 characters at most
        with socket.socket(socket.AF_UNIX) as made:
            made.bind(f"/proc/self/fd/{place}/{path.name}")
    finally:
        os.close(place)


def make_device(path: Path) -> None:
    path.symlink_to("/dev/zero")


NO_FILES: list[tuple[Callable[[Path], None], str]] = [
    (make_pipe, "named pipe"),
    (make_socket, "socket"),
    (make_device, "device"),
]


@pytest.mark.parametrize(("make", "what"), NO_FILES)
@pytest.mark.parametrize(
    "read", [open_image, is_image, TiffSource, PictureSource, ArraySource, SlideSource, tiff_series]
)
def test_what_is_no_file_is_refused_by_every_reader_of_images(
    tmp_path: Path, make: Callable[[Path], None], what: str, read: Callable[[Path], object]
) -> None:
    make(tmp_path / "a.tif")
    with pytest.raises(CorruptImage, match=rf"a\.tif is a {what}: allowed are files and folders"):
        read(tmp_path / "a.tif")


@pytest.mark.parametrize("read", READERS)
def test_a_folder_that_is_called_like_an_image_is_refused(
    tmp_path: Path, read: Callable[[Path], object]
) -> None:
    (tmp_path / "x.tif").mkdir()
    with pytest.raises(CorruptImage, match=r"x\.tif"):
        read(tmp_path / "x.tif")


@pytest.mark.parametrize(("make", "what"), NO_FILES)
def test_what_is_no_file_is_no_table(tmp_path: Path, make: Callable[[Path], None], what: str) -> None:
    make(tmp_path / "labels.csv")
    for read in (open_dataset, lambda path: list(open_table(path))):
        with pytest.raises(DatasetMismatch, match=r"labels\.csv is no regular file"):
            read(tmp_path / "labels.csv")


@pytest.mark.parametrize(("make", "what"), NO_FILES)
@pytest.mark.parametrize("name", ["zarr.json", "c/0/0/0"])
def test_what_is_no_file_is_no_part_of_a_zarr_array(
    tmp_path: Path, make: Callable[[Path], None], what: str, name: str
) -> None:
    write_zarr_image(tmp_path / "a", torch.from_numpy(pixels(size=SIZE)))
    (tmp_path / "a" / name).unlink()
    make(tmp_path / "a" / name)
    with pytest.raises(CorruptImage, match=f"is a {what}|is no regular file"):
        ZarrSource(tmp_path / "a", missing_chunks="fill").read(region(0, 9, 0, 9))


@pytest.mark.parametrize(("make", "what"), NO_FILES)
def test_what_is_no_file_stops_no_search_for_images(
    tmp_path: Path, make: Callable[[Path], None], what: str
) -> None:
    """Each is read by another function before it is opened as an image."""
    for name in ("slide.vms", "raw/zarr.json", "raw/.zattrs", "named/OME/METADATA.ome.xml"):
        folder = tmp_path / name.replace("/", "_")
        path = folder / name
        path.parent.mkdir(parents=True)
        if name.startswith("named"):
            attributes = {"bioformats2raw.layout": 3}
            (folder / "named" / ".zattrs").write_text(json.dumps(attributes))
            (folder / "named" / "0").mkdir()
            (folder / "named" / "1").mkdir()
        make(path)
        with pytest.raises(StreamError):
            find_images([folder])


@pytest.mark.parametrize(("make", "what"), NO_FILES)
def test_what_is_no_file_has_no_fingerprint(tmp_path: Path, make: Callable[[Path], None], what: str) -> None:
    (tmp_path / "a").mkdir()
    make(tmp_path / "a" / "zarr.json")
    for path in (tmp_path / "a", tmp_path / "a" / "zarr.json"):
        with pytest.raises(CorruptImage, match=r"zarr\.json is no regular file"):
            fingerprint([path])


def test_digits_that_inflate_without_end_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("streamcnn.data.ultramnist.idx.MOST_BYTES", 10_000)
    for name in ("train-images-idx3-ubyte.gz", "train-labels-idx1-ubyte.gz"):
        (tmp_path / name).write_bytes(gzip.compress(bytes(10_001)))
    with pytest.raises(CorruptImage, match=r"gz holds more than 10000 bytes"):
        load_digits(tmp_path)


@pytest.mark.parametrize("name", ["../b.jpg", "", "a\0b", "/etc/passwd", "x" * 300])
def test_a_slide_s_list_of_files_names_none_elsewhere(tmp_path: Path, name: str) -> None:
    (tmp_path / "folder").mkdir()
    Image.fromarray(np.zeros((9, 9, 3), np.uint8)).save(tmp_path / "b.jpg")
    path = tmp_path / "folder" / "a.vms"
    path.write_text(f"[Virtual Microscope Specimen]\nImageFile={name}\nMapFile=map.jpg\n")
    (found,) = find_images([path])
    assert (found.path, found.others) == (path, ())
