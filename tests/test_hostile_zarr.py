"""Zarr metadata that are damaged or hostile."""

from __future__ import annotations

import json
import zipfile
from pathlib import Path
from typing import Any

import pytest
import zarr
from hostile import SIZE, find_images_of, refused_or_not
from source_contract import pixels, region

from streamcnn.data.fingerprints import fingerprint
from streamcnn.data.image_files import find_images
from streamcnn.data.sources import (
    ZarrSource,
    is_image,
)
from streamcnn.errors import CorruptImage


@pytest.fixture
def image_zarr(tmp_path: Path) -> Path:
    array = zarr.create_array(tmp_path / "a.zarr", shape=(3, *SIZE), chunks=(3, 16, 16), dtype="u1")
    array[:] = pixels(size=SIZE)
    return tmp_path / "a.zarr"


def sharding(depth: int) -> dict[str, Any]:
    """Shards in shards in shards."""
    inner: list[Any] = [{"name": "bytes"}] if depth == 0 else [sharding(depth - 1)]
    configuration = {"chunk_shape": [3, 16, 16], "codecs": inner, "index_codecs": [{"name": "bytes"}]}
    return {"name": "sharding_indexed", "configuration": configuration}


CRAFTED: list[dict[str, Any]] = [
    {"dimension_names": 3},
    {"dimension_names": [1, 2, 3]},
    {"dimension_names": ["y", ["x"], {}]},
    {"dimension_names": ["c", "c", "c"]},
    {"attributes": 3},
    {"attributes": {"_ARRAY_DIMENSIONS": 7}},
    {"attributes": {"_ARRAY_DIMENSIONS": [[], {}, None]}},
    {"attributes": {"ome": []}},
    {"fill_value": "x"},
    {"fill_value": 10**30},
    {"fill_value": None},
    {"fill_value": [1]},
    {"codecs": []},
    {"codecs": 3},
    {"codecs": [{"name": "bytes"}, {"name": "pickle"}]},
    {"codecs": [{"name": "bytes"}, {"name": "numcodecs.pickle", "configuration": {}}]},
    {"codecs": [{"name": "bytes"}, {"name": "gzip", "configuration": {"level": "x"}}]},
    {"codecs": [{"name": "transpose", "configuration": {"order": [0, 0, 0]}}, {"name": "bytes"}]},
    {"codecs": [sharding(3)]},
    {"codecs": [sharding(200)]},
    {"chunk_grid": {"name": "regular", "configuration": {"chunk_shape": [0, 0, 0]}}},
    {"chunk_grid": {"name": "regular", "configuration": {"chunk_shape": [3, 16]}}},
    {"chunk_grid": {"name": "rectilinear", "configuration": {}}},
    {"chunk_key_encoding": {"name": "default", "configuration": {"separator": "../"}}},
    {"chunk_key_encoding": None},
    {"shape": [3, 40, -1]},
    {"shape": [3, 2**70, 30]},
    {"shape": "abc"},
    {"data_type": {"name": "struct", "configuration": {}}},
    {"data_type": "uint" + "9" * 5000},
    {"storage_transformers": [{"name": "x"}]},
    {"node_type": "group"},
    {"zarr_format": 99},
    {"consolidated_metadata": {"kind": "inline", "must_understand": False, "metadata": {"../x": {}}}},
]


@pytest.mark.parametrize("values", CRAFTED, ids=lambda values: json.dumps(values)[:60])
def test_crafted_metadata_is_one_clear_error_or_read(image_zarr: Path, values: dict[str, Any]) -> None:
    path = image_zarr / "zarr.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))
    for use in (is_image, lambda place: find_images([place]), fingerprint_of, read_corner):
        with refused_or_not():
            use(image_zarr)


def fingerprint_of(path: Path) -> None:
    fingerprint([path])


def read_corner(path: Path) -> None:
    ZarrSource(path).read(region(0, 9, 0, 9))


@pytest.mark.parametrize(
    "text",
    ["[" * 100_000, '{"zarr_format": 3, "node_type": "array", "a": ' + "[" * 100_000, "\xff", "", "[]", "3"],
)
@pytest.mark.parametrize("name", ["zarr.json", ".zattrs", ".zarray", ".zgroup", ".zmetadata"])
def test_metadata_that_is_no_json_object_is_one_clear_error(tmp_path: Path, name: str, text: str) -> None:
    folder = tmp_path / "a.zarr"
    if name == "zarr.json":
        folder.mkdir()
    else:
        group = zarr.create_group(folder, zarr_format=2)
        group.attrs["multiscales"] = [{"datasets": [{"path": "0"}], "axes": ["c", "y", "x"]}]
        group.create_array("0", shape=(3, *SIZE), dtype="u1")[:] = pixels(size=SIZE)
    place = folder / "0" / name if name == ".zarray" else folder / name
    place.write_text(text, encoding="latin-1")
    for use in (is_image, find_images_of, read_corner):
        with refused_or_not():
            use(folder)
    if name in ("zarr.json", ".zarray"):
        with pytest.raises(CorruptImage):
            ZarrSource(folder)


def test_metadata_in_a_zip_file_that_inflates_without_end_is_refused(
    tmp_path: Path, image_zarr: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("streamcnn.data.sources.places.METADATA_BYTES", 50_000)
    with zipfile.ZipFile(tmp_path / "a.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("zarr.json", (image_zarr / "zarr.json").read_text() + " " * 50_000)
    assert (tmp_path / "a.zip").stat().st_size < 2000
    with pytest.raises(CorruptImage, match=r"zarr\.json has 5[0-9]+ bytes, allowed are 50000"):
        ZarrSource(tmp_path / "a.zip")
