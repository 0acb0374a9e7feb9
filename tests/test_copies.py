"""Images that are there several times, byte for byte: in two splits refused, in one split named."""

from __future__ import annotations

import os
import re
import shutil
import warnings
from pathlib import Path

import numpy as np
import pytest
import zarr

from streamcnn.data.convert import convert
from streamcnn.data.copies import same_files
from streamcnn.data.file_dataset import open_dataset
from streamcnn.data.image_files import find_images
from streamcnn.errors import CorruptImage, DatasetMismatch


def image(path: Path, seed: int) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    np.save(path, np.random.default_rng(seed).integers(0, 256, (3, 40, 40), np.uint8))
    return path


def copied(path: Path, to: Path) -> None:
    to.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(path, to)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for seed, name in enumerate(("train/cat/1", "train/cat/2", "train/dog/1", "test/cat/1", "test/dog/1")):
        image(tmp_path / f"set/{name}.npy", seed)
    return tmp_path / "set"


def test_images_that_only_have_one_size_are_no_copies(folder: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert len(open_dataset(folder)) == 5


def test_small_images_are_not_compared(tmp_path: Path) -> None:
    for name in ("train/a/1", "train/a/2", "test/a/1"):
        path = tmp_path / f"set/{name}.npy"
        path.parent.mkdir(parents=True, exist_ok=True)
        np.save(path, np.zeros((3, 30, 30), np.uint8))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert len(open_dataset(tmp_path / "set", "train")) == 2


def test_an_image_in_two_splits_is_refused(folder: Path) -> None:
    copied(folder / "train/dog/1.npy", folder / "test/dog/other name.npy")
    message = (
        f"{folder} has 'test/dog/other name.npy' in test and 'train/dog/1.npy' in train, which are the same "
        "image, byte for byte: allowed is an image in one split; take one of them out"
    )
    for split in (None, "train", "test"):
        with pytest.raises(DatasetMismatch, match=re.escape(message)):
            open_dataset(folder, split)


def test_an_image_that_is_there_twice_in_one_split_is_named(folder: Path) -> None:
    copied(folder / "train/dog/1.npy", folder / "train/dog/2.npy")
    copied(folder / "train/cat/1.npy", folder / "train/dog/3.npy")
    message = (
        f"{folder} has images that are the same, byte for byte: 'train/cat/1.npy' = 'train/dog/3.npy' (with "
        "different labels); 'train/dog/1.npy' = 'train/dog/2.npy'. Each counts as often as it is there"
    )
    with pytest.warns(UserWarning, match=re.escape(message)):
        assert len(open_dataset(folder, "train")) == 5


def test_rows_of_a_table_are_compared(folder: Path) -> None:
    copied(folder / "train/cat/1.npy", folder / "b.npy")
    table = folder / "t.csv"
    table.write_text("image,label,split\ntrain/cat/1.npy,0,train\nb.npy,0,val\n")
    with pytest.raises(DatasetMismatch, match=r"'train/cat/1\.npy' in train and 'b\.npy' in val, which are"):
        open_dataset(table)


def test_folders_are_compared_by_their_files(tmp_path: Path) -> None:
    for seed, name in enumerate(("cat/a.zarr", "dog/b.zarr")):
        path = tmp_path / "set" / name
        array = zarr.create_array(path, shape=(3, 40, 40), chunks=(3, 20, 20), dtype="u1", compressors=None)
        array[:] = np.random.default_rng(seed).integers(0, 256, (3, 40, 40), np.uint8)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        open_dataset(tmp_path / "set")
    shutil.copytree(tmp_path / "set/cat/a.zarr", tmp_path / "set/dog/c.zarr")
    with pytest.warns(UserWarning, match=r"'cat/a\.zarr' = 'dog/c\.zarr' \(with different labels\)\. Each"):
        open_dataset(tmp_path / "set")


def test_images_of_a_store_are_compared_by_their_checksums(folder: Path, tmp_path: Path) -> None:
    def converted(split: str, name: str) -> None:
        table = tmp_path / "t.csv"
        table.write_text("image,label\n" + f"{name}.npy,0\n")
        list(convert(find_images([folder / f"{name}.npy"]), tmp_path / "out", labels=table, split=split))

    copied(folder / "train/cat/1.npy", folder / "b.npy")
    copied(folder / "train/cat/1.npy", folder / "c.npy")
    image(folder / "d.npy", 99)
    for split, name in (("train", "b"), ("train", "c"), ("test", "d")):
        converted(split, name)
    with pytest.warns(
        UserWarning, match=r"out has images that are the same, byte for byte: 'b' = 'c'\. Each"
    ):
        open_dataset(tmp_path / "out")
    copied(folder / "d.npy", folder / "e.npy")
    converted("val", "e")
    with pytest.raises(DatasetMismatch, match="has 'd' in test and 'e' in val, which are the same image"):
        open_dataset(tmp_path / "out", "test")


def test_only_files_of_one_size_are_read_and_only_as_far_as_they_agree(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    size = 5 * 2**22 + 7
    content = bytearray(np.random.default_rng(0).bytes(size))
    paths = [tmp_path / name for name in "abcde"]
    for path in paths[:3]:
        path.write_bytes(content)
    content[-1] ^= 1  # the last byte alone
    paths[3].write_bytes(content)
    paths[4].write_bytes(bytes(size))
    assert same_files([[path] for path in paths]) == [[0, 1, 2]]
    opened: list[Path] = []
    really = Path.open

    def note(path: Path, *args: object, **options: object) -> object:
        opened.append(path)
        return really(path, *args, **options)  # type: ignore[call-overload]

    monkeypatch.setattr(Path, "open", note)
    assert same_files([[paths[0]], [paths[4]]]) == []
    assert opened == [paths[0], paths[4]]
    os.truncate(paths[4], 0)
    assert same_files([[paths[0]], [paths[4]]]) == []
    assert len(opened) == 2
    with pytest.raises(CorruptImage, match=r"cannot read .*/gone: No such file"):
        same_files([[tmp_path / "gone"], [paths[0]]])
