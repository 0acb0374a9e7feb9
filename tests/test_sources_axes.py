"""Axes of zarr arrays: by their names, whatever their order; others are taken by index or refused."""

from __future__ import annotations

import pickle
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr
from source_contract import assert_reads, pixels, region, write_ome

from streamcnn.data.sources import ZarrSource, open_image
from streamcnn.errors import DatasetMismatch

SHAPE = (6, 8, 10)
IMAGE = pixels(6, size=SHAPE[1:])  # of so many channels that its shape says nothing


def stored_as(image: Any, axes: str) -> Any:
    """The image (C, H, W) with its axes in another order; further ones have extent 1."""
    kept = [axis for axis in axes if axis in "cyx"]
    turned = image.transpose(["cyx".index(axis) for axis in kept])
    return turned.reshape([turned.shape[kept.index(axis)] if axis in kept else 1 for axis in axes])


def write(path: Path, stored: Any, names: list[str | None] | None, how: str) -> Path:
    """A zarr array whose axes are named by ``how``: the key of v3, or xarray's in v2 or v3."""
    options: dict[str, Any] = {"dimension_names": names} if how == "v3" else {}
    if how == "xarray v2":
        options["zarr_format"] = 2
    array = zarr.create_array(path, shape=stored.shape, dtype=stored.dtype, chunks=stored.shape, **options)
    if how != "v3" and names is not None:
        array.attrs["_ARRAY_DIMENSIONS"] = names
    array[...] = stored
    return path


@pytest.mark.parametrize("how", ["v3", "xarray v2", "xarray v3"])
@pytest.mark.parametrize("axes", ["yxc", "cyx", "xyc", "cxy", "ycx", "tzyxc", "ctyxz"])
def test_names_say_where_each_axis_is(tmp_path: Path, how: str, axes: str) -> None:
    path = write(tmp_path / "a.zarr", stored_as(IMAGE, axes), list(axes), how)
    for source in (ZarrSource(path), open_image(path, channels_last=axes[0] != "c")):
        assert source.shape == SHAPE
        assert_reads(pickle.loads(pickle.dumps(source)), IMAGE, region(1, 7, 2, 9))


def test_145_rows_and_columns_of_200_bands(tmp_path: Path) -> None:
    for how in ("v3", "xarray v2"):
        path = write(tmp_path / how, np.ones((145, 145, 200), "u2"), ["y", "x", "c"], how)
        assert ZarrSource(path).shape == (200, 145, 145)
    path = write(tmp_path / "no names", np.ones((145, 145, 200), "u2"), None, "v3")
    with pytest.raises(DatasetMismatch, match=r"\(145, 145, 200\) without names, .*give channels_last=False"):
        open_image(path)
    assert open_image(path, channels_last=True).shape == (200, 145, 145)


@pytest.mark.parametrize(
    "names",
    [
        ["Y", "X", "C"],
        ["lat", "lon", "band"],
        ["row", "col", "wavelength"],
        ["height", "width", "channel"],
        ["northing", "easting", "s"],
    ],
)
def test_other_words_for_rows_columns_and_channels(tmp_path: Path, names: list[str | None]) -> None:
    path = write(tmp_path / "a.zarr", stored_as(IMAGE, "yxc"), names, "v3")
    assert_reads(ZarrSource(path), IMAGE, region(1, 7, 2, 9))


def test_two_axes_may_be_transposed(tmp_path: Path) -> None:
    image = pixels(1, size=(8, 10))
    path = write(tmp_path / "a.zarr", image[0].T, ["x", "y"], "v3")
    assert_reads(ZarrSource(path), image, region(1, 7, 2, 9))
    path = write(tmp_path / "b.zarr", image[0], ["rlat", "rlon"], "v3")
    with pytest.raises(
        DatasetMismatch, match=r"b\.zarr has axes rlat, rlon of extents \(8, 10\): allowed are"
    ):
        ZarrSource(path)


@pytest.mark.parametrize("names", [[None, None, None], ["dim_0", "dim_1", "dim_2"], ["", "", ""]])
def test_names_that_say_nothing_are_none(tmp_path: Path, names: list[str | None]) -> None:
    path = write(tmp_path / "a.zarr", IMAGE, names, "v3")
    with pytest.raises(DatasetMismatch, match=r"has 3 axes \(6, 8, 10\) without names"):
        ZarrSource(path)
    assert ZarrSource(path, channels_last=False).shape == SHAPE
    with pytest.raises(DatasetMismatch, match=r"a\.zarr does not name its axes: leave index= out"):
        ZarrSource(path, channels_last=False, index={"t": 0})


def test_channels_that_are_named_alone(tmp_path: Path) -> None:
    path = write(tmp_path / "a.zarr", stored_as(IMAGE, "yxc"), [None, None, "channel"], "v3")
    assert_reads(ZarrSource(path), IMAGE, region(1, 7, 2, 9))


@pytest.mark.parametrize("version", ["0.4", "0.5"])
def test_names_of_an_ome_image_count_more_than_its_arrays(tmp_path: Path, version: str) -> None:
    path = write_ome(tmp_path, version, "xyc", [stored_as(IMAGE, "xyc")])
    zarr.open_group(path)["s0"].attrs["_ARRAY_DIMENSIONS"] = ["y", "x", "c"]
    assert_reads(ZarrSource(path), IMAGE, region(1, 7, 2, 9))


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (
            ["time", "y", "x"],
            "has 6 planes along 'time': allowed is one axis of channels ('c' or 's'), every other of "
            "extent 1; give index={'time': 0} to take one plane, or store each plane as an image",
        ),
        (["depth", "y", "x"], "has 6 planes along 'depth': allowed is one axis"),
        (["position", "y", "x"], "has 6 planes along 'position': allowed is one axis"),
        (
            ["energy", "y", "x"],
            "every other of extent 1; give channels_last=False if 'energy' is the channels, give "
            "index={'energy': 0} to take one plane, or store each plane as an image",
        ),
    ],
)
def test_planes_are_refused_by_name_unless_one_is_taken(
    tmp_path: Path, names: list[str | None], message: str
) -> None:
    path = write(tmp_path / "a.zarr", IMAGE, names, "v3")
    with pytest.raises(DatasetMismatch, match=re.escape(message)):
        open_image(path)
    source = open_image(path, index={str(names[0]).upper(): 4})
    assert source.shape == (1, 8, 10)
    assert_reads(pickle.loads(pickle.dumps(source)), IMAGE[4:5], region(1, 7, 2, 9))


def test_an_axis_of_unknown_name_is_the_channels_if_that_is_said(tmp_path: Path) -> None:
    path = write(tmp_path / "a.zarr", IMAGE, ["energy", "y", "x"], "v3")
    assert_reads(ZarrSource(path, channels_last=False), IMAGE, region(1, 7, 2, 9))
    with pytest.raises(DatasetMismatch, match="has 6 planes along 'energy'"):
        ZarrSource(path, channels_last=True)
    path = write(tmp_path / "b.zarr", IMAGE, ["t", "y", "x"], "v3")
    with pytest.raises(DatasetMismatch, match="has 6 planes along 't'"):
        ZarrSource(path, channels_last=False)


def test_planes_of_several_axes(tmp_path: Path) -> None:
    stored = pixels(2 * 3 * 4, size=(8, 10)).reshape(2, 3, 4, 8, 10)
    path = write_ome(tmp_path, "0.5", "tczyx", [stored])
    with pytest.raises(
        DatasetMismatch,
        match=r"has 2 planes along 't' and 3 planes along 'c' and 4 planes along 'z': .*give "
        r"index=\{'t': 0, 'z': 0\}",
    ):
        open_image(path)
    assert_reads(open_image(path, index={"t": 1, "z": 2}), stored[1, :, 2], region(1, 7, 2, 9))
    assert_reads(open_image(path, index={"t": 1, "z": 2, "c": 0}), stored[1, :1, 2], region(1, 7, 2, 9))
    for index, message in (
        ({"q": 0}, "has no axis 'q' to take a plane of: allowed in index= are t, c, z, y, x"),
        ({"t": 2}, "has no plane 2 along 't': allowed are 0..1"),
        ({"t": -1}, "has no plane -1 along 't': allowed are 0..1"),
        ({"y": 0}, "needs all of its axis 'y': leave it out of index="),
    ):
        with pytest.raises(DatasetMismatch, match=re.escape(message)):
            open_image(path, index=index)


def test_planes_are_taken_of_zarr_arrays_alone(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", IMAGE)
    with pytest.raises(DatasetMismatch, match=r"a\.npy is no zarr array: planes are taken of these alone"):
        open_image(tmp_path / "a.npy", index={"t": 0}, channels_last=False)
