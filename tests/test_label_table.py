"""Tables of labels as programs and people write them: read right, or refused with the line."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from streamcnn import DatasetMismatch
from streamcnn.data.convert import convert
from streamcnn.data.file_dataset import open_dataset, open_table
from streamcnn.data.image_files import find_images
from streamcnn.data.label_table import class_names, read_rows


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in ("a.png", "b.png", "sub/c.png"):
        (tmp_path / "in" / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.zeros((6, 8, 3), np.uint8)).save(tmp_path / "in" / name)
    return tmp_path / "in"


def table(folder: Path, text: str | bytes) -> Path:
    path = folder / "labels.csv"
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return path


@pytest.mark.parametrize(
    "text",
    [
        "image,label\na.png,0.0\nb.png,1.0\nsub/c.png,1\n",  # pandas
        "image, label\na.png, 0\nb.png, 1\nsub/c.png, 1\n",
        'image, label\n"a.png", "0"\n"b.png", "1"\n"sub/c.png", "1"\n',
        "\ufeffimage,label\r\na.png,0\r\nb.png,1\r\nsub/c.png,1\r\n,\r\n",  # Excel
        "Image,LABEL,Split\na.png,0,Train\nb.png,01,training\nsub\\c.png,1.,\n",
        "label,note,image\n0,,./a.png\n1,x,sub/../b.png\n1,y,.\\sub\\c.png\n",
    ],
)
def test_tables_are_read_however_they_were_written(folder: Path, tmp_path: Path, text: str) -> None:
    images = open_dataset(table(folder, text), "train")
    assert (images.classes, images.labels) == (None, (0, 1, 1))
    records = list(convert(find_images([folder]), tmp_path / "out", labels=folder / "labels.csv"))
    assert [(r.name, r.label, r.split) for r in records] == [
        ("a", 0, "train"),
        ("b", 1, "train"),
        ("sub/c", 1, "train"),
    ]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("image,label\na.png,0\nb.png,\n", "line 3: label is blank; fill it in"),
        *(
            (
                f"image,label\na.png,0\nb.png,{none}\n",
                f"line 3: label is '{none}', which stands for a missing",
            )
            for none in ("nan", "NaN", "<NA>", "NULL", "n/a")
        ),
        ("image,label,split\na.png,0,nan\n", "line 2: split is 'nan', which stands for a missing one"),
        (
            "image,label\na.png,1.0\nb.png,cat\n",
            "line 3: label 'cat' is a name, label '1.0' in line 2 a number: give whole numbers from 0 on, or",
        ),
        ("image,label\na.png,0\nb.png,0.5\n", "'0.5' are no whole numbers from 0 on"),
        ("image,label\na.png,0\nb.png,0.5\n", "labels.csv, line 3)"),
        ("image,label\na.png,1e0\nb.png,0\n", "line 2: label '1e0' is a name, label '0' in line 3 a number"),
        (
            "image,label\na.png,Cat\nb.png,dog\nsub/c.png,cat\n",
            "lines 2 and 4: labels 'Cat' and 'cat' differ in nothing but case or blanks; write them alike",
        ),
        ("image,label\na.png,big cat\nb.png,big  cat\n", "lines 2 and 3: labels 'big cat' and 'big  cat'"),
        ("image,label\na.png,0\nb.png,1\na.png,0\n", "'a.png' in several rows (lines 2, 4); keep one"),
        (
            "image,label\nsub/c.png,0\nsub/../sub/c.png,1\n",
            "line 3: 'sub/../sub/c.png' is the same image as line 2, 'sub/c.png'; keep one row of each",
        ),
        ("image,label\nsub/c.png,0\nsub\\c.png,1\n", "line 3: 'sub\\\\c.png' is the same image as line 2"),
        ("image,label\na.png,0\nA.png,1\n", "A.png', where there is no image (line 3): give paths"),
        ("image,label\na.png,0\nC:\\x\\b.png,1\n", "b.png', where there is no image (line 3): give paths"),
        ("image,label\na,b.png,1\n", "line 2 has 3 cells for 2 columns: put a text with a comma in it into"),
        ("image,label,Label\na.png,0,1\n", "has several columns 'label', 'Label'; keep one of each"),
        ("image,label,label\na.png,0,1\n", "has several columns 'label', 'label'; keep one of each"),
        ("image;label\na.png;0\n", "columns are separated by ';': save it with commas"),
        ("image\tlabel\na.png\t0\n", "columns are separated by tabs: save it with commas"),
        ("", "has the columns []: needed are image and label"),
        (
            "image,Mask\na,b\n",
            "its column mask is for the task segmentation, as of `train --task segmentation`",
        ),
        (
            "image,label,subset\na.png,0,Train\nb.png,1,test\n",
            "has no column split, and its column 'subset' holds 'Train', 'test': call it split, or take",
        ),
    ],
)
def test_what_cannot_be_right_is_refused(folder: Path, text: str, message: str) -> None:
    with pytest.raises(DatasetMismatch, match=re.escape(message)):
        open_dataset(table(folder, text))


@pytest.mark.parametrize("encoding", ["utf-16", "latin-1"])
def test_other_encodings_are_refused(folder: Path, encoding: str) -> None:
    with pytest.raises(DatasetMismatch, match="save it as CSV in UTF-8"):
        open_dataset(table(folder, "image,label\nä.png,0\n".encode(encoding)))


def test_one_image_has_one_row_in_a_store(folder: Path, tmp_path: Path) -> None:
    rows = table(folder, "image,label\na.png,0\nb.png,1\nsub/c.png,0\nsub/../sub/c.png,1\n")
    with pytest.raises(DatasetMismatch, match=r"line 5: 'sub/../sub/c\.png' has a row already"):
        list(convert(find_images([folder]), tmp_path / "out", labels=rows))


def test_without_labels_none_is_looked_at(folder: Path) -> None:
    rows = table(folder, "image,label,age\na.png,nan,1\nb.png,,2\n")
    assert [inputs.tolist() for _, _, inputs in open_table(rows, ["age"])] == [[1.0], [2.0]]


def test_splits_are_one_in_each_spelling(folder: Path) -> None:
    rows = read_rows(table(folder, "image,label,split\na.png,0,Valid\nb.png,0,dev\nsub/c.png,0,fold1\n"))
    assert [row.split for row in rows] == ["val", "val", "fold1"]
    assert len(open_dataset(folder / "labels.csv", "validation")) == 2


def test_classes_are_told_apart() -> None:
    assert class_names(["a", "A", "b"]) == ("A", "a", "b")
    assert class_names(["2", "0"]) is None
    with pytest.raises(DatasetMismatch, match="labels 'Cat' and 'cat' differ in nothing but case"):
        class_names(["cat"], ("Cat",))
    with pytest.raises(DatasetMismatch, match="labels '01', '1' are not as many numbers"):
        class_names(["1", "01"])
    with pytest.raises(DatasetMismatch, match="labels '0' are numbers, those in the store are names"):
        class_names(["cat", "0"], ("cat",))


def test_folders_that_differ_in_case_are_refused(folder: Path) -> None:
    for name in ("train/Cat", "val/cat"):
        (folder / "all" / name).mkdir(parents=True)
    (folder / "a.png").rename(folder / "all/train/Cat/a.png")
    (folder / "b.png").rename(folder / "all/val/cat/b.png")
    with pytest.raises(DatasetMismatch, match="classes 'Cat' in train, and none of them in val"):
        open_dataset(folder / "all")
    (folder / "all/train/dog").mkdir()
    (folder / "all/val/dog").mkdir()
    for value, place in enumerate(("train", "val")):
        Image.fromarray(np.full((6, 8, 3), value, np.uint8)).save(folder / "all" / place / "dog/a.png")
    with pytest.raises(DatasetMismatch, match="labels 'Cat' and 'cat' differ in nothing but case or blanks"):
        open_dataset(folder / "all")


def test_a_header_of_any_length_is_shown_in_part(tmp_path: Path) -> None:
    (tmp_path / "labels.csv").write_text("x" * 9000 + "\n")
    with pytest.raises(DatasetMismatch, match=r"labels\.csv has the columns \['x{498}…: needed are image"):
        read_rows(tmp_path / "labels.csv")
