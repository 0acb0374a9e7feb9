"""Image files as a dataset: tables and folders of classes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from streamcnn import CorruptImage, DatasetMismatch
from streamcnn.data.augmentation import RandomAugmentation
from streamcnn.data.dataset import ImageDataset
from streamcnn.data.file_dataset import FileDataset, open_dataset
from streamcnn.data.tile_store import Head, TileStoreWriter
from streamcnn.regions import Region


def write(path: Path, value: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((6, 8, 3), value, np.uint8)).save(path)


def values(images: ImageDataset) -> list[int]:
    """The first pixel of each image."""
    corner = Region.whole((1, 1))
    return [int(images[position][0].read(corner)[0, 0, 0]) for position in range(len(images))]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for value, name in enumerate(("cat/a.png", "cat/b.png", "dog/a.png", "ant/deep/a.png")):
        write(tmp_path / name, value)
    return tmp_path


def test_folders_are_classes(folder: Path) -> None:
    images = open_dataset(folder)
    assert isinstance(images, FileDataset)
    assert images.classes == ("ant", "cat", "dog")
    assert images.names == ("ant/deep/a.png", "cat/a.png", "cat/b.png", "dog/a.png")
    assert images.labels == (0, 1, 1, 2)
    assert images.num_classes == 3
    assert values(images) == [3, 0, 1, 2]
    assert values(open_dataset(folder, positions=[3, 0])) == [2, 3]


def test_folders_of_splits_hold_folders_of_classes(tmp_path: Path) -> None:
    for value, name in enumerate(("train/cat/a.png", "train/dog/a.png", "val/dog/a.png")):
        write(tmp_path / name, value)
    images = open_dataset(tmp_path, "val")
    # Classes are those of all splits, so that a label means the same in each.
    assert (images.classes, images.labels, values(images)) == (("cat", "dog"), (1,), [2])
    assert len(open_dataset(tmp_path)) == 3
    with pytest.raises(DatasetMismatch, match=r"no images of split 'test': it has \['train', 'val'\]"):
        open_dataset(tmp_path, "test")


def test_a_table_names_images_labels_and_splits(folder: Path) -> None:
    table = folder / "labels.csv"
    table.write_text(f"image,label,split\ncat/a.png,4,\ndog/a.png,2,test\n{folder}/cat/b.png,0,\n")
    images = open_dataset(table, "train")
    assert (images.classes, images.labels, images.num_classes) == (None, (4, 0), 5)
    assert values(images) == [0, 1]
    assert values(open_dataset(table, "test")) == [2]


def test_the_fingerprint_tells_labels_files_and_augmentations_apart(folder: Path) -> None:
    table = folder / "labels.csv"
    table.write_text("image,label\ncat/a.png,4\n")
    first = open_dataset(table).fingerprint
    assert open_dataset(table).fingerprint == first
    assert open_dataset(table, augmentation=RandomAugmentation(mirrors=True)).fingerprint != first
    table.write_text("image,label\ncat/a.png,3\n")
    assert open_dataset(table).fingerprint != first
    table.write_text("image,label\ncat/a.png,4\n")
    write(folder / "cat/a.png", 200)
    assert open_dataset(table).fingerprint != first


def test_images_are_augmented_and_read_ahead(folder: Path) -> None:
    images = open_dataset(folder, augmentation=RandomAugmentation(inversion=0.5), seed=2)
    seen = set()
    for epoch in range(8):
        images.set_epoch(epoch)
        images.prefetch(0)
        seen.add(values(images)[0])
    assert seen == {3, 252}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("image,label\nnone.png,1\n", "names '.*none.png', where there is no image"),
        ("image,label\nlabels.csv,1\n", "names '.*labels.csv', where there is no image"),
        ("image,label\ncat/a.png,1\ncat/a.png,2\n", "'cat/a.png' in several rows"),
        ("image,label\n", "has no rows"),
        ("image,label\ncat/a.png,-1\n", "'-1' are no whole numbers"),
        ("image,class\ncat/a.png,1\n", "needed are image and label"),
    ],
)
def test_a_table_that_does_not_fit_is_refused(folder: Path, text: str, message: str) -> None:
    (folder / "labels.csv").write_text(text)
    with pytest.raises(DatasetMismatch, match=message):
        open_dataset(folder / "labels.csv")


def test_images_in_no_folder_of_a_class_are_refused(folder: Path) -> None:
    write(folder / "loose.png", 1)
    with pytest.raises(DatasetMismatch, match=r"in no folder of a class: 'loose.png'"):
        open_dataset(folder)


def test_nothing_is_no_dataset(tmp_path: Path) -> None:
    with pytest.raises(CorruptImage, match="no image is known"):
        open_dataset(tmp_path)
    with pytest.raises(DatasetMismatch, match="cannot read the table"):
        open_dataset(tmp_path / "none.csv")


def test_a_tile_store_is_known_by_its_files(tmp_path: Path) -> None:
    with TileStoreWriter(tmp_path, Head("images", {})) as writer:
        writer.finish()
    with pytest.raises(DatasetMismatch, match="has no images of split None"):
        open_dataset(tmp_path)
