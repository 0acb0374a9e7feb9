"""Arrays, memory maps and .npy files as image sources."""

from __future__ import annotations

import os
import pickle
import re
from pathlib import Path

import numpy as np
import pytest
from source_contract import MEMORY_MAKERS, SourceContract, assert_reads, forbidden, pixels, region

from streamcnn.data.sources import ArraySource
from streamcnn.errors import CorruptImage, DatasetMismatch


class TestMemory(SourceContract):
    makers = MEMORY_MAKERS


def test_a_copy_of_a_mapped_file_holds_no_pixels(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", pixels(3, size=(500, 500)))
    assert len(pickle.dumps(ArraySource(tmp_path / "a.npy"))) < 1000
    mapped = np.lib.format.open_memmap(tmp_path / "a.npy", mode="r")
    assert len(pickle.dumps(ArraySource(mapped))) < 1000
    # A view keeps the file's name and the offset of the whole: only its pixels are sure.
    view = pickle.loads(pickle.dumps(ArraySource(mapped[:, 10:])))
    assert_reads(view, pixels(3, size=(500, 500))[:, 10:], region(3, 400, 5, 90))


@pytest.mark.parametrize("num_bytes", [0, 5, 100, 700])
def test_names_a_file_that_is_cut_short(tmp_path: Path, num_bytes: int) -> None:
    np.save(tmp_path / "a.npy", pixels())
    os.truncate(tmp_path / "a.npy", num_bytes)
    with pytest.raises(CorruptImage, match=r"cannot open .*a\.npy as a \.npy file: "):
        ArraySource(tmp_path / "a.npy")


def test_names_a_file_that_changes_after_it_was_mapped(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", pixels())
    source = ArraySource(tmp_path / "a.npy")
    os.truncate(tmp_path / "a.npy", 300)
    with pytest.raises(CorruptImage, match=r"rows 2\.\.5, cols 0\.\.9 of .*a\.npy: the file was changed"):
        source.read(region(2, 5, 0, 9))
    (tmp_path / "a.npy").unlink()
    with pytest.raises(CorruptImage, match=r"a\.npy: the file is gone since it was opened"):
        source.read(region(2, 5, 0, 9))


def test_names_a_file_that_is_missing_forbidden_or_something_else(tmp_path: Path) -> None:
    with pytest.raises(CorruptImage, match=r"no \.npy file at .*a\.npy"):
        ArraySource(tmp_path / "a.npy")
    (tmp_path / "a.npy").write_text("hello, this is no array")
    with pytest.raises(CorruptImage, match=r"a\.npy as a \.npy file: .*magic string"):
        ArraySource(tmp_path / "a.npy")
    with forbidden(tmp_path), pytest.raises(CorruptImage, match=r"cannot open .*a\.npy: .*Permission denied"):
        ArraySource(tmp_path / "a.npy")


def test_refuses_objects_and_other_axes() -> None:
    with pytest.raises(DatasetMismatch, match=r"array of shape \(2, 3\) has pixels of type object"):
        ArraySource(np.empty((2, 3), object))
    with pytest.raises(DatasetMismatch, match=r"has 4 axes \(1, 2, 3, 4\): allowed are"):
        ArraySource(np.empty((1, 2, 3, 4)))


def test_channels_are_where_they_are_said_to_be() -> None:
    array = np.zeros((6, 20, 5))
    assert ArraySource(array, channels_last=True).shape == (5, 6, 20)
    assert ArraySource(array, channels_last=False).shape == (6, 20, 5)
    assert pickle.loads(pickle.dumps(ArraySource(array, channels_last=False))).shape == (6, 20, 5)


@pytest.mark.parametrize(
    ("shape", "image_shape"),
    [
        ((3, 50, 60), (3, 50, 60)),
        ((50, 60, 3), (3, 50, 60)),
        ((4, 5, 6), (4, 5, 6)),
        ((200, 1600, 1700), (200, 1600, 1700)),
        ((1600, 1700, 200), (200, 1600, 1700)),
        ((1, 64, 5), (1, 64, 5)),
    ],
)
def test_a_shape_tells_the_channels_where_it_leaves_no_doubt(
    tmp_path: Path, shape: tuple[int, ...], image_shape: tuple[int, ...]
) -> None:
    assert ArraySource(np.broadcast_to(np.uint8(1), shape)).shape == image_shape


@pytest.mark.parametrize(
    "shape",
    [(145, 145, 200), (200, 145, 145), (6, 20, 5), (3, 500, 3), (32, 200, 200), (5, 5, 5), (50, 3, 60)],
)
def test_a_guess_that_is_not_certain_is_refused(tmp_path: Path, shape: tuple[int, ...]) -> None:
    array = np.zeros(shape, "u1")
    np.save(tmp_path / "a.npy", array)
    message = (
        f"has 3 axes {shape} without names, which may be (C, H, W) or (H, W, C): give channels_last="
        "False for the former, channels_last=True for the latter (--channels-first or --channels-last)"
    )
    for origin in (array, tmp_path / "a.npy"):
        with pytest.raises(DatasetMismatch, match=re.escape(message)):
            ArraySource(origin)
        assert ArraySource(origin, channels_last=False).shape == shape
        assert ArraySource(origin, channels_last=True).shape == (shape[2], *shape[:2])


def test_reads_single_rows_and_columns_of_an_array_that_is_flipped() -> None:
    flipped = pixels(1)[:, ::-1, ::-1]
    for asked in (region(7, 8, 2, 30), region(4, 21, 9, 10), region(5, 6, 5, 6)):
        assert_reads(ArraySource(flipped), flipped, asked)
