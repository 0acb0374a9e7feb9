"""Image files as a dataset: tables and folders of classes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import zarr
from PIL import Image

from streamcnn import CorruptImage, DatasetMismatch
from streamcnn.data.augmentation import RandomAugmentation
from streamcnn.data.convert import convert
from streamcnn.data.dataset import ImageDataset, collate
from streamcnn.data.file_dataset import FileDataset, open_dataset, open_table
from streamcnn.data.image_files import find_images
from streamcnn.data.sources import write_zarr_image
from streamcnn.data.tile_store import Head, TileStoreWriter
from streamcnn.geometry.regions import Region


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


def test_the_fingerprint_tells_a_rewritten_chunk(folder: Path) -> None:
    write_zarr_image(folder / "scan.zarr", torch.zeros((3, 6, 8), dtype=torch.uint8))
    (folder / "labels.csv").write_text("image,label\nscan.zarr,0\n")
    first = open_dataset(folder / "labels.csv").fingerprint
    assert open_dataset(folder / "labels.csv").fingerprint == first
    zarr.open_array(folder / "scan.zarr", mode="r+")[0, 0, 0] = 7
    assert open_dataset(folder / "labels.csv").fingerprint != first


TABLE = "image,age,label,sex\ncat/a.png,63,4, 1 \ndog/a.png,-1.5e1,2,0\n"


def test_columns_of_numbers_are_inputs(folder: Path) -> None:
    table = folder / "labels.csv"
    table.write_text(TABLE)
    images = open_dataset(table, inputs=["sex", "age"])
    sources, labels, *inputs = collate([images[0], images[1]])
    assert len(sources) == 2
    assert labels.tolist() == [4, 2]
    assert len(inputs) == 1
    assert torch.equal(inputs[0], torch.tensor([[1.0, 63.0], [0.0, -15.0]]))
    assert inputs[0].dtype == torch.float32
    assert torch.equal(open_dataset(table, inputs=["age"], positions=[1])[0][2], torch.tensor([-15.0]))
    assert len(open_dataset(table)[0]) == 2


def test_the_fingerprint_tells_inputs_apart(folder: Path) -> None:
    table = folder / "labels.csv"
    table.write_text(TABLE)
    chosen = [(), ("age",), ("sex",), ("age", "sex"), ("sex", "age")]
    found = {open_dataset(table, inputs=inputs).fingerprint for inputs in chosen}
    table.write_text(TABLE.replace("63", "64"))
    found.add(open_dataset(table, inputs=("age",)).fingerprint)
    assert len(found) == len(chosen) + 1
    # Of columns that are not asked for, nothing.
    assert open_dataset(table).fingerprint in found


def test_a_table_without_labels_names_images_and_inputs(folder: Path) -> None:
    table = folder / "new.csv"
    table.write_text("image,age\ncat/b.png,50\ndog/a.png,40\n")
    found = list(open_table(table, ["age"]))
    assert [path for path, *_ in found] == [folder / "cat/b.png", folder / "dog/a.png"]
    assert [source.shape for _, source, *_ in found] == [(3, 6, 8)] * 2
    assert [inputs.tolist() for *_, inputs in found] == [[50.0], [40.0]]
    assert [len(each) for each in open_table(table)] == [2, 2]
    with pytest.raises(DatasetMismatch, match="needed are image and label"):
        open_dataset(table)


@pytest.mark.parametrize(
    ("text", "inputs", "message"),
    [
        (
            "image,label\ncat/a.png,4\n",
            ["age"],
            r"columns \['image', 'label'\]: there is no 'age' for inputs",
        ),
        ("image,label,age,age\ncat/a.png,4,1,2\n", ["age"], "several columns 'age'; keep one"),
        ("image,label,age\ncat/a.png,4,\n", ["age"], "line 2: age is blank; fill it in"),
        ("image,label,age\ncat/a.png,4\n", ["age"], "line 2: age is blank; fill it in"),
        ("image,label,age\ncat/a.png,4,old\n", ["age"], "line 2: age is 'old': allowed are finite numbers"),
        ("image,label,age\ncat/a.png,4,nan\n", ["age"], "line 2: age is 'nan': allowed are finite numbers"),
        ("image,label,age\ncat/a.png,4,1e39\n", ["age"], "line 2: age is '1e39': allowed are finite numbers"),
        ("image,label,age\ncat/a.png,4,1\n", ["age", "age"], "allowed are names of columns, each once"),
        ("image,label,age\ncat/a.png,4,1\n", ["label"], "other than image, label and split"),
        ("image,label,age\ncat/a.png,4,1\n", "age", "inputs='age': allowed are names of columns"),
    ],
)
def test_inputs_that_are_no_numbers_are_refused(
    folder: Path, text: str, inputs: list[str], message: str
) -> None:
    (folder / "labels.csv").write_text(text)
    with pytest.raises(ValueError, match=message):
        open_dataset(folder / "labels.csv", inputs=inputs)


def test_images_of_a_batch_have_the_same_inputs(folder: Path) -> None:
    (folder / "labels.csv").write_text(TABLE)
    one, two = (open_dataset(folder / "labels.csv", inputs=each)[0] for each in (["age"], ["age", "sex"]))
    with pytest.raises(DatasetMismatch, match=r"inputs of different shapes: \[\(\(1,\),\), \(\(2,\),\)\]"):
        collate([one, two])


def test_only_tables_have_inputs(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    with pytest.raises(DatasetMismatch, match="no columns to take inputs 'age' from"):
        open_dataset(folder, inputs=["age"])
    store = tmp_path_factory.mktemp("store")
    with TileStoreWriter(store, Head("images", {})) as writer:
        writer.finish()
    with pytest.raises(DatasetMismatch, match="no columns to take inputs 'age' from"):
        open_dataset(store, inputs=["age"])


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


@pytest.mark.parametrize(("channels", "mode"), [(4, "RGBA"), (1, "L")])
def test_images_of_other_channels_are_named_at_once(folder: Path, channels: int, mode: str) -> None:
    Image.new(mode, (8, 6)).save(folder / "dog/odd.png")
    message = (
        f"{folder} mixes numbers of channels: 4 of its images have 3, such as ant/deep/a.png; others have "
        f"not: 'dog/odd.png ({channels})'; convert them, or take them out"
    )
    with pytest.raises(DatasetMismatch) as refused:
        open_dataset(folder)
    assert str(refused.value) == message
    table = folder / "labels.csv"
    table.write_text("image,label,split\ncat/a.png,0,train\ndog/odd.png,0,test\n")
    with pytest.raises(
        DatasetMismatch, match=rf"1 of its images have 3, .* 'dog/odd.png \({channels}\)'; convert"
    ):
        open_dataset(table, "train")
    write(folder / "dog/odd.png", 7)
    assert len(open_dataset(folder)) == 5


def test_a_store_of_other_channels_is_refused(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    Image.new("L", (8, 6)).save(folder / "odd.png")
    table, store = folder / "labels.csv", tmp_path_factory.mktemp("out") / "store"
    table.write_text("image,label\ncat/a.png,0\nodd.png,1\n")
    list(
        convert(
            [each for each in find_images([folder]) if each.name in ("cat/a", "odd")], store, labels=table
        )
    )
    with pytest.raises(
        DatasetMismatch, match=r"1 of its images have 3, such as cat/a; .*: 'odd \(1\)'; convert them"
    ):
        open_dataset(store)


def test_an_image_that_cannot_be_opened_is_named_at_once(folder: Path) -> None:
    whole = (folder / "dog/a.png").read_bytes()
    (folder / "dog/a.png").write_bytes(whole[:20])
    with pytest.raises(CorruptImage, match=r"dog/a\.png"):
        open_dataset(folder)
    (folder / "dog/a.png").write_bytes(b"")
    with pytest.raises(CorruptImage, match=r"dog holds 'a\.png', called like an image .*\(it is empty\)"):
        open_dataset(folder)


def test_nothing_is_no_dataset(tmp_path: Path) -> None:
    with pytest.raises(CorruptImage, match="no image is known"):
        open_dataset(tmp_path)
    with pytest.raises(
        DatasetMismatch, match=r"nothing at .*none\.csv: allowed are tile stores, CSV files and"
    ):
        open_dataset(tmp_path / "none.csv")
    with pytest.raises(
        DatasetMismatch, match=r"cannot read the table .*none\.csv: No such file.*give the path"
    ):
        [*open_table(tmp_path / "none.csv")]


def test_a_tile_store_is_known_by_its_files(tmp_path: Path) -> None:
    with TileStoreWriter(tmp_path, Head("images", {})) as writer:
        writer.finish()
    with pytest.raises(DatasetMismatch, match="has no images of split None"):
        open_dataset(tmp_path)
