"""Tile stores that somebody made to do harm: nothing outside is read or removed, one clear error."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hostile import make_store

from streamcnn.data.tile_store import Head, TileStore, TileStoreWriter
from streamcnn.errors import CorruptImage, StreamError
from streamcnn.geometry.regions import Region
from streamcnn.support.text import html_text, printable


@pytest.fixture
def store(tmp_path: Path) -> Path:
    return make_store(tmp_path / "store", levels=1)


def change_manifest(store: Path, change: Callable[[list[Any]], object]) -> None:
    """Change the manifest's lines and the checksum beside it: who can write the one can write the other."""
    (path,) = store.glob("manifest-*")
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    change(lines)
    content = "".join(json.dumps(line) + "\n" for line in lines).encode()
    path.write_bytes(content)
    sha256 = hashlib.sha256(content).hexdigest()
    (store / "complete.json").write_text(json.dumps({"manifest": path.name, "sha256": sha256}))


RECORDS: list[tuple[dict[str, Any], str]] = [
    ({"name": "../../x"}, r"name='../../x': allowed are letters"),
    ({"name": "/etc"}, "name='/etc': allowed are letters"),
    ({"label": 1.5}, "label is 1.5: allowed is a valid integer"),
    ({"label": 7}, "label=7: allowed are labels of the 2 classes"),
    ({"shape": "abc"}, "shape is 'abc': allowed is a valid array"),
    ({"shape": [3, 0, 5]}, r"shape=\(3, 0, 5\): allowed are extents"),
    ({"dtype": "object"}, "dtype='object': allowed are uint8"),
    ({"shards": {"../x": {}}}, "shards"),
    ({"metadata": {"../zarr.json": "0" * 64}}, "metadata: allowed are 0/zarr.json, zarr.json"),
    ({"extra": 1}, "extra is not known here"),
]


@pytest.mark.parametrize(("values", "text"), RECORDS)
def test_a_crafted_record_is_one_clear_error(store: Path, values: dict[str, Any], text: str) -> None:
    change_manifest(store, lambda lines: lines[1].update(values))
    with pytest.raises(CorruptImage, match=text):
        TileStore(store)


def test_crafted_classes_are_one_clear_error(store: Path) -> None:
    change_manifest(store, lambda lines: lines[0].update(classes=[1, 2]))
    with pytest.raises(CorruptImage, match=r"classes\.0 is 1: allowed is a valid string"):
        TileStore(store)


def test_a_manifest_outside_is_neither_read_nor_removed(store: Path) -> None:
    outside = store.parent / "m.jsonl"
    outside.write_text("precious")
    (store / "complete.json").write_text(json.dumps({"manifest": "../m.jsonl", "sha256": "0" * 64}))
    with pytest.raises(CorruptImage, match=r"manifest='\.\./m\.jsonl': allowed are files beside it"):
        TileStore(store)
    with pytest.raises(CorruptImage), TileStoreWriter(store, Head("images", {"made by": "a test"})) as writer:
        writer.finish()
    assert outside.read_text() == "precious"


@pytest.mark.parametrize("name", ["images", "images/train", "images/train/a", "images/train/a/0/c/0/0/0"])
def test_links_out_of_a_store_are_not_read(store: Path, tmp_path: Path, name: str) -> None:
    moved = shutil.move(store / name, tmp_path / "outside")
    (store / name).symlink_to(moved)
    there = TileStore(store)
    with pytest.raises(CorruptImage, match=r"outside.*: allowed are files and links inside"):
        there.source(there.records[0])


def change_level(store: Path, change: Callable[[Any], object]) -> None:
    """Change a level's metadata, and all checksums of it."""
    path = store / "images/train/a/0/zarr.json"
    found = json.loads(path.read_text())
    change(found)
    rewrite_level(store, json.dumps(found))


def rewrite_level(store: Path, text: str) -> None:
    path = store / "images/train/a/0/zarr.json"
    path.write_text(text)
    sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
    change_manifest(store, lambda lines: lines[1]["metadata"].update({"0/zarr.json": sha256}))


LEVELS: list[tuple[dict[str, Any], str]] = [
    ({"node_type": "group"}, "node_type is 'group': allowed is 'array'"),
    ({"zarr_format": 2}, "zarr_format is 2: allowed is 3"),
    ({"shape": "abc"}, "shape is 'abc': allowed is a valid array"),
    ({"shape": [3, 40]}, "shape.2 is missing|shape is"),
    ({"shape": [3, 2**70, 30]}, "has shape"),
    ({"data_type": ["uint8"]}, "data_type is"),
    ({"data_type": "uint16"}, "data_type 'uint16', the manifest says"),
    ({"chunk_grid": {"name": "x"}}, "chunk_grid.name is 'x'"),
    ({"chunk_grid": {"name": "regular", "configuration": {"chunk_shape": [3, 0, 512]}}}, "shards of"),
    ({"chunk_grid": {"name": "regular", "configuration": {"chunk_shape": [3, 513, 512]}}}, "whole chunks"),
    (
        {"chunk_grid": {"name": "regular", "configuration": {"chunk_shape": [3, 512 * 2**20, 1024]}}},
        "2097152 chunks in a shard: allowed are 1048576",
    ),
    ({"codecs": []}, "codecs"),
    ({"codecs": [{"name": "bytes"}]}, r"codecs.0.name is 'bytes': allowed is 'sharding_indexed'"),
    ({"fill_value": "x"}, "as a zarr array"),
    ({"storage_transformers": [{"name": "x"}]}, "as a zarr array"),
    ({"chunk_key_encoding": 3}, "as a zarr array"),
]


@pytest.mark.parametrize(("values", "text"), LEVELS)
def test_crafted_metadata_of_a_level_is_one_clear_error(
    store: Path, values: dict[str, Any], text: str
) -> None:
    change_level(store, lambda found: found.update(values))
    there = TileStore(store)
    with pytest.raises(CorruptImage, match=rf"0/zarr\.json.*({text})"):
        there.source(there.records[0])
    with pytest.raises(CorruptImage, match=r"0/zarr\.json"):
        there.codec()


def test_shards_in_shards_are_one_clear_error(store: Path) -> None:
    def change(found: Any) -> None:
        configuration = found["codecs"][0]["configuration"]
        for _ in range(150):
            inner = {"name": "sharding_indexed", "configuration": dict(configuration)}
            configuration = {**configuration, "codecs": [inner]}
        found["codecs"][0]["configuration"] = configuration

    change_level(store, change)
    there = TileStore(store)
    with pytest.raises(StreamError):
        there.source(there.records[0]).read(Region.whole((40, 30)))


@pytest.mark.parametrize("text", ["", "[]", "[" * 100_000, '{"a": NaN}', '{"shape": 1, "shape": 2}'])
def test_metadata_of_a_level_that_is_none_is_one_clear_error(store: Path, text: str) -> None:
    rewrite_level(store, text)
    there = TileStore(store)
    with pytest.raises(CorruptImage, match=r"0/zarr\.json"):
        there.source(there.records[0])
    ((_, error), (_, other)) = there.verify()
    assert "0/zarr.json" in str(error)
    assert other is None


@pytest.mark.parametrize(
    "make", [os.mkfifo, lambda path: path.mkdir(), lambda path: path.symlink_to("/dev/zero")]
)
def test_what_is_no_file_is_no_shard(store: Path, make: Callable[[Path], object]) -> None:
    shard = store / "images/train/a/0/c/0/0/0"
    shard.unlink()
    make(shard)
    there = TileStore(store)
    with pytest.raises(CorruptImage):
        there.source(there.records[0]).read(Region.whole((40, 30)))
    ((_, error), (_, other)) = there.verify()
    assert (str(shard) in str(error), other) == (True, None)


def test_a_folder_in_the_lock_s_place_is_one_clear_error(store: Path) -> None:
    (store / "writer.lock").unlink(missing_ok=True)
    (store / "writer.lock").mkdir()
    with (
        pytest.raises(StreamError, match=r"cannot lock .*writer\.lock: Is a directory"),
        TileStoreWriter(store, Head("images", {"made by": "a test"})),
    ):
        pass


def test_a_shape_that_is_not_the_array_s_is_one_clear_error(store: Path) -> None:
    change_manifest(store, lambda lines: lines[1].update(shape=[3, 10**9, 30]))
    there = TileStore(store)
    with pytest.raises(
        CorruptImage, match=r"zarr\.json has shape \[3, 40, 30\] .* says \[3, 1000000000, 30\]"
    ):
        there.source(there.records[0])


def test_text_that_a_terminal_would_act_on_is_escaped() -> None:
    assert printable("a\x1b]0;x\x07\u202eb\udcff") == r"a\x1b]0;x\x07\u202eb\udcff"
    assert html_text("<\x1b>") == r"&lt;\x1b&gt;"


def test_a_class_named_by_escape_codes_is_escaped(
    store: Path, run: Callable[..., tuple[int, str, str]]
) -> None:
    change_manifest(store, lambda lines: lines[0].update(classes=["\x1b[31mred", "[/bold]"]))
    status, out, _ = run("info", store)
    assert (status, "\x1b" in out, r"0: \x1b[31mred; 1: [/bold]" in out) == (0, False, True)


def test_too_few_checksums_are_one_clear_error(store: Path) -> None:
    change_manifest(store, lambda lines: lines[1]["shards"]["0/c/0/0/0"].update(chunk_crc32c=""))
    ((_, error), (_, other)) = TileStore(store).verify()
    assert str(error).endswith("shard 0/c/0/0/0 has 1 chunks, the manifest says 0")
    assert other is None
