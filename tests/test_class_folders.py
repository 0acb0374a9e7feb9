"""Folders of images: which of them are classes, which are splits, and what is refused."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from streamcnn import DatasetMismatch
from streamcnn.data.class_folders import classes_in_folders
from streamcnn.data.file_dataset import open_dataset
from streamcnn.data.splits import canonical, split_of_folder

HERE = Path("data")
TABLE = "or name images, labels and splits in a CSV file"


@pytest.mark.parametrize(
    ("split", "names"),
    [
        (
            "train",
            "train Train TRAINING trn tr train_set train-data Training2017 01_train trainset images_tr",
        ),
        ("val", "val Valid VALIDATION dev development val_2017 validation_set 2-val"),
        ("test", "test TESTING tst te Test1 test_images testset test-2"),
        (None, "cat tram tester latest valid_cat training_dogs invalid trained device 1 fold1 data images"),
    ],
)
def test_the_names_of_splits_are_known(split: str | None, names: str) -> None:
    assert {name: split_of_folder(name) for name in names.split()} == dict.fromkeys(names.split(), split)


def test_in_a_table_digits_make_another_split() -> None:
    assert [canonical(name) for name in ("Train", "validation", "Test Set", "train2", "fold1", "rest")] == [
        *("train", "val", "test"),
        *("train2", "fold1", "rest"),
    ]


@pytest.mark.parametrize(
    "names",
    [
        ("Train", "Test", "Valid"),
        ("TRAINING", "testing", "validation"),
        ("trn", "tst", "dev"),
        ("train2017", "test_2", "val-set"),
    ],
)
def test_folders_of_splits_are_no_classes(tmp_path: Path, names: tuple[str, str, str]) -> None:
    for name in names:
        for value, animal in enumerate(("cat", "dog")):
            path = tmp_path / name / animal / "a.png"
            path.parent.mkdir(parents=True)
            Image.fromarray(np.full((6, 8, 3), value, np.uint8)).save(path)
    for asked, name in zip(("train", "Testing", "val"), names, strict=True):
        images = open_dataset(tmp_path, asked)
        assert (images.classes, images.labels) == (("cat", "dog"), (0, 1))
        assert images.names == (f"{name}/cat/a.png", f"{name}/dog/a.png")


def test_classes_may_be_called_like_much() -> None:
    for names in (
        ("car/a", "train/a", "bus/a"),
        ("de/a", "tr/a"),
        ("1/a", "2/a"),
        ("cat/left/a", "dog/a"),
        ("cat/images/a", "dog/images/a"),
        ("cat/deep/a",),
    ):
        assert classes_in_folders(HERE, names) == [(name.split("/")[0], None) for name in names]


PAIRS = (
    "data has the folders 'a', 'b', which all hold the folders 'cat', 'dog': they look like splits of the "
)


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ("a/cat/1 a/dog/1 b/cat/1 b/dog/1 b/ant/1", f"{PAIRS}same classes; call them train, val and test"),
        (
            "all/cat/1 all/dog/1",
            "data has the one folder 'all', with the folders 'cat', 'dog' in it: that would be a single "
            "class; give data/all",
        ),
        (
            "train/cat/1 Train2/cat/1",
            "data has the folders 'Train2', 'train', which would all be the split 'train': allowed is one "
            "for each split; put them together",
        ),
        (
            "fold1/cat/1 fold2/cat/1",
            "data has the folders 'fold1', 'fold2', which name parts of the data and neither classes nor "
            "splits: allowed are train, val and test; rename them",
        ),
        (
            "Train/cat/1 hold-out/cat/1",
            "data has the folders 'hold-out', which name parts of the data and neither classes nor splits: "
            "allowed are train, val and test; rename them",
        ),
        (
            "Train/cat/1 Test/cat/1 extra/cat/1",
            "data has the folders 'Test', 'Train', which are called like splits, beside 'extra': allowed are "
            "folders of splits with those of classes in each, or of classes alone; move some",
        ),
        (
            "cat/1 dog/1 test/1",
            "data has the folders 'test', which are called like splits, beside 'cat', 'dog': allowed are "
            "folders of splits with those of classes in each, or of classes alone; move some",
        ),
        (
            "cat/train/1 cat/val/1 dog/train/1",
            "data has the folders 'train', 'val' below those of classes: allowed are folders of splits "
            "above those of classes, such as train/cat; move them",
        ),
        (
            "train/cat/train/1 train/cat/test/1",
            "data has the folders 'test', 'train' below those of classes: allowed are folders of splits "
            "above those of classes, such as train/cat; move them",
        ),
        (
            "train_cat/1 train_dog/1 val_cat/1",
            "data has the folders 'train_cat', 'train_dog', 'val_cat', whose names have splits in them: "
            "allowed are folders of splits with those of classes in each, such as train/cat; rename them",
        ),
        (
            "images/1 masks/1",
            "data has the folders 'images', 'masks', of which 'masks' would be a class of its own: move it "
            "away",
        ),
        (
            "train/cat/1 train/dog/1 test/unknown/1",
            "data has the classes 'cat', 'dog' in train, and none of them in test: it has 'unknown'; give "
            "folders of the same classes",
        ),
    ],
)
def test_what_would_be_a_guess_is_refused(names: str, message: str) -> None:
    with pytest.raises(DatasetMismatch) as refused:
        classes_in_folders(HERE, names.split())
    assert str(refused.value) == f"{message}, {TABLE}"


@pytest.mark.parametrize("names", ["train/1 test/1", "cat/1 2", "train/cat/1 test/1"])
def test_images_in_no_folder_of_a_class_are_refused(names: str) -> None:
    with pytest.raises(DatasetMismatch, match="data has images in no folder of a class: '"):
        classes_in_folders(HERE, names.split())
