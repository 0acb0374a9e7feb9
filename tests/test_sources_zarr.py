"""Zarr arrays and OME-Zarr images as sources: what is read, what is missing, what is damaged."""

from __future__ import annotations

import json
import multiprocessing
import os
import pickle
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st
from source_contract import (
    ZARR_MAKERS,
    SourceContract,
    assert_reads,
    cut,
    forbidden,
    pixels,
    region,
    write_ome,
)
from zarr.abc.store import ByteRequest, Store
from zarr.codecs import BytesCodec, GzipCodec, ShardingCodec
from zarr.core.buffer import Buffer, BufferPrototype
from zarr.storage import LocalStore, MemoryStore, WrapperStore

from streamcnn.data.sources import ZarrSource
from streamcnn.errors import CorruptImage, DatasetMismatch
from streamcnn.geometry.regions import Region


class TestZarr(SourceContract):
    makers = ZARR_MAKERS


class CountingStore(WrapperStore[Store]):
    """Adds up the bytes of chunks that are read, and notes of which keys."""

    def __init__(self, store: Store, counted: dict[str, int]) -> None:
        super().__init__(store)
        self.counted = counted

    def _with_store(self, store: Store) -> CountingStore:
        return CountingStore(store, self.counted)

    async def get(
        self, key: str, prototype: BufferPrototype, byte_range: ByteRequest | None = None
    ) -> Buffer | None:
        found = await self._store.get(key, prototype, byte_range)
        if found is not None and not key.endswith("zarr.json"):
            self.counted[key] = self.counted.get(key, 0) + len(found)
        return found


@pytest.mark.parametrize("missing_chunks", ["fill", "error"])
def test_a_window_reads_the_shards_index_and_the_chunks_under_it(tmp_path: Path, missing_chunks: Any) -> None:
    array = zarr.create_array(
        tmp_path / "a.zarr",
        shape=(1, 8192, 8192),
        chunks=(1, 512, 512),
        shards=(1, 4096, 4096),
        dtype="u1",
        compressors=None,
    )
    shard = pixels(1, size=(4096, 4096))
    array[:, :4096, 4096:] = shard
    counted: dict[str, int] = {}
    store = CountingStore(LocalStore(tmp_path / "a.zarr", read_only=True), counted)
    source = ZarrSource(zarr.open_array(store, mode="r"), missing_chunks=missing_chunks)
    window = region(1024 - 64, 1536 + 64, 4096 + 2048 - 64, 4096 + 2560 + 64)
    np.testing.assert_array_equal(source.read(window).numpy(), cut(shard, region(960, 1600, 1984, 2624)))
    num_chunks = 3 * 3  # the window's own chunk and those around it that the halo touches
    index_bytes = 8 * 8 * 16 + 4  # an offset and a length for each chunk of the shard, and a checksum
    assert counted == {"c/0/0/1": num_chunks * 512 * 512 + index_bytes}


@given(data=st.data())
@settings(max_examples=15)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"zarr_format": 2},
        {"shards": (12, 12)},
        {
            "filters": None,
            "compressors": None,
            "chunks": (12, 12),
            "serializer": ShardingCodec(
                chunk_shape=(4, 4), index_location="start", index_codecs=[BytesCodec(endian="big")]
            ),
        },
    ],
    ids=["chunks", "v2", "shards", "index first"],
)
def test_a_chunk_that_is_missing_is_an_error_where_it_must_be_there(
    tmp_path_factory: pytest.TempPathFactory, options: dict[str, Any], data: st.DataObject
) -> None:
    places = st.tuples(st.integers(0, 5), st.integers(0, 5))
    path = tmp_path_factory.mktemp("holed") / "a.zarr"
    image = np.zeros((24, 24), "u1")
    array = zarr.create_array(
        path, **{"shape": image.shape, "chunks": (4, 4), "dtype": "u1", "fill_value": 0, **options}
    )
    written = data.draw(st.sets(places, min_size=20))
    for row, col in written:
        image[4 * row : 4 * row + 4, 4 * col : 4 * col + 4] = 1
    array[:] = image
    top, left = data.draw(st.integers(0, 23)), data.draw(st.integers(0, 23))
    bottom, right = data.draw(st.integers(top + 1, 24)), data.draw(st.integers(left + 1, 24))
    asked = region(top, bottom, left, right)
    assert_reads(ZarrSource(path), image[None], asked)
    touched = {(row // 4, col // 4) for row in range(top, bottom) for col in range(left, right)}
    source = ZarrSource(path, missing_chunks="error")
    if touched <= written:
        assert_reads(source, image[None], asked)
    else:
        with pytest.raises(
            CorruptImage, match=rf"rows {top}\.\.{bottom}, .* of .*a\.zarr: chunk .* is missing"
        ):
            source.read(asked)


@pytest.mark.parametrize(
    ("shards", "lost", "named"),
    [
        (None, "c/1/2", r"chunk c/1/2 is missing: it was lost or never written"),
        ((12, 12), "c/0/1", r"chunk c/0/1 is missing"),
    ],
)
def test_names_a_chunk_that_was_lost(
    tmp_path: Path, shards: tuple[int, int] | None, lost: str, named: str
) -> None:
    path = tmp_path / "a.zarr"
    array = zarr.create_array(path, shape=(24, 24), chunks=(4, 4), shards=shards, dtype="u1")
    array[:] = 1
    (path / lost).unlink()
    source = pickle.loads(pickle.dumps(ZarrSource(path, missing_chunks="error")))
    with pytest.raises(CorruptImage, match=named):
        source.read(Region.whole((24, 24)))
    assert ZarrSource(path).read(Region.whole((24, 24))).min() == 0


@pytest.mark.parametrize("path", ["", "in/a/group"])
def test_names_an_inner_chunk_that_its_shard_lacks(tmp_path: Path, path: str) -> None:
    array = zarr.create_array(
        LocalStore(tmp_path), name=path or None, shape=(24, 24), chunks=(4, 4), shards=(12, 12), dtype="u1"
    )
    array[:] = 1
    array[16:20, 4:8] = 0
    source = ZarrSource(array, missing_chunks="error")
    with pytest.raises(CorruptImage, match=r"chunk \(4, 1\) in shard (in/a/group/)?c/1/0 is missing"):
        source.read(region(12, 24, 5, 6))
    source.read(region(12, 24, 8, 24))


def test_refuses_to_look_into_shards_that_it_cannot_read(tmp_path: Path) -> None:
    inner = ShardingCodec(chunk_shape=(4, 4))
    for name, codec in {
        "nested": ShardingCodec(chunk_shape=(8, 8), codecs=[inner]),
        "packed": ShardingCodec(chunk_shape=(4, 4), index_codecs=[BytesCodec(), GzipCodec()]),
    }.items():
        metadata = json.dumps(
            {
                "zarr_format": 3,
                "node_type": "array",
                "shape": [16, 16],
                "data_type": "uint8",
                "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": [16, 16]}},
                "chunk_key_encoding": {"name": "default"},
                "fill_value": 0,
                "codecs": [codec.to_dict()],
                "attributes": {},
            },
            default=str,
        )
        (tmp_path / name).mkdir()
        (tmp_path / name / "zarr.json").write_text(metadata)
        with pytest.raises(DatasetMismatch, match=rf'{name} has shards inside .* missing_chunks="fill"'):
            ZarrSource(tmp_path / name, missing_chunks="error")
    with pytest.raises(ValueError, match=r'missing_chunks=.maybe.: allowed are "some", "fill" and "error"'):
        ZarrSource(tmp_path / name, missing_chunks="maybe")  # type: ignore[arg-type]


@pytest.mark.parametrize("location", ["start", "end"])
@pytest.mark.parametrize("kept", [0.0, 0.3, 0.6, 0.99])
@pytest.mark.parametrize("whole", [True, False])
def test_a_shard_that_was_cut_short_never_reads_as_empty(
    tmp_path: Path, location: Any, kept: float, whole: bool
) -> None:
    path = tmp_path / "a.zarr"
    codec = ShardingCodec(chunk_shape=(4, 4), index_location=location)
    options: dict[str, Any] = {"filters": None, "compressors": None, "serializer": codec}
    array = zarr.create_array(path, shape=(16, 16), chunks=(16, 16), dtype="u1", **options)
    array[:] = 7
    shard = path / "c" / "0" / "0"
    os.truncate(shard, int(kept * shard.stat().st_size))
    asked = region(0, 16, 0, 16) if whole else region(9, 16, 5, 16)
    with pytest.raises(CorruptImage, match=r"rows .*\.\.16, cols .*\.\.16 of .*a\.zarr: "):
        ZarrSource(path).read(asked)


@pytest.mark.parametrize("compressors", [None, "auto"])
@pytest.mark.parametrize("zarr_format", [2, 3])
@pytest.mark.parametrize("kept", [0.0, 0.5])
def test_a_chunk_that_was_cut_short_never_reads_as_empty(
    tmp_path: Path, compressors: Any, zarr_format: Any, kept: float
) -> None:
    path = tmp_path / "a.zarr"
    array = zarr.create_array(
        path, shape=(8, 8), chunks=(8, 8), dtype="u1", zarr_format=zarr_format, compressors=compressors
    )
    array[:] = pixels(1, size=(8, 8))[0]
    (chunk,) = (file for file in path.rglob("*") if file.name in ("0", "0.0") and file.is_file())
    os.truncate(chunk, int(kept * chunk.stat().st_size))
    with pytest.raises(CorruptImage, match=r"rows 0\.\.8, cols 0\.\.8 of .*a\.zarr: "):
        ZarrSource(path).read(Region.whole((8, 8)))


def test_names_an_array_that_is_gone(tmp_path: Path) -> None:
    """Every chunk of it would read as the fill value."""
    for options in ({}, {"zarr_format": 2}):
        path = tmp_path / "a.zarr"
        array = zarr.create_array(path, shape=(8, 8), chunks=(4, 4), dtype="u1", **options)
        array[:] = 1
        source = ZarrSource(path)
        shutil.rmtree(path)
        with pytest.raises(CorruptImage, match=r"a\.zarr: the array is gone since it was opened"):
            source.read(Region.whole((8, 8)))


def test_names_a_chunk_that_may_not_be_read(tmp_path: Path) -> None:
    array = zarr.create_array(tmp_path / "a.zarr", shape=(8, 8), chunks=(4, 4), dtype="u1")
    array[:] = 1
    source = ZarrSource(tmp_path / "a.zarr")
    with (
        forbidden(tmp_path / "a.zarr" / "c" / "1"),
        pytest.raises(CorruptImage, match=r"rows 3\.\.5, .*a\.zarr: .*Permission denied: .*; see that"),
    ):
        source.read(region(3, 5, 0, 2))
    with (
        forbidden(tmp_path / "a.zarr"),
        pytest.raises(CorruptImage, match=r"cannot open .*a\.zarr: .*Permission denied"),
    ):
        ZarrSource(tmp_path / "a.zarr")


def test_arrays_in_memory_are_sources_too() -> None:
    array = zarr.create_array(MemoryStore(), shape=(8, 9), chunks=(4, 4), dtype="u1")
    array[:] = pixels(1, size=(8, 9))[0]
    source = ZarrSource(array)
    assert_reads(source, pixels(1, size=(8, 9)), region(1, 7, 2, 9))
    assert_reads(pickle.loads(pickle.dumps(source)), pixels(1, size=(8, 9)), region(1, 7, 2, 9))


def _read_in_child(source: ZarrSource, image: Any) -> None:
    for _ in range(20):
        assert_reads(source, image, region(3, 60, 5, 90))


def test_a_forked_child_does_not_share_the_position_in_a_zip(tmp_path: Path) -> None:
    source, image = ZARR_MAKERS["zarr in a zip"](tmp_path)
    source.read(region(0, 9, 0, 9))
    fork = multiprocessing.get_context("fork")
    children = [fork.Process(target=_read_in_child, args=(source, image)) for _ in range(2)]
    for child in children:
        child.start()
    _read_in_child(source, image)
    for child in children:
        child.join()
    assert [child.exitcode for child in children] == [0, 0]


def levels_of(version: str, folder: Path) -> Path:
    sizes = [(48, 64), (24, 32), (12, 16)]
    return write_ome(folder, version, "tczyx", [pixels(3, size=size)[None, :, None] for size in sizes])


@pytest.mark.parametrize("version", ["0.4", "0.5"])
def test_any_level_of_an_ome_image_can_be_read(tmp_path: Path, version: str) -> None:
    path = levels_of(version, tmp_path)
    for level, size in enumerate([(48, 64), (24, 32), (12, 16)]):
        source = ZarrSource(path, level=level)
        assert_reads(source, pixels(3, size=size), region(1, 12, 3, 15))
    assert ZarrSource(path).name == str(path)
    assert ZarrSource(path, level=2).name == f"{path} (level 2)"
    assert ZarrSource(path, level=2).chunks == (1, 3, 1, 12, 16)
    for level in (-1, 3):
        with pytest.raises(DatasetMismatch, match=rf"has no level {level}: allowed are 0\.\.2"):
            ZarrSource(path, level=level)


def test_one_array_has_one_level(tmp_path: Path) -> None:
    path = levels_of("0.5", tmp_path) / "s0"
    with pytest.raises(DatasetMismatch, match=r"s0 \(level 1\) is one array: allowed is level 0"):
        ZarrSource(path, level=1)


@pytest.mark.parametrize(
    ("axes", "shape", "message"),
    [
        ("zyx", (4, 5, 6), r"has 4 planes along 'z': allowed is one axis of channels .* each plane"),
        ("tczyx", (2, 3, 1, 5, 6), r"has 2 planes along 't' and 3 planes along 'c': allowed is one"),
        ("cyx", (5, 6), r"has axes c, y, x of extents \(5, 6\)"),
        ("cy", (5, 6), r"has axes c, y of extents \(5, 6\): allowed are one y, one x"),
    ],
)
def test_refuses_images_of_other_axes(
    tmp_path: Path, axes: str, shape: tuple[int, ...], message: str
) -> None:
    with pytest.raises(DatasetMismatch, match=message):
        ZarrSource(write_ome(tmp_path, "0.5", axes, [np.zeros(shape, "u1")]))


def test_images_before_version_0_3_have_five_axes(tmp_path: Path) -> None:
    path = levels_of("0.4", tmp_path)
    group = zarr.open_group(path)
    (image,) = group.attrs["multiscales"]
    group.attrs["multiscales"] = [{"version": "0.1", "datasets": image["datasets"]}]
    assert_reads(ZarrSource(path, level=1), pixels(3, size=(24, 32)), region(1, 12, 3, 15))


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ({}, r"ome\.zarr is a zarr group that says nothing of an image, with s0, s1, s2 inside: allowed are"),
        ({"multiscales": []}, r"ome\.zarr as an OME-Zarr image: its OME metadata lacks a list of images"),
        ({"multiscales": [{"axes": []}]}, r"its OME metadata lacks 'datasets'"),
        (
            {"multiscales": [{"datasets": [{"path": "s9"}]}]},
            r"there is no array 's9', which should be level 0",
        ),
        ({"multiscales": 3}, r"its OME metadata lacks a list of images"),
    ],
)
def test_names_an_ome_image_whose_metadata_is_damaged(
    tmp_path: Path, metadata: dict[str, Any], message: str
) -> None:
    path = levels_of("0.5", tmp_path)
    zarr.open_group(path).attrs["ome"] = metadata
    if not metadata:
        del zarr.open_group(path).attrs["ome"]
    with pytest.raises(CorruptImage, match=message):
        ZarrSource(path)
