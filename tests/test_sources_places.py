"""Where images may lie: home, file URLs, zip files, other machines, and folders of series."""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path

import fsspec
import pytest
import zarr
from source_contract import assert_reads, pixels, region, write_ome

from streamcnn.data.sources import is_image, open_image
from streamcnn.errors import CorruptImage, DatasetMismatch
from streamcnn.support.extras import MissingExtra

IMAGE = pixels(3, size=(50, 60))


@pytest.fixture
def path(tmp_path: Path) -> Path:
    array = zarr.create_array(tmp_path / "a.zarr", shape=IMAGE.shape, dtype="u1", chunks=(3, 16, 16))
    array[:] = IMAGE
    return tmp_path / "a.zarr"


def test_home_and_file_urls(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(path.parent))
    for where in ("~/a.zarr", f"file://{path}", f"file://localhost{path}", Path(f"file://{path}")):
        assert_reads(open_image(where), IMAGE, region(5, 40, 10, 60))
    with pytest.raises(CorruptImage, match="file://host/x lies on another machine"):
        open_image("file://host/x")


@pytest.mark.parametrize("inside", [".", "a.zarr"])
def test_zip_files(path: Path, inside: str) -> None:
    root = path.parent if inside == "a.zarr" else path
    packed = shutil.make_archive(str(path.parent.parent / f"{path.parent.name}-z"), "zip", root, inside)
    assert is_image(packed)
    assert_reads(open_image(packed), IMAGE, region(5, 40, 10, 60))


def test_a_zip_file_of_something_else_is_no_image(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in/a.txt").write_text("hello")
    packed = shutil.make_archive(str(tmp_path / "a"), "zip", tmp_path / "in")
    assert not is_image(packed)
    with pytest.raises(CorruptImage, match=r"a\.zip is no image that is known"):
        open_image(packed)


def test_urls_by_fsspec(path: Path) -> None:
    files = fsspec.filesystem("memory")
    for file in (file for file in path.rglob("*") if file.is_file()):
        files.pipe(f"/places/{file.relative_to(path)}", file.read_bytes())
    files.pipe("/places/x.png", b"\x89PNG\r\n\x1a\n" + bytes(50))
    assert_reads(open_image("memory://places"), IMAGE, region(5, 40, 10, 60))
    with pytest.raises(CorruptImage, match=r"memory://places/x\.png is a picture: allowed elsewhere"):
        open_image("memory://places/x.png")
    with pytest.raises(CorruptImage, match="no image at memory://nothing: give the URL"):
        open_image("memory://nothing")
    with pytest.raises(CorruptImage, match="foo://x cannot be read: Protocol not known: foo; allowed are"):
        open_image("foo://x")


@pytest.mark.parametrize(("url", "package"), [("s3://b/x.zarr", "s3fs"), ("gs://b/x.zarr", "gcsfs")])
def test_names_the_extra_that_a_url_needs(url: str, package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, package, None)
    with pytest.raises(MissingExtra, match=re.escape(f"{url} cannot be read") + r".*streamcnn\[remote\]"):
        open_image(url)


def test_series_of_bioformats2raw(tmp_path: Path) -> None:
    path = tmp_path / "b2r"
    zarr.create_group(path, zarr_format=2, attributes={"bioformats2raw.layout": 3})
    (path / "OME").mkdir()
    names = "".join(f'<Image Name="{name}"/>' for name in ("label image", "scan", "macro image"))
    (path / "OME/METADATA.ome.xml").write_text(f'<OME xmlns="u">{names}</OME>')
    for number, size in enumerate([(20, 30), (50, 60), (10, 12)]):
        (tmp_path / str(number)).mkdir()
        made = write_ome(tmp_path / str(number), "0.4", "cyx", [pixels(3, size=size)])
        os.rename(made, path / str(number))
    assert is_image(path)
    assert_reads(open_image(path), IMAGE, region(5, 40, 10, 60))
    assert open_image(path, series=2).shape == (3, 10, 12)
    message = "has no series 9: allowed are 0 (label image), 1 (scan), 2 (macro image)"
    with pytest.raises(DatasetMismatch, match=re.escape(message)):
        open_image(path, series=9)
