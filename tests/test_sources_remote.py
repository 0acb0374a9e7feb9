"""Images on other machines: what is read of them, what a server may do, and that no password is shown."""

from __future__ import annotations

import pickle
import re
import sys
import traceback
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest
import tifffile
import zarr
from http_places import FileServer, serving
from source_contract import assert_reads, cut, pixels, random_regions, region

from streamcnn.data.sources import TiffSource, open_image
from streamcnn.data.sources.remote import REMOTE_BYTES, RemoteFile, trouble
from streamcnn.data.sources.tiff_series import tiff_series
from streamcnn.errors import CorruptImage, DatasetMismatch
from streamcnn.support.extras import MissingExtra
from streamcnn.support.text import without_secrets

IMAGE = pixels(3, size=(700, 800))
OPTIONS: dict[str, Any] = {"photometric": "rgb", "compression": "zlib", "tile": (128, 128)}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    with tifffile.TiffWriter(tmp_path / "a.tif") as file:
        file.write(np.moveaxis(IMAGE, 0, -1), subifds=1, **OPTIONS)
        file.write(np.moveaxis(IMAGE[:, ::2, ::2], 0, -1), subfiletype=1, **OPTIONS)
    (tmp_path / "a.png").write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(100))
    array = zarr.create_array(
        tmp_path / "a.zarr", shape=IMAGE.shape, chunks=(3, 64, 64), shards=(3, 256, 256), dtype="u1"
    )
    array[:] = IMAGE
    return tmp_path


@pytest.fixture
def server(folder: Path) -> Iterator[FileServer]:
    pytest.importorskip("aiohttp")
    with serving(folder) as server:
        yield server


@pytest.mark.parametrize("name", ["a.tif", "a.zarr", "a.tif?token=1"])
def test_images_are_read_from_a_server_part_by_part(server: FileServer, folder: Path, name: str) -> None:
    source = open_image(f"{server.url}/{name}")
    assert_reads(source, IMAGE, region(100, 101, 200, 300))
    # Of a zarr array, fsspec asks for files to see whether they are there.
    assert name == "a.zarr" or server.sent < (folder / "a.tif").stat().st_size // 2
    regions = random_regions(16, IMAGE.shape[1:])
    with ThreadPoolExecutor(4) as pool:
        for asked, got in zip(regions, pool.map(source.read, regions), strict=True):
            np.testing.assert_array_equal(got.numpy(), cut(IMAGE, asked))
    copy = pickle.loads(pickle.dumps(source))
    assert_reads(copy, IMAGE, region(5, 40, 10, 60))


def test_levels_and_series_of_a_tiff_on_a_server(server: FileServer) -> None:
    url = f"{server.url}/a.tif"
    assert_reads(open_image(url, level=1), IMAGE[:, ::2, ::2], region(5, 340, 10, 60))
    assert [each.levels for each in tiff_series(url)] == [((700, 800), (350, 400))]
    with pytest.raises(DatasetMismatch, match=rf"{url} has no level 2: allowed are 0\.\.1"):
        open_image(url, level=2)
    cost = open_image(url).reading_cost
    assert cost.fixed == REMOTE_BYTES


WITHOUT_ANSWER = {
    "404/a.tif": "no image at {shown}: give the URL of a TIFF file, or of the folder that holds a zarr.json",
    "gone.zarr": "no image at {shown}: give the URL of a TIFF file, or of the folder that holds a zarr.json",
    "403/a.tif": "cannot read {shown}: it may not be read there (HTTP 403): give credentials that allow it, "
    "in the environment for s3:// and gs://, in the URL for https://",
    "401/a.zarr": "cannot read {shown}: it may not be read there (HTTP 401): give credentials that allow it, "
    "in the environment for s3:// and gs://, in the URL for https://",
    "503/a.tif": "cannot read {shown}: the server answers HTTP 503: try again later",
    "418/a.zarr": "cannot read {shown}: the server answers HTTP 418: see that the URL is right",
    "a.png": "{shown} is a picture: allowed elsewhere than on this machine are TIFF files and folders of a "
    "zarr array or an OME-Zarr image; download it, or write it as one",
}


@pytest.mark.parametrize("name", WITHOUT_ANSWER)
def test_what_a_server_refuses_is_named_without_the_password(server: FileServer, name: str) -> None:
    url = f"http://me:pass-word@127.0.0.1:{server.server_port}/{name}"
    shown = f"http://...@127.0.0.1:{server.server_port}/{name}"
    with pytest.raises(CorruptImage) as refused:
        open_image(url)
    assert str(refused.value) == WITHOUT_ANSWER[name].format(shown=shown)
    assert "pass-word" not in "".join(traceback.format_exception(refused.value))


@pytest.mark.parametrize("ending", ["tif", "zarr"])
@pytest.mark.parametrize("host", ["127.0.0.1:9", "no.such.host.invalid"])
def test_a_server_that_is_not_there_is_named(ending: str, host: str) -> None:
    pytest.importorskip("aiohttp")
    url = f"http://me:pass-word@{host}/a.{ending}?token=hush"
    with pytest.raises(CorruptImage) as refused:
        open_image(url)
    text = str(refused.value)
    assert text.startswith(f"cannot read http://...@{host}/a.{ending}?...: its server cannot be reached (")
    assert text.endswith("): see that the URL is right and the network is there")
    assert not re.search("pass-word|hush", "".join(traceback.format_exception(refused.value)))


def test_a_server_that_sends_only_whole_files_is_refused(server: FileServer) -> None:
    server.ranges = False
    whole = "sends files only as a whole (it answers no range requests): download the image, or put it on"
    with pytest.raises(CorruptImage, match=re.escape(f"the server of {server.url}/a.tif {whole}")):
        open_image(f"{server.url}/a.tif")
    with pytest.raises(CorruptImage, match=r"sends all of c/0/0/0 where a part is asked for .*: download"):
        open_image(f"{server.url}/a.zarr").read(region(0, 9, 0, 9))


@pytest.mark.parametrize("name", ["a.tif", "a.zarr"])
def test_a_server_that_fails_while_an_image_is_read_is_named(server: FileServer, name: str) -> None:
    source = open_image(f"http://me:pass-word@127.0.0.1:{server.server_port}/{name}")
    assert source.name == f"http://...@127.0.0.1:{server.server_port}/{name}"
    for status, why in ((403, "it may not be read there (HTTP 403)"), (500, "the server answers HTTP 500")):
        server.status = status
        message = f"cannot read rows 400..500, cols 600..700 of {source.name}: {why}"
        with pytest.raises(CorruptImage, match=re.escape(message)) as refused:
            source.read(region(400, 500, 600, 700))
        assert "pass-word" not in "".join(traceback.format_exception(refused.value))


def test_images_in_s3(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("s3fs")
    for name, value in (("AWS_ACCESS_KEY_ID", "a"), ("AWS_SECRET_ACCESS_KEY", "b")):
        monkeypatch.setenv(name, value)
    (folder / "bucket").mkdir()
    (folder / "a.tif").rename(folder / "bucket/a.tif")
    with serving(folder) as server:
        monkeypatch.setitem(fsspec.config.conf, "s3", {"endpoint_url": server.url})
        assert_reads(open_image("s3://bucket/a.tif"), IMAGE, region(100, 300, 200, 300))
        with pytest.raises(CorruptImage, match=r"no image at s3://bucket/b\.tif: give the URL"):
            open_image("s3://bucket/b.tif")
        server.status = 403
        for name in ("c.tif", "c.zarr"):
            with pytest.raises(CorruptImage, match=rf"{name}: it may not be read there \(HTTP 403\)"):
                open_image(f"s3://bucket/{name}")


def test_a_tiff_by_fsspec_that_needs_no_network(folder: Path) -> None:
    files = fsspec.filesystem("memory")
    files.pipe("/tiffs/a.tif", (folder / "a.tif").read_bytes())
    files.pipe("/tiffs/b", (folder / "a.tif").read_bytes())
    assert_reads(open_image("memory://tiffs/a.tif"), IMAGE, region(5, 40, 10, 60))
    assert_reads(TiffSource("memory://tiffs/b"), IMAGE, region(5, 40, 10, 60))
    with pytest.raises(CorruptImage, match="no TIFF at memory://tiffs: give the path of one"):
        TiffSource("memory://tiffs")
    files.pipe("/tiffs/cut.tif", (folder / "a.tif").read_bytes()[:500_000])
    with pytest.raises(CorruptImage, match=r"cut\.tif has 500000 bytes, its tile of rows .* copy it again"):
        open_image("memory://tiffs/cut.tif")


def test_a_file_that_grows_shorter_while_it_is_read_is_refused(folder: Path) -> None:
    files = fsspec.filesystem("memory")
    files.pipe("/short/a.bin", bytes(200_000))
    file = RemoteFile("memory://short/a.bin")
    assert file.seek(-5, 2) == 199_995
    assert file.read() == bytes(5)
    files.store["/short/a.bin"].truncate(70_000)
    file.seek(0)
    with pytest.raises(
        CorruptImage, match=r"the server of memory://short/a\.bin sent 70000 of 200000 bytes from byte 0 on"
    ):
        file.read()


def test_an_ome_tiff_of_several_files_elsewhere_is_refused(tmp_path: Path) -> None:
    files = fsspec.filesystem("memory")
    xml = (
        '<OME xmlns="http://www.openmicroscopy.org/Schemas/OME/2016-06" UUID="urn:uuid:1">'
        '<Image ID="Image:0"><Pixels ID="Pixels:0" DimensionOrder="XYCZT" Type="uint8" SizeX="32" SizeY="32" '
        'SizeC="2" SizeZ="1" SizeT="1"><Channel ID="Channel:0:0"/><Channel ID="Channel:0:1"/>'
        '<TiffData FirstC="0" IFD="0"><UUID FileName="a.ome.tif">urn:uuid:1</UUID></TiffData>'
        '<TiffData FirstC="1" IFD="0"><UUID FileName="b.ome.tif">urn:uuid:2</UUID></TiffData>'
        "</Pixels></Image></OME>"
    )
    tifffile.imwrite(tmp_path / "a.ome.tif", pixels(1, size=(32, 32))[0], description=xml, metadata=None)
    files.pipe("/several/a.ome.tif", (tmp_path / "a.ome.tif").read_bytes())
    message = (
        "memory://several/a.ome.tif lies in several files: allowed elsewhere than on this machine are images "
        "in one file; download them, or write the image as one"
    )
    with pytest.raises(DatasetMismatch, match=re.escape(message)):
        open_image("memory://several/a.ome.tif")


def test_names_the_extra_that_https_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "aiohttp", None)
    for module in ("fsspec.implementations.http", "fsspec.implementations.http_sync"):
        monkeypatch.delitem(sys.modules, module, raising=False)
    monkeypatch.delitem(sys.modules["fsspec.registry"]._registry, "https", raising=False)  # type: ignore[attr-defined]
    for name in ("a.tif", "a.zarr"):
        with pytest.raises(MissingExtra) as refused:
            open_image(f"https://me:pass-word@host/{name}?token=hush")
        text = str(refused.value)
        assert text.startswith(
            f"https://...@host/{name}?... cannot be read because a package is not installed"
        )
        assert text.endswith("pip install 'streamcnn[remote]'")


def client_error(module: str, name: str, **noted: Any) -> Exception:
    """An error as a client of S3 or of Google's raises it."""
    error: Exception = type(name, (Exception,), {"__module__": module})("at https://k:pass-word@h/x?sig=hush")
    error.__dict__.update(noted)
    return error


def caused(error: Exception, cause: Exception) -> Exception:
    error.__cause__ = cause
    return error


def answer(status: int) -> dict[str, Any]:
    return {"response": {"ResponseMetadata": {"HTTPStatusCode": status}}}


@pytest.mark.parametrize(
    ("error", "why"),
    [
        (
            client_error("botocore.exceptions", "NoCredentialsError"),
            "it may not be read there: give credentials",
        ),
        (
            caused(
                PermissionError("Forbidden"),
                client_error("botocore.exceptions", "ClientError", **answer(403)),
            ),
            "it may not be read there (HTTP 403): give credentials",
        ),
        (client_error("gcsfs.retry", "HttpError", code=429), "the server answers HTTP 429: try again later"),
        (
            caused(OSError("x"), client_error("botocore.exceptions", "ClientError", **answer(500))),
            "the server answers HTTP 500: try again later",
        ),
        (
            client_error("botocore.exceptions", "EndpointConnectionError"),
            "its server cannot be reached (at https://...@h/x?...)",
        ),
        (caused(FileNotFoundError(), client_error("aiohttp", "X", status=404)), None),
        (PermissionError("of a file on this machine"), None),
        (ValueError("damaged"), None),
    ],
)
def test_errors_of_clients_are_told_apart(error: Exception, why: str | None) -> None:
    found = trouble(error)
    assert (found or "").startswith(why or "")
    assert (found is None) == (why is None)
    assert not re.search("pass-word|hush", found or "")


def test_no_secrets_are_shown() -> None:
    assert without_secrets("a b: https://u:p@h:8/x?sig=1&t=2, c@d?") == "a b: https://...@h:8/x?... c@d?"
    assert without_secrets("s3://key:secret@bucket/a?b") == "s3://...@bucket/a?b"
    assert without_secrets("u@h is no URL, nor is a?b") == "u@h is no URL, nor is a?b"
