"""Zarr chunks that lie under other names than the metadata says, and arrays of which none is there."""

from __future__ import annotations

import json
import pickle
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import zarr
from source_contract import assert_reads, pixels, region, write_ome

from streamcnn.data.sources import ZarrSource, open_image
from streamcnn.data.tile_store.arrays import write_image
from streamcnn.errors import CorruptImage

IMAGE = pixels(3, size=(50, 60))


def write(path: Path, **options: Any) -> Path:
    array = zarr.create_array(path, shape=IMAGE.shape, dtype="u1", chunks=(3, 16, 16), **options)
    array[:] = IMAGE
    return path


def change(path: Path, **changes: Any) -> None:
    """The metadata with other values; None takes a key out."""
    metadata = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in metadata.items() if value is not None}))


@pytest.mark.parametrize("missing_chunks", ["some", "fill", "error"])
@pytest.mark.parametrize(("written", "said"), [("/", None), ("/", "."), (".", "/")])
def test_chunks_of_v2_are_found_under_the_other_separator(
    tmp_path: Path, written: Any, said: Any, missing_chunks: Any
) -> None:
    path = write(tmp_path / "a.zarr", zarr_format=2, chunk_key_encoding={"name": "v2", "separator": written})
    change(path / ".zarray", dimension_separator=said)
    source = pickle.loads(pickle.dumps(open_image(path, missing_chunks=missing_chunks)))
    assert_reads(source, IMAGE, region(5, 40, 10, 60))


ENCODINGS = [{"name": name, "separator": separator} for name in ("default", "v2") for separator in "/."]


@pytest.mark.parametrize("written", ENCODINGS, ids=str)
@pytest.mark.parametrize("said", ENCODINGS, ids=str)
@pytest.mark.parametrize("folder", ["", "in/a/group"])
def test_chunks_of_v3_are_found_under_another_encoding(
    tmp_path: Path, written: Any, said: Any, folder: str
) -> None:
    path = write(tmp_path / folder / "a.zarr", chunk_key_encoding=written)
    change(
        path / "zarr.json",
        chunk_key_encoding={"name": said["name"], "configuration": {"separator": said["separator"]}},
    )
    array = zarr.open_array(zarr.storage.LocalStore(tmp_path), path=f"{folder}/a.zarr", mode="r")
    for source in (ZarrSource(path), ZarrSource(array)):
        assert_reads(source, IMAGE, region(5, 40, 10, 60))


def test_chunks_are_those_that_the_metadata_names_if_one_is_there(tmp_path: Path) -> None:
    path = write(
        tmp_path / "a.zarr", zarr_format=2, fill_value=7, chunk_key_encoding={"name": "v2", "separator": "/"}
    )
    (path / "0.0.0").write_bytes((path / "0/0/0").read_bytes())
    change(path / ".zarray", dimension_separator=".")
    expected = IMAGE.copy()
    expected[:, 16:] = expected[:, :, 16:] = 7
    assert_reads(ZarrSource(path), expected, region(5, 40, 10, 60))


@pytest.mark.parametrize(
    ("options", "key"), [({"zarr_format": 2}, "0.0.0"), ({}, "c/0/0/0"), ({"shards": (3, 32, 32)}, "c/0/0/0")]
)
def test_an_array_without_a_chunk_is_refused(tmp_path: Path, options: Any, key: str) -> None:
    path = tmp_path / "a.zarr"
    zarr.create_array(path, shape=IMAGE.shape, dtype="u1", chunks=(3, 16, 16), fill_value=9, **options)
    (path / "README").write_text("no chunk")
    (path / "9.9.9").write_text("nor is this, beyond the end")
    num_chunks = 4 if "shards" in options else 16
    message = (
        f"a.zarr has none of its {num_chunks} chunks, such as {key}: they were lost, never written or are "
        "named otherwise; copy the image again, or if it is empty on purpose write it with "
        'write_empty_chunks, or open it with missing_chunks="fill", and a mask with empty_masks=True'
    )
    for missing_chunks in ("some", "error"):
        with pytest.raises(CorruptImage, match=re.escape(message)):
            open_image(path, missing_chunks=missing_chunks)  # type: ignore[arg-type]
    source = open_image(path, missing_chunks="fill")
    assert_reads(source, IMAGE * 0 + 9, region(5, 40, 10, 60))


def test_one_chunk_of_many_is_enough(tmp_path: Path) -> None:
    path = tmp_path / "a.zarr"
    array = zarr.create_array(path, shape=IMAGE.shape, dtype="u1", chunks=(3, 16, 16), fill_value=9)
    expected = IMAGE * 0 + 9
    array[:, 48:, 48:] = expected[:, 48:, 48:] = IMAGE[:, 48:, 48:]
    assert_reads(open_image(path), expected, region(5, 50, 10, 60))


@pytest.mark.parametrize("version", ["0.4", "0.5"])
def test_a_level_without_chunks_is_refused(tmp_path: Path, version: str) -> None:
    path = write_ome(tmp_path, version, "cyx", [IMAGE, IMAGE[:, ::2, ::2]])
    for chunk in [entry for entry in (path / "s1").iterdir() if not entry.name.startswith((".z", "zarr"))]:
        shutil.rmtree(chunk) if chunk.is_dir() else chunk.unlink()
    assert_reads(open_image(path), IMAGE, region(5, 40, 10, 60))
    with pytest.raises(CorruptImage, match=r"ome\.zarr \(level 1\) has none of its 1 chunks"):
        open_image(path, level=1)


def test_chunks_of_an_array_in_memory_are_looked_for_too() -> None:
    array = zarr.create_array(zarr.storage.MemoryStore(), shape=IMAGE.shape, dtype="u1", chunks=IMAGE.shape)
    with pytest.raises(CorruptImage, match="has none of its 1 chunks, such as c/0/0/0"):
        ZarrSource(array)
    array[:] = IMAGE
    assert_reads(ZarrSource(array), IMAGE, region(5, 40, 10, 60))


def test_an_image_that_lost_its_only_shard_is_refused(tmp_path: Path) -> None:
    write_image(tmp_path / "a", ZarrSource(write(tmp_path / "a.zarr")), name="a", levels=1)
    assert_reads(ZarrSource(tmp_path / "a"), IMAGE, region(5, 40, 10, 60))
    shutil.rmtree(tmp_path / "a/0/c")
    with pytest.raises(CorruptImage, match="has none of its 1 chunks, such as c/0/0/0"):
        ZarrSource(tmp_path / "a")
