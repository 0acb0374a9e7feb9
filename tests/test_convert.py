"""Images of other formats written into a tile store, with labels from a table."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import tifffile
import torch
import zarr
from numpy.typing import NDArray

from streamcnn import CorruptImage, DatasetMismatch
from streamcnn.data.convert import convert
from streamcnn.data.image_files import FoundImage, find_images
from streamcnn.data.sources import write_zarr_image
from streamcnn.data.tile_store import Head, TileStore, TileStoreWriter
from streamcnn.geometry.regions import Region


def pixels(seed: int, channels: int = 3) -> NDArray[np.uint8]:
    return np.random.default_rng(seed).integers(0, 256, (40, 30, channels), np.uint8)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Three images of three formats, one in a folder of its own."""
    (tmp_path / "in/deep").mkdir(parents=True)
    tifffile.imwrite(tmp_path / "in/one.tif", pixels(1), photometric="rgb", tile=(16, 16))
    np.save(tmp_path / "in/deep/two three.npy", pixels(2))
    write_zarr_image(tmp_path / "in/zä.zarr", torch.from_numpy(pixels(3).transpose(2, 0, 1).copy()))
    (tmp_path / "in/notes.txt").write_text("no image")
    return tmp_path / "in"


def table(folder: Path, text: str) -> Path:
    path = folder.parent / "labels.csv"
    path.write_text(textwrap.dedent(text).lstrip())
    return path


def test_every_image_below_a_folder_is_found(folder: Path) -> None:
    assert find_images([folder]) == [
        FoundImage("deep/two three", folder / "deep/two three.npy", "deep/two three.npy"),
        FoundImage("one", folder / "one.tif", "one.tif"),
        FoundImage("z%C3%A4", folder / "zä.zarr", "zä.zarr"),
    ]
    assert find_images([folder / "one.tif"]) == [FoundImage("one", folder / "one.tif", "one.tif")]


def test_what_is_no_image_is_named(folder: Path) -> None:
    with pytest.raises(CorruptImage, match=r"there is nothing at .*gone"):
        find_images([folder / "gone"])
    with pytest.raises(CorruptImage, match=r"no image is known at .*notes\.txt"):
        find_images([folder / "notes.txt"])
    np.save(folder / "one.npy", pixels(4))
    np.save(folder / "deep/one.npy", pixels(5))
    with pytest.raises(
        DatasetMismatch, match=r"one\.npy and .*one\.npy would both be 'one\.npy' in the store"
    ):
        find_images([folder / "one.npy", folder / "deep"])


def test_images_are_written_with_their_labels(folder: Path, tmp_path: Path) -> None:
    labels = table(
        folder,
        """
        image,label,split
        one.tif,cat,train
        deep/two three,dog,test
        zä.zarr,cat,
        """,
    )
    told: list[tuple[int, int]] = []
    records = list(
        convert(find_images([folder]), tmp_path / "out", labels=labels, on_shard=lambda *p: told.append(p))
    )
    store = TileStore(tmp_path / "out")
    assert store.records == tuple(records)
    assert [(r.name, r.split, r.label) for r in records] == [
        ("deep/two three", "test", 1),
        ("one", "train", 0),
        ("z%C3%A4", "train", 0),
    ]
    assert store.head.classes == ("cat", "dog")
    assert told == [(1200, 1200)] * 3
    for record, seed in zip(records, (2, 1, 3), strict=True):
        found = store.source(record).read(Region.whole((40, 30)))
        assert np.array_equal(found.numpy(), pixels(seed).transpose(2, 0, 1))


def test_images_are_added_and_finished_ones_left_alone(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    first = table(folder, "image,label\none,cat\n")
    assert len(list(convert(find_images([folder / "one.tif"]), out, labels=first))) == 1
    second = table(folder, "image,label\none,cat\ntwo three.npy,ape\n")
    both = find_images([folder / "one.tif", folder / "deep"])
    assert [r.name for r in convert(both, out, labels=second)] == ["two three"]
    store = TileStore(out)
    assert [(r.name, r.label) for r in store.records] == [("one", 0), ("two three", 1)]
    assert store.head.classes == ("cat", "ape")
    assert list(convert(both, out)) == []


def test_labels_may_be_numbers_or_missing(folder: Path, tmp_path: Path) -> None:
    (record,) = convert(
        find_images([folder / "one.tif"]), tmp_path / "a", labels=table(folder, "image,label\none,17\n")
    )
    assert record.label == 17
    (record,) = convert(find_images([folder / "one.tif"]), tmp_path / "b", split="rest")
    assert (record.label, record.split) == (None, "rest")
    with pytest.raises(DatasetMismatch, match="labels 'cat' are names, those in the store are numbers"):
        list(
            convert(
                find_images([folder / "deep"]),
                tmp_path / "a",
                labels=table(folder, "image,label\ntwo three,cat\n"),
            )
        )


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("image;label\none;1\n", r"has the columns \['image;label'\]: needed are image and label"),
        ("image,label\none,1\nfour,2\n", "rows without an image: 'four'.*; give all images that it names"),
        ("image,label\none\n", "line 2: label is blank"),
        ("image,label\n,1\n", "line 2: image is blank"),
        ("image,label\none,1\none.tif,2\n", "line 3: 'one.tif' has a row already"),
        ("image,label\none,1\ntwo three,-1\nzä,1.5\n", "labels '-1', '1.5' are no whole numbers"),
        ("image,label\ndeep/two three,1\n", r"images without a row: '.*one\.tif', '.*zä\.zarr'"),
    ],
)
def test_a_table_that_does_not_fit_is_refused_at_once(
    folder: Path, tmp_path: Path, text: str, message: str
) -> None:
    with pytest.raises(DatasetMismatch, match=message):
        list(convert(find_images([folder]), tmp_path / "out", labels=table(folder, text)))
    assert not list((tmp_path / "out").glob("images/*"))


def test_a_name_that_two_files_have_needs_its_path(folder: Path, tmp_path: Path) -> None:
    (folder / "kä").mkdir()
    np.save(folder / "kä/one.npy", pixels(5))
    np.save(folder / "kä/two three.npy", pixels(6))
    images = find_images([folder])
    assert [image.name for image in images] == [
        "deep/two three",
        "k%C3%A4/one",
        "k%C3%A4/two three",
        "one",
        "z%C3%A4",
    ]
    with pytest.raises(
        DatasetMismatch, match="line 2: 'two three' may be 'deep/two three', 'k%C3%A4/two three'"
    ):
        list(convert(images, tmp_path / "out", labels=table(folder, "image,label\ntwo three,1\n")))
    # As Excel writes it.
    text = "\ufeffimage,label\none,1\nkä/one,2\ndeep/two three.npy,3\nzä,4\nkä/two three,5\n"
    records = convert(images, tmp_path / "out", labels=table(folder, text))
    assert {record.name: record.label for record in records} == {
        "one": 1,
        "k%C3%A4/one": 2,
        "deep/two three": 3,
        "z%C3%A4": 4,
        "k%C3%A4/two three": 5,
    }


def test_a_store_does_not_convert_itself(folder: Path) -> None:
    assert len(list(convert(find_images([folder]), folder / "store"))) == 3
    assert list(convert(find_images([folder]), folder / "store")) == []
    with pytest.raises(DatasetMismatch, match="is a tile store already"):
        find_images([folder / "store"])


def test_an_image_is_no_folder_of_others(folder: Path, tmp_path: Path) -> None:
    np.save(folder / "deep.npy", pixels(4))
    with pytest.raises(DatasetMismatch, match="'deep' and 'deep/two three' cannot be in one store"):
        find_images([folder])
    list(convert(find_images([folder / "one.tif"]), tmp_path / "out"))
    (tmp_path / "more/one").mkdir(parents=True)
    np.save(tmp_path / "more/one/x.npy", pixels(4))
    with pytest.raises(DatasetMismatch, match="'one' and 'one/x' cannot be in one store"):
        list(convert(find_images([tmp_path / "more"]), tmp_path / "out"))
    assert all(error is None for _, error in TileStore(tmp_path / "out").verify())


def test_labels_are_given_later_and_corrected(folder: Path, tmp_path: Path) -> None:
    images, out = find_images([folder / "one.tif", folder / "deep"]), tmp_path / "out"
    list(convert(images, out))
    shard = next((out / "images/one").rglob("0/c/*/*/*"))
    written = shard.stat().st_mtime_ns
    first = table(folder, "image,label,split\none,dog,test\ntwo three,cat,\n")
    assert {r.name: (r.label, r.split) for r in convert(images, out, labels=first)} == {
        "one": (1, "test"),
        "two three": (0, "train"),
    }
    second = table(folder, "image,label\none,cat\ntwo three,cat\n")
    assert [(r.name, r.label) for r in convert(images, out, labels=second)] == [("one", 0)]
    assert {r.name: r.label for r in TileStore(out).records} == {"one": 0, "two three": 0}
    assert shard.stat().st_mtime_ns == written


def test_a_split_that_is_given_holds_for_images_that_are_there(folder: Path, tmp_path: Path) -> None:
    images, out = find_images([folder / "one.tif", folder / "deep"]), tmp_path / "out"
    rows = table(folder, "image,label,split\none,dog,val\ntwo three,cat,\n")
    list(convert(images, out, labels=rows))
    assert [(r.name, r.split) for r in convert(images[:1], out, split="test")] == [("one", "test")]
    assert list(convert(images, out)) == []
    assert [(r.name, r.split) for r in convert(images, out, labels=rows, split="test")] == [
        ("one", "val"),
        ("two three", "test"),
    ]
    assert {r.name: (r.label, r.split) for r in TileStore(out).records} == {
        "one": (1, "val"),
        "two three": (0, "test"),
    }


def test_complex_numbers_are_refused_before_anything_is_written(folder: Path, tmp_path: Path) -> None:
    np.save(tmp_path / "radar.npy", np.zeros((3, 40, 30), np.complex64))
    with pytest.raises(DatasetMismatch, match=r"radar\.npy has pixels of type complex64: allowed in a tile"):
        list(convert(find_images([tmp_path / "radar.npy"]), tmp_path / "out"))
    assert list((tmp_path / "out" / "images").rglob("*")) == []


def test_classes_keep_their_numbers_through_interruptions(folder: Path, tmp_path: Path) -> None:
    images, out = find_images([folder]), tmp_path / "out"
    tables = (
        ("cat",) * 3,
        ("cat", "dog", "dog"),
        ("cat", "dog", "ape"),
    )
    for count, names in enumerate(tables, start=1):
        rows = "".join(f"{image.relative},{name}\n" for image, name in zip(images, names, strict=True))
        run = convert(images, out, labels=table(folder, f"image,label\n{rows}"))
        for _ in range(1 if count < 3 else 3):
            if next(run, None) is None:
                break
        run.close()  # stopped; the last one at its end
    list(convert(images, out, labels=table(folder, f"image,label\n{rows}")))
    store = TileStore(out)
    assert store.head.classes is not None
    assert [store.head.classes[r.label or 0] for r in store.records] == ["cat", "dog", "ape"]


def test_another_image_of_a_name_is_refused(folder: Path, tmp_path: Path) -> None:
    list(convert(find_images([folder / "one.tif"]), tmp_path / "out"))
    tifffile.imwrite(tmp_path / "one.tif", pixels(9), photometric="rgb")
    with pytest.raises(
        DatasetMismatch, match=r"has an image 'one' already, level 0 of .*in/one\.tif; level 0"
    ):
        list(convert(find_images([tmp_path / "one.tif"]), tmp_path / "out"))


def stored(out: Path, name: str) -> NDArray[np.uint8]:
    store = TileStore(out)
    (record,) = (record for record in store.records if record.name == name)
    return store.source(record).read(Region.whole((40, 30))).numpy().transpose(1, 2, 0)


@pytest.mark.parametrize("name", ["one.tif", "zä.zarr", "deep/two three.npy"])
def test_an_image_that_was_changed_is_written_again(folder: Path, tmp_path: Path, name: str) -> None:
    out = tmp_path / "out"
    rows = table(folder, "image,label,split\none,cat,test\ntwo three,dog,test\nzä,cat,test\n")
    list(convert(find_images([folder]), out, labels=rows))
    new, path = pixels(9), folder / name
    if name.endswith(".tif"):
        tifffile.imwrite(path, new, photometric="rgb", tile=(16, 16))
    elif name.endswith(".npy"):
        np.save(path, new)
    else:
        zarr.open_array(path, mode="r+")[:] = new.transpose(2, 0, 1)
    before = {record.name: record for record in TileStore(out).records}
    (record,) = convert(find_images([folder]), out)
    assert (record.label, record.split) == (before[record.name].label, "test")
    assert np.array_equal(stored(out, record.name), new)
    assert all(error is None for _, error in TileStore(out).verify())
    assert list(convert(find_images([folder]), out)) == []


def test_an_image_that_changes_while_it_is_read_is_not_taken(folder: Path, tmp_path: Path) -> None:
    out, path = tmp_path / "out", folder / "zä.zarr"
    list(convert(find_images([path]), out))
    zarr.open_array(path, mode="r+")[:] = 1

    def change(*_: int) -> None:
        zarr.open_array(path, mode="r+")[:] = 2

    with pytest.raises(CorruptImage, match=r"zä\.zarr was changed while it was read: convert it again"):
        list(convert(find_images([path]), out, on_shard=change))
    assert np.array_equal(stored(out, "z%C3%A4"), pixels(3))
    assert len(list(convert(find_images([path]), out))) == 1
    assert (stored(out, "z%C3%A4") == 2).all()


def test_an_image_that_was_being_replaced_is_written_again(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, path = tmp_path / "out", folder / "one.tif"
    list(convert(find_images([path]), out))
    content, times = path.read_bytes(), path.stat()
    tifffile.imwrite(path, pixels(9), photometric="rgb")
    kept = TileStoreWriter.add
    monkeypatch.setattr(
        TileStoreWriter, "add", lambda self, r: kept(self, r) if not r.origin["fingerprint"] else 1 / 0
    )
    with pytest.raises(ZeroDivisionError):
        list(convert(find_images([path]), out))
    monkeypatch.undo()
    path.write_bytes(content)  # as it was, so that nothing but the journal tells
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert len(list(convert(find_images([path]), out))) == 1
    assert np.array_equal(stored(out, "one"), pixels(1))


def test_stores_of_before_are_gone_on_with(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    np.save(folder / "ä.npy", pixels(4))
    (image,) = find_images([folder / "ä.npy"])
    (record,) = convert([replace(image, name="_")], out)
    found = image.path.stat()
    origin = {"path": str(image.path.resolve()), "level": 0}
    with TileStoreWriter(out, Head("images", {})) as writer:
        times = {"nbytes": found.st_size, "modified": found.st_mtime_ns}
        writer.add(replace(record, origin={**origin, **times}))
        writer.finish()
    assert list(convert([image], out)) == []
    assert np.array_equal(stored(out, "_"), pixels(4))
    os.utime(image.path, ns=(1, 1))
    assert [r.name for r in convert([image], out)] == ["_"]


def test_names_in_a_store_are_never_shared(tmp_path: Path) -> None:
    files = [
        "图像一.png",
        "图像二.png",
        "a+b.png",
        "a=b.png",
        "a%2Bb.png",
        "img1.png",
        "img1.jpg",
        "x" * 240 + ".png",
    ]
    for value, name in enumerate(files):
        (tmp_path / "in").mkdir(exist_ok=True)
        np.save(tmp_path / "x.npy", np.full((40, 30, 3), value, np.uint8))
        (tmp_path / "x.npy").rename(tmp_path / "in" / name)
    images = {image.relative: image.name for image in find_images([tmp_path / "in"])}
    assert images["图像一.png"] == "%E5%9B%BE%E5%83%8F%E4%B8%80"
    assert images["图像二.png"] == "%E5%9B%BE%E5%83%8F%E4%BA%8C"
    assert [images[name] for name in files[2:7]] == ["a%2Bb", "a%3Db", "a%252Bb", "img1.png", "img1.jpg"]
    assert len(images[files[-1]]) == 174
    list(convert(find_images([tmp_path / "in"]), tmp_path / "out"))
    assert all((stored(tmp_path / "out", images[name]) == value).all() for value, name in enumerate(files))
    # One after the other, too.
    for name in ("img1.png", "img1.jpg"):
        list(convert(find_images([tmp_path / "in" / name]), tmp_path / "more"))
    assert [record.name for record in TileStore(tmp_path / "more").records] == ["img1", "img1.jpg"]


def test_a_damaged_image_leaves_the_finished_ones(folder: Path, tmp_path: Path) -> None:
    content = (folder / "one.tif").read_bytes()
    (folder / "one.tif").write_bytes(content[: len(content) // 2])
    with pytest.raises(CorruptImage, match=r"one\.tif"):
        list(convert(find_images([folder]), tmp_path / "out"))
    (folder / "one.tif").write_bytes(content)
    assert [r.name for r in convert(find_images([folder]), tmp_path / "out")] == ["one", "z%C3%A4"]


LARGE = """
    import resource, sys
    from pathlib import Path
    import numpy as np, tifffile, torch
    from torch import nn
    from streamcnn import StreamingModel
    from streamcnn.ceiling.cpu import DataLimit
    from streamcnn.data.convert import convert
    from streamcnn.data.image_files import find_images
    from streamcnn.data.tile_store import TileStore

    folder = Path(sys.argv[1])
    EDGE = 20_000

    def tiles():
        for row in range(0, EDGE, 512):
            for col in range(0, EDGE, 512):
                yield np.full((512, 512, 3), (row // 512 * 7 + col // 512) % 251, np.uint8)

    tifffile.imwrite(
        folder / "large.tif", tiles(), shape=(EDGE, EDGE, 3), dtype=np.uint8, tile=(512, 512),
        photometric="rgb", compression="zlib", bigtiff=True,
    )
    torch.set_num_threads(1)
    net = nn.Sequential(nn.Conv2d(3, 4, 3, stride=4), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    model = StreamingModel(net, tile=1024, preprocess=lambda tile: tile / 255)
    model.plan((1, 3, EDGE, EDGE))
    with DataLimit(None) as converting:
        (record,) = convert(find_images([folder / "large.tif"]), folder / "out")
    assert record.shape == (3, EDGE, EDGE)
    with DataLimit(None) as streaming:
        source = TileStore(folder / "out").source(record)
        model(source).sum().backward()
    print(converting.peak_bytes, streaming.peak_bytes, source.bytes_read)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="the peak is read from /proc")
def test_a_large_tiff_is_converted_and_streamed_in_little_memory(tmp_path: Path) -> None:
    run = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(LARGE), str(tmp_path)], capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr
    converting, streaming, read = map(int, run.stdout.split())
    assert converting < 300e6
    assert streaming < 300e6
    # Forward and backward; the convolution passes over a pixel between tiles, so not quite twice.
    assert read > 1.99 * 3 * 20_000**2
