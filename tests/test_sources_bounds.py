"""What is refused before memory is taken for it, and what is kept so that it is not decoded again."""

from __future__ import annotations

import os
import struct
import warnings
from pathlib import Path
from typing import Any

import google_crc32c
import numcodecs
import numpy as np
import pytest
import tifffile
import torch
import zarr
from source_contract import assert_reads, pixels, region
from tifffile.zarr import ZarrTiffStore
from typer.testing import CliRunner
from zarr.codecs import BloscCodec, GzipCodec, ZstdCodec
from zarr.codecs import numcodecs as numcodecs_of_zarr

from streamcnn import StreamingModel
from streamcnn.cli.command_line import app
from streamcnn.data.sources import TiffSource, ZarrSource, open_image
from streamcnn.errors import CorruptImage, DatasetMismatch

BOMB = np.zeros(5_000_000, "u1")
CODECS = [
    numcodecs.GZip(),
    numcodecs.LZMA(),
    numcodecs.LZ4(),
    numcodecs.Blosc(),
    numcodecs.Zstd(),
    numcodecs.BZ2(),
    numcodecs.Zlib(),
]


@pytest.mark.parametrize("codec", CODECS, ids=lambda codec: codec.codec_id)
def test_a_chunk_that_inflates_to_more_than_its_place_is_not_inflated(tmp_path: Path, codec: Any) -> None:
    path = tmp_path / "a.zarr"
    array = zarr.create_array(
        path, shape=(64, 64), chunks=(64, 64), dtype="u1", zarr_format=2, compressors=codec
    )
    array[:] = image = pixels(1, size=(64, 64))[0]
    assert_reads(ZarrSource(path), image[None], region(0, 9, 3, 64))
    (path / "0.0").write_bytes(codec.encode(BOMB))
    with pytest.raises(CorruptImage, match=r"a\.zarr: a chunk inflates to .*, its array has place for 4096"):
        ZarrSource(path).read(region(0, 9, 3, 64))


@pytest.mark.parametrize("name", ["gzip", "lzma", "lz4", "blosc", "zstd", "bz2"])
@pytest.mark.parametrize("is_sharded", [False, True])
def test_a_chunk_of_version_3_is_not_inflated_either(tmp_path: Path, name: str, is_sharded: bool) -> None:
    """Where zarr has no codec of its own, that of numcodecs."""
    own: dict[str, Any] = {"gzip": GzipCodec(), "blosc": BloscCodec(), "zstd": ZstdCodec()}
    others: dict[str, Any] = {"lzma": numcodecs_of_zarr.LZMA, "lz4": numcodecs_of_zarr.LZ4}
    others["bz2"] = numcodecs_of_zarr.BZ2
    path = tmp_path / "a.zarr"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of zarr: numcodecs' are no part of the format
        array = zarr.create_array(
            path,
            shape=(64, 64),
            chunks=(32, 64) if is_sharded else (64, 64),
            shards=(64, 64) if is_sharded else None,
            dtype="u1",
            compressors=own[name] if name in own else others[name](),
        )
        array[:] = image = pixels(1, size=(64, 64))[0]
        assert_reads(ZarrSource(path), image[None], region(0, 9, 3, 64))
        place = path / "c/0/0"
        bomb = numcodecs.get_codec({"id": name}).encode(BOMB)
        place.write_bytes(in_shard(bomb) if is_sharded else bomb)
        limit = 32 * 64 if is_sharded else 64 * 64
        with pytest.raises(
            CorruptImage, match=rf"a\.zarr: a chunk inflates to .*, its array has place for {limit}"
        ):
            ZarrSource(path).read(region(0, 9, 3, 64))


def in_shard(chunk: bytes) -> bytes:
    """A shard of two chunks with the one in the first's place, and the other missing."""
    index = struct.pack("<4Q", 0, len(chunk), 2**64 - 1, 2**64 - 1)
    return chunk + index + google_crc32c.value(index).to_bytes(4, "little")


@pytest.mark.parametrize("codec", CODECS, ids=lambda codec: codec.codec_id)
def test_a_chunk_behind_a_filter_is_not_inflated(tmp_path: Path, codec: Any) -> None:
    path = tmp_path / "a.zarr"
    array = zarr.create_array(
        path,
        shape=(64, 64),
        chunks=(64, 64),
        dtype="u1",
        zarr_format=2,
        filters=[numcodecs.Delta("u1")],
        compressors=codec,
    )
    array[:] = pixels(1, size=(64, 64))[0]
    (path / "0.0").write_bytes(codec.encode(BOMB))
    with pytest.raises(
        CorruptImage, match=r"a\.zarr: a chunk inflates to .*, its array has place for 131072"
    ):
        ZarrSource(path).read(region(0, 9, 3, 64))


def test_a_chunk_larger_than_is_allowed_is_refused_when_the_image_is_opened(tmp_path: Path) -> None:
    array = zarr.create_array(tmp_path / "a", shape=(64, 64), chunks=(40_000, 50_000), dtype="u1")
    with pytest.raises(DatasetMismatch, match="has chunks of 40000 x 50000 = 2000000000 pixels"):
        open_image(tmp_path / "a")
    assert array.shape == (64, 64)


def test_a_pipe_or_a_device_is_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "a.png")
    for path, what in ((tmp_path / "a.png", "named pipe"), (Path("/dev/zero"), "device")):
        with pytest.raises(CorruptImage, match=f"{path} is a {what}: allowed are files and folders"):
            open_image(path)


def test_a_large_chunk_is_decoded_once_and_released(tmp_path: Path) -> None:
    image = pixels(3, size=(1200, 1300))
    array = zarr.create_array(tmp_path / "a", shape=image.shape, chunks=image.shape, dtype="u1")
    array[:] = image
    source = ZarrSource(tmp_path / "a")
    assert_reads(source, image, region(5, 40, 10, 60))
    assert source.held_bytes == source.most_held_bytes == image.nbytes
    next((tmp_path / "a/c").rglob("0/0")).joinpath("0").unlink()
    assert_reads(source, image, region(100, 140, 10, 60))
    source.release()
    assert source.held_bytes == 0
    with pytest.warns(
        UserWarning, match="4680000 bytes, of which 1000 are kept at most: .*streamcnn convert"
    ):
        ZarrSource(array, missing_chunks="fill", cache_bytes=1000)


def test_small_chunks_are_not_kept(tmp_path: Path) -> None:
    image = pixels(3, size=(200, 300))
    array = zarr.create_array(tmp_path / "a", shape=image.shape, chunks=image.shape, dtype="u1")
    array[:] = image
    source = ZarrSource(tmp_path / "a")
    assert_reads(source, image, region(5, 40, 10, 60))
    assert source.held_bytes == source.most_held_bytes == source.reading_cost.held == 0


def decoded_pieces(monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """Grows by one for every tile or strip that is decoded from now on."""
    decoded: list[object] = []
    really = ZarrTiffStore.get

    async def get(store: ZarrTiffStore, key: str, *args: Any, **options: Any) -> Any:
        decoded.append(key)
        return await really(store, key, *args, **options)

    monkeypatch.setattr(ZarrTiffStore, "get", get)
    return decoded


LARGE_PIECES = {
    "strips": {"rowsperstrip": 1100},
    "tiles": {"tile": (1408, 1408)},
}
"""In a TIFF of 2200 x 2300 pixels, pieces of 4 MiB and more."""


@pytest.mark.parametrize("kind", ["strips", "tiles"])
def test_large_tiles_and_strips_are_decoded_once_and_released(
    tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    image = pixels(3, size=(2200, 2300))
    stored = np.moveaxis(image, 0, -1)
    options: Any = {"photometric": "rgb", "compression": "zlib", **LARGE_PIECES[kind]}
    tifffile.imwrite(tmp_path / "a.tif", stored, **options)
    source = TiffSource(tmp_path / "a.tif")
    decoded = decoded_pieces(monkeypatch)
    for top in range(0, 2200, 512):
        for left in range(0, 2300, 512):
            assert_reads(source, image, region(top, min(top + 512, 2200), left, min(left + 512, 2300)))
    num_pieces, height, width = (2, 1100, 2300) if kind == "strips" else (4, 1408, 1408)
    assert len(decoded) == num_pieces
    assert source.held_bytes >= image.nbytes
    assert source.reading_cost.held == num_pieces * 3 * height * width
    assert source.held_bytes <= source.reading_bytes((512, 512)).held
    source.release()
    assert source.held_bytes == 0
    assert_reads(source, image, region(1000, 1200, 10, 60))
    assert len(decoded) == num_pieces + (2 if kind == "strips" else 1)
    with pytest.warns(
        UserWarning,
        match=rf"a\.tif has {kind} of {3 * height * width} bytes, of which 1000 are kept at most: each is "
        "decoded again for every tile that meets it; write the image in smaller ones with streamcnn convert",
    ):
        assert TiffSource(tmp_path / "a.tif", cache_bytes=1000).reading_cost.held == 0


def test_strips_that_are_kept_are_in_the_plan_and_in_the_measured_peak(tmp_path: Path) -> None:
    stored = np.random.default_rng(0).integers(0, 256, (2200, 2300, 3), np.uint8)
    tifffile.imwrite(tmp_path / "a.tif", stored, photometric="rgb", compression="zlib", rowsperstrip=1100)
    net = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3, stride=2), torch.nn.AdaptiveAvgPool2d(1))
    source = open_image(tmp_path / "a.tif")
    model = StreamingModel(net, "300MiB", preprocess=lambda tile: tile / 255)
    plan = model.plan(source)
    assert {term.name: term.nbytes for term in plan.terms}["decoded image"] == stored.nbytes
    model(source).sum().backward()
    assert source.held_bytes == 0
    assert stored.nbytes < model.last_report.measured_bytes <= plan.projected_bytes  # type: ignore[union-attr,operator]


def test_small_tiles_are_not_kept(tmp_path: Path) -> None:
    image = pixels(3, size=(200, 300))
    options: Any = {"photometric": "rgb", "compression": "zlib", "tile": (128, 128)}
    tifffile.imwrite(tmp_path / "a.tif", np.moveaxis(image, 0, -1), **options)
    source = TiffSource(tmp_path / "a.tif")
    assert_reads(source, image, region(5, 40, 10, 60))
    assert source.held_bytes == source.reading_cost.held == 0


def test_convert_is_told_where_the_channels_are(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", np.ones((145, 145, 200), "u1"))
    arguments = ["convert", str(tmp_path / "a.npy"), str(tmp_path / "out")]
    result = CliRunner().invoke(app, [*arguments, "--channels-last"])
    assert result.exit_code == 0
    assert "200 x 145 x 145 uint8" in result.output
