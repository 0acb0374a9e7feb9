"""The largest number that a pixel may be: kept, compared over a data set, and divided by."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile
import torch
from PIL import Image
from torch import nn

from streamcnn import StreamingModel
from streamcnn.data.augmentation import Augmentation, AugmentedSource
from streamcnn.data.convert import convert
from streamcnn.data.file_dataset import open_dataset
from streamcnn.data.image_files import find_images
from streamcnn.data.normalisation import Normalise
from streamcnn.data.reader import BatchReader
from streamcnn.data.sources import (
    ArraySource,
    ImageSource,
    PictureSource,
    TensorSource,
    TiffSource,
    open_image,
)
from streamcnn.data.thumbnails import shrunk
from streamcnn.data.tile_store import TileStore
from streamcnn.data.tile_store.format import parse_record
from streamcnn.errors import CorruptImage, DatasetMismatch
from streamcnn.geometry.regions import Region

CPU = torch.device("cpu")
SIZE = (20, 30)
TWELVE = np.random.default_rng(0).integers(0, 4096, SIZE).astype("u2")
BITS = np.random.default_rng(1).integers(0, 2, SIZE).astype(bool)


def whole(source: ImageSource) -> torch.Tensor:
    return source.read(Region.whole(source.shape[1:]))


def write_12_bit(path: Path) -> Path:
    """A TIFF that says that it uses 12 of 16 bits."""
    path.parent.mkdir(parents=True, exist_ok=True)
    tag = (281, "H", 1, 4095, True)
    tifffile.imwrite(path, TWELVE, photometric="minisblack", extratags=[tag])
    return path


def write_pgm(path: Path, maxval: int) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    content = (TWELVE % (maxval + 1)).astype(">u2" if maxval > 255 else "u1").tobytes()
    path.write_bytes(f"P5 {SIZE[1]} {SIZE[0]} {maxval}\n".encode() + content)
    return path


def write_bits(path: Path, **options: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    tifffile.imwrite(path, BITS, photometric="minisblack", **options)
    return path


def test_normalise_divides_by_what_the_image_says(tmp_path: Path) -> None:
    for path in (write_12_bit(tmp_path / "a.tif"), write_pgm(tmp_path / "a.pgm", 4095)):
        source = open_image(path)
        reader = BatchReader(source, CPU, Normalise())
        expected = (torch.from_numpy(TWELVE.astype("f4"))[None, None] - 2047.5) / 2047.5
        torch.testing.assert_close(reader.read(Region.whole(SIZE)), expected)
        by_type = BatchReader(source, CPU, Normalise(divisor="type"))
        expected = (torch.from_numpy(TWELVE.astype("f4"))[None, None] - 32767.5) / 32767.5
        torch.testing.assert_close(by_type.read(Region.whole(SIZE)), expected)
    with pytest.raises(ValueError, match="divisor='most': allowed are range and type"):
        Normalise(divisor="most")


def test_complex_pixels_are_refused_by_name(tmp_path: Path) -> None:
    np.save(tmp_path / "radar.npy", np.zeros((3, 40, 30), np.complex64))
    model = StreamingModel(nn.Conv2d(3, 1, 1), preprocess=Normalise())
    with pytest.raises(
        DatasetMismatch, match="pixels of type complex64: allowed are integers, floats and bool"
    ):
        model.plan([open_image(tmp_path / "radar.npy")])


@pytest.mark.parametrize("write", [write_bits, write_12_bit, lambda path: write_pgm(path, 100)])
@pytest.mark.parametrize("invert", [False, True])
@pytest.mark.parametrize("gain", [0.5, 1.0, 1.7])
def test_intensities_change_within_the_range(
    tmp_path: Path, write: Callable[[Path], Path], invert: bool, gain: float
) -> None:
    source = open_image(write(tmp_path / "a"))
    assert source.largest is not None
    changed = whole(AugmentedSource(source, Augmentation(invert=invert, gain=gain)))
    stored = whole(source).numpy().astype("f8")
    wanted = source.largest - stored if invert else stored
    middle = source.largest / 2
    wanted = ((wanted - middle) * gain + middle).round().clip(0, source.largest)
    np.testing.assert_array_equal(changed.numpy().astype("f8"), wanted)
    assert changed.dtype == source.dtype


def test_bits_are_images_everywhere(tmp_path: Path) -> None:
    """One bit of a TIFF, and arrays of bool: read, divided, augmented, drawn, converted."""
    np.save(tmp_path / "a.npy", BITS)
    for source in (
        TiffSource(write_bits(tmp_path / "a.tif")),
        ArraySource(tmp_path / "a.npy"),
        TensorSource(torch.from_numpy(BITS)[None]),
    ):
        assert (source.dtype, source.largest) == (torch.bool, 1)
        reader = BatchReader(source, CPU, Normalise())
        assert torch.equal(reader.read(Region.whole(SIZE))[0, 0], torch.from_numpy(BITS * 2.0 - 1).float())
        np.testing.assert_array_equal(shrunk(source, 1)[..., 0], BITS * np.uint8(255))
    (record,) = convert(find_images([tmp_path / "a.tif"]), tmp_path / "store")
    assert (record.dtype, record.largest) == ("bool", None)
    stored = TileStore(tmp_path / "store").source(record)
    assert (stored.largest, torch.equal(whole(stored)[0], torch.from_numpy(BITS))) == (1, True)


def test_a_picture_of_the_image_is_as_bright_as_its_range(tmp_path: Path) -> None:
    source = PictureSource(write_pgm(tmp_path / "a.pgm", 4095))
    expected = (TWELVE.astype("f4") * np.float32(255 / 4095)).round()
    np.testing.assert_array_equal(shrunk(source, 1)[..., 0], expected)


def test_viewers_are_told_the_range(tmp_path: Path) -> None:
    write_pgm(tmp_path / "in/a.pgm", 100)
    list(convert(find_images([tmp_path / "in"]), tmp_path / "store"))
    attributes = json.loads((tmp_path / "store/images/a/zarr.json").read_text())["attributes"]
    (channel,) = attributes["ome"]["omero"]["channels"]
    assert channel["window"] == {"min": 0, "max": 100, "start": 0, "end": 100}


def test_a_tile_store_keeps_the_range(tmp_path: Path) -> None:
    write_pgm(tmp_path / "in/a.pgm", 4095)
    (record,) = convert(find_images([tmp_path / "in"]), tmp_path / "store")
    assert (record.dtype, record.largest) == ("uint16", 4095)
    store = TileStore(tmp_path / "store")
    assert store.records == (record,)
    source = store.source(record)
    assert source.largest == 4095
    np.testing.assert_array_equal(whole(source)[0].numpy(), TWELVE)
    # A record from before there was a range has none, and is that of the type.
    line = json.loads(record.to_json())
    del line["largest"]
    old = parse_record(json.dumps(line), tmp_path / "manifest")
    assert old == replace(record, largest=None)
    assert store.source(old).largest == 65535


@pytest.mark.parametrize(
    ("dtype", "largest"), [("uint16", 0), ("uint16", 65535), ("uint8", 256), ("float32", 1), ("bool", 1)]
)
def test_a_range_that_no_type_has_is_no_record(tmp_path: Path, dtype: str, largest: int) -> None:
    write_pgm(tmp_path / "in/a.pgm", 4095)
    (record,) = convert(find_images([tmp_path / "in"]), tmp_path / "store")
    line = {**json.loads(record.to_json()), "dtype": dtype, "largest": largest}
    with pytest.raises(
        CorruptImage, match=rf"largest={largest}: allowed are 1 and more, below the largest {dtype}"
    ):
        parse_record(json.dumps(line), tmp_path / "manifest")


def save(path: Path, image: np.ndarray[Any, Any]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(image).save(path)
    return path


@pytest.mark.parametrize(
    ("write_odd", "values"),
    [
        (lambda path: write_12_bit(path.with_suffix(".tif")), "uint16 up to 4095"),
        (lambda path: write_pgm(path.with_suffix(".pgm"), 1000), "uint16 up to 1000"),
        (lambda path: write_pgm(path.with_suffix(".pgm"), 100), "uint8 up to 100"),
        (lambda path: save(path.with_suffix(".png"), BITS), "uint8 up to 1"),
        (lambda path: write_bits(path.with_suffix(".tif")), "bool up to 1"),
        (lambda path: np.save(path.with_suffix(".npy"), TWELVE.astype("f4")), "float32"),
    ],
)
def test_ranges_are_compared_over_the_whole_data_set(
    tmp_path: Path, write_odd: Callable[[Path], Any], values: str
) -> None:
    for name in ("cat/a", "cat/b", "dog/a"):
        save(tmp_path / f"in/train/{name}.png", (TWELVE // 16).astype("u1"))
    assert len(open_dataset(tmp_path / "in", "train")) == 3
    (tmp_path / "in/val/dog").mkdir(parents=True)
    write_odd(tmp_path / "in/val/dog/odd")
    (odd,) = (tmp_path / "in/val/dog").iterdir()
    message = (
        f"{tmp_path / 'in'} mixes ranges of values: train/cat/a.png holds uint8 up to 255, "
        f"val/dog/{odd.name} holds {values} (1 of 4 images differ from most): allowed are one type and one "
        "range in a data set; write all images in one, or take some out"
    )
    with pytest.raises(DatasetMismatch) as refused:
        open_dataset(tmp_path / "in", "train")
    assert str(refused.value) == message
    table = tmp_path / "labels.csv"
    table.write_text(f"image,label\nin/train/cat/a.png,0\n{odd.relative_to(tmp_path)},1\n")
    with pytest.raises(
        DatasetMismatch, match=re.escape(f"holds uint8 up to 255, {odd.relative_to(tmp_path)}")
    ):
        open_dataset(table)
    list(convert(find_images([tmp_path / "in"]), tmp_path / "store"))
    with pytest.raises(DatasetMismatch, match=re.escape(f"holds {values} (1 of 4 images differ")):
        open_dataset(tmp_path / "store", "train")


def test_a_model_sees_one_range_however_the_pixels_are_stored(tmp_path: Path) -> None:
    """Of one picture in 8 bits and in 12 of 16, as far as 8 bits go."""
    level = np.full(SIZE, 51, "u1")
    save(tmp_path / "a.png", level)
    (tmp_path / "a.pgm").write_bytes(b"P5 30 20 4095\n" + np.full(SIZE, 819, ">u2").tobytes())
    model = StreamingModel(torch.nn.Conv2d(1, 1, 3), tile=16, preprocess=Normalise())
    one, other = (model(open_image(tmp_path / name)) for name in ("a.png", "a.pgm"))
    torch.testing.assert_close(one, other)
