"""Folders as they come: links in circles, names in other case and encodings, places on every command."""

from __future__ import annotations

import json
import os
import re
import shutil
import unicodedata
from pathlib import Path

import numpy as np
import pytest
import tifffile
import zarr
from source_contract import pixels, region, write_ome
from typer.testing import CliRunner

from streamcnn.cli.command_line import app
from streamcnn.data.convert import convert
from streamcnn.data.file_dataset import open_dataset, open_table
from streamcnn.data.image_files import find_images
from streamcnn.data.sources import open_image
from streamcnn.data.store_names import distinct_names
from streamcnn.data.tile_store import TileStore
from streamcnn.errors import CorruptImage, DatasetMismatch

NFC, NFD = (unicodedata.normalize(form, "café") for form in ("NFC", "NFD"))


def tiff(path: Path, value: int = 0) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    tifffile.imwrite(path, np.full((16, 16, 3), value, np.uint8), photometric="rgb")
    return path


def test_links_in_circles_are_passed_over(tmp_path: Path) -> None:
    for value, name in enumerate(("a/1.tif", "b/2.tif", "b/c/3.tif")):
        tiff(tmp_path / name, value)
    for link, target in (("a/up", ".."), ("b/c/top", "../.."), ("b/self", "."), ("here", ".")):
        (tmp_path / link).symlink_to(target, target_is_directory=True)
    (tmp_path / "b/notes.txt").symlink_to("nowhere")
    assert [image.relative for image in find_images([tmp_path])] == ["a/1.tif", "b/2.tif", "b/c/3.tif"]
    # A link that leads elsewhere is followed, and what is there twice by it refused.
    (tmp_path / "d").symlink_to("a", target_is_directory=True)
    with pytest.raises(DatasetMismatch, match=r"a/1\.tif and .*d/1\.tif are one image"):
        find_images([tmp_path])


@pytest.mark.parametrize("name", ["dog", "a.tif"])
def test_links_that_lead_nowhere_are_refused(tmp_path: Path, name: str) -> None:
    tiff(tmp_path / "cat/1.tif")
    for target in ("/gone/x", name):  # the second leads to itself
        (tmp_path / "cat" / name).unlink(missing_ok=True)
        (tmp_path / "cat" / name).symlink_to(target)
        message = f"cat/{name} is a link to {target}, where there is nothing: put back what was there"
        with pytest.raises(CorruptImage, match=re.escape(message)):
            find_images([tmp_path])


def test_hidden_files_and_those_of_the_system_are_no_images(tmp_path: Path) -> None:
    tiff(tmp_path / "cat/a.tif")
    for name in ("cat/._a.tif", ".trash/b.tif", "cat/.AppleDouble/a.tif", "__MACOSX/cat/a.tif"):
        tiff(tmp_path / name, 1)
    for name in (".DS_Store", "cat/Thumbs.db", "cat/desktop.ini", "cat/.directory"):
        (tmp_path / name).write_bytes(b"II*\0")
    assert [image.relative for image in find_images([tmp_path])] == ["cat/a.tif"]


def test_names_that_differ_in_case_alone_have_names_of_their_own_in_a_store() -> None:
    assert distinct_names(["A.png", "a.tif", "b.tif"]) == ["A.png", "a.tif", "b"]
    alike = distinct_names(["x/A.tif", "x/a.tif", "x/B.tif"])
    assert len({name.casefold() for name in alike}) == 3
    assert alike[2] == "x/B"
    assert all(re.fullmatch(r"x/[Aa]\.tif%\.[0-9a-f]{8}", name) for name in alike[:2])
    # One path below two folders, which is refused by that name.
    assert distinct_names(["a.tif", "a.tif"]) == ["a.tif", "a.tif"]


def test_images_whose_names_differ_in_case_are_converted_together_and_one_after_the_other(
    tmp_path: Path,
) -> None:
    upper, lower = tiff(tmp_path / "in/A.tif", 1), tiff(tmp_path / "in/a.tif", 2)
    if upper.samefile(lower):
        pytest.skip("this disk does not tell case")
    list(convert(find_images([upper]), tmp_path / "out"))
    list(convert(find_images([tmp_path / "in"]), tmp_path / "out"))
    store = TileStore(tmp_path / "out")
    names = [record.name for record in store.records]
    assert names[0] == "A"
    assert len({name.casefold() for name in names}) == len(names) == 2
    assert [int(store.source(record).read(region(0, 16, 0, 16)).max()) for record in store.records] == [1, 2]
    assert list(convert(find_images([tmp_path / "in"]), tmp_path / "out")) == []
    tiff(tmp_path / "in/B.tif")
    tiff(tmp_path / "in/b/0.tif")
    message = "images 'B' and 'b/0' cannot be in one store, as the first would be a folder of the second"
    with pytest.raises(DatasetMismatch, match=message):
        list(convert(find_images([tmp_path / "in"]), tmp_path / "out"))


def test_accents_may_be_encoded_in_either_way(tmp_path: Path) -> None:
    tiff(tmp_path / f"set/train/{NFC}/1.tif", 1)
    tiff(tmp_path / "set/train/dog/1.tif", 2)
    tiff(tmp_path / f"set/val/{NFD}/2.tif", 3)
    images = open_dataset(tmp_path / "set")
    assert images.classes == (NFC, "dog")
    assert [
        images.labels[images.names.index(name)] for name in (f"train/{NFC}/1.tif", f"val/{NFD}/2.tif")
    ] == [*(0, 0)]
    one_class = tmp_path / "one"
    tiff(one_class / f"train/{NFC}/1.tif", 1)
    tiff(one_class / f"val/{NFD}/2.tif", 2)
    assert open_dataset(one_class).classes == (NFC,)
    other = {NFC: NFD, NFD: NFC}
    for number, form in enumerate((NFC, NFD)):
        path = tiff(tmp_path / f"{number}/{form}.tif", number)
        table = path.parent / "t.csv"
        table.write_text(f"image,label\n{other[form]}.tif,0\n", encoding="utf-8")
        assert len(open_dataset(table)) == 1
        (record,) = convert(find_images([path]), path.parent / "out", labels=table)
        assert record.label == 0
    both = tmp_path / "both"
    tiff(both / f"{NFC}.tif", 1)
    if (both / f"{NFD}.tif").exists():
        return  # this disk takes them for one
    tiff(both / f"{NFD}.tif", 2)
    (both / "t.csv").write_text(f"image,label\n{NFC}.tif,0\n{NFD}.tif,1\n", encoding="utf-8")
    assert [source.read(region(0, 16, 0, 16)).max() for source, _ in open_dataset(both / "t.csv")] == [1, 2]
    records = {r.name: r.label for r in convert(find_images([both]), both / "out", labels=both / "t.csv")}
    assert records == {"caf%C3%A9": 0, "cafe%CC%81": 1}


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home folder with an image of each kind of place."""
    monkeypatch.setenv("HOME", str(tmp_path))
    for value, name in enumerate(("cat/1.tif", "dog/1.tif")):
        tiff(tmp_path / "set" / name, value)
    array = zarr.create_array(tmp_path / "a.zarr", shape=(3, 16, 16), chunks=(3, 8, 8), dtype="u1")
    array[:] = 7
    shutil.make_archive(str(tmp_path / "packed"), "zip", tmp_path / "a.zarr")
    zarr.create_group(tmp_path / "raw", zarr_format=2, attributes={"bioformats2raw.layout": 3})
    (tmp_path / "made").mkdir()
    os.rename(write_ome(tmp_path / "made", "0.4", "cyx", [pixels(3, size=(16, 16))]), tmp_path / "raw/0")
    return tmp_path


PLACES = ["~/set/cat/1.tif", "file://{home}/set/cat/1.tif", "~/a.zarr", "~/packed.zip", "file://{home}/raw"]


@pytest.mark.parametrize("place", PLACES)
def test_every_command_that_opens_images_knows_the_place(home: Path, place: str) -> None:
    place = place.format(home=home)
    for arguments in (["info", place], ["convert", place, "~/out"], ["info", "~/out"]):
        result = CliRunner().invoke(app, arguments)
        assert result.exit_code == 0, result.exception
        assert "3 x 16 x 16" in result.output
    assert (home / "out/complete.json").is_file()
    (home / "t.csv").write_text(f"image,label\n{place},0\n~/set/dog/1.tif,1\n")
    for table in ("~/t.csv", f"file://{home}/t.csv"):
        images = open_dataset(table)
        assert [images[at][0].shape for at in (0, 1)] == [(3, 16, 16)] * 2
        assert len(list(open_table(table))) == 2
    for folder in ("~/set", f"file://{home}/set"):
        assert open_dataset(folder).classes == ("cat", "dog")


def test_info_says_what_a_folder_of_images_holds(home: Path) -> None:
    result = CliRunner().invoke(app, ["info", "~/set"])
    assert result.output.splitlines() == [
        "kind     folder of images",
        "images   2",
        "endings  .tif: 2",
        "folders  cat, dog",
        "first    cat/1.tif",
    ]
    (home / "empty").mkdir()
    result = CliRunner().invoke(app, ["info", str(home / "empty")])
    none = f"no image is known at {home / 'empty'}"
    assert str(result.exception).startswith(f"{none} (an empty folder): see docs/images.md")
    (home / "empty" / "notes.txt").write_text("none")
    result = CliRunner().invoke(app, ["info", str(home / "empty")])
    assert str(result.exception).startswith(f"{none} (a folder with no image in it): see docs/images.md")


@pytest.mark.parametrize(
    ("name", "stored_as"),
    [
        ("set/cat/1.tif", "TIFF strips of 16 x 16"),
        ("a.zarr", "zarr chunks of 3 x 8 x 8"),
        ("a.npy", "an array in one piece, of which the pages under a region are read"),
    ],
)
def test_info_says_how_an_image_is_stored_and_what_reading_takes(
    home: Path, name: str, stored_as: str
) -> None:
    np.save(home / "a.npy", np.zeros((3, 16, 16), np.uint8))
    result = CliRunner().invoke(app, ["info", f"~/{name}", "--json"])
    facts = json.loads(result.output)
    assert (facts["shape"], facts["stored_as"]) == ([3, 16, 16], stored_as)
    assert (facts["pixel_bytes"], facts["held_bytes"]) == (3 * 16 * 16, 0)
    assert facts["tile_bytes"] == open_image(home / name).reading_bytes((16, 16)).transient


def test_images_elsewhere_are_refused_where_files_are_needed(home: Path) -> None:
    url = "https://me:pass-word@host/a.zarr"
    refused = (
        r"https://\.\.\.@host/a\.zarr is not on this machine: allowed are files and folders on it; download"
    )
    with pytest.raises(CorruptImage, match=refused):
        find_images([Path(url)])
    with pytest.raises(CorruptImage, match=refused):
        open_dataset(url)
    (home / "t.csv").write_text(f"image,label\n~/a.zarr,0\n{url},1\n")
    with pytest.raises(DatasetMismatch, match=rf"t\.csv, line 3: {refused}"):
        open_dataset(home / "t.csv")
