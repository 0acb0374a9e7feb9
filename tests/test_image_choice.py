"""Series, level and place of the channels: one choice, for every way that images are read."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile
import zarr
from PIL import Image
from source_contract import channels_last, pixels, region, write_ome, write_pyramid

from streamcnn.data.convert import convert
from streamcnn.data.file_dataset import FileDataset, open_dataset, open_table
from streamcnn.data.image_files import find_images
from streamcnn.data.sources import ArraySource, ImageChoice, ZarrSource, open_chosen, open_image
from streamcnn.data.tile_store import ImageRecord, TileStore
from streamcnn.errors import DatasetMismatch

Run = Callable[..., tuple[int, str, str]]

LARGE = pixels(3, size=(150, 202))
SMALL = LARGE[:, ::2, ::2].copy()
OTHER = pixels(3, size=(60, 80))


def write_two_series(path: Path, turned: bool = False) -> None:
    """A TIFF with an image in two resolutions and a smaller one."""
    large, small, other = (255 - each if turned else each for each in (LARGE, SMALL, OTHER))
    write_pyramid(path, [large, small])
    tifffile.imwrite(path, channels_last(other), photometric="rgb", append=True)


def write_raw(path: Path, *images: np.ndarray[Any, Any]) -> None:
    """What bioformats2raw writes: a folder of images 0, 1, ..., none of them named."""
    group = zarr.create_group(path, attributes={"ome": {"version": "0.5", "bioformats2raw.layout": 3}})
    axes = [{"name": name} for name in "cyx"]
    for number, image in enumerate(images):
        datasets = [{"path": str(level)} for level in range(2)]
        multiscales = [{"axes": axes, "datasets": datasets}]
        inner = group.create_group(
            str(number), attributes={"ome": {"version": "0.5", "multiscales": multiscales}}
        )
        for level in range(2):
            stored = image[:, :: 1 + level, :: 1 + level]
            inner.create_array(str(level), shape=stored.shape, dtype="u1", chunks=stored.shape)[...] = stored


def ambiguous(folder: Path) -> Path:
    """An array of which nothing says whether its channels are first or last."""
    folder.mkdir(parents=True, exist_ok=True)
    np.save(folder / "a.npy", pixels(6, size=(20, 5)))
    return folder


def whole(source: Any) -> Any:
    _, height, width = source.shape
    return source.read(region(0, height, 0, width)).numpy()


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"series": -1}, "series=-1: allowed are whole numbers from 0 on"),
        ({"level": -1}, "level=-1: allowed are whole numbers from 0 on"),
        ({"level": True}, "level=True: allowed are whole"),
        ({"level": None}, "level=None: allowed are whole"),
        ({"channels_last": 1}, "channels_last=1: allowed are True, False and None"),
    ],
)
def test_what_no_choice_is(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ImageChoice(**values)


def test_a_choice_opens_what_it_says(tmp_path: Path) -> None:
    write_two_series(tmp_path / "a.tif")
    write_raw(tmp_path / "raw.zarr", OTHER, LARGE)
    for path, other in (("a.tif", 1), ("raw.zarr", 0)):
        main = ImageChoice(series=1 - other)
        np.testing.assert_array_equal(whole(open_chosen(tmp_path / path, main)), LARGE)
        np.testing.assert_array_equal(whole(open_chosen(tmp_path / path, ImageChoice(other))), OTHER)
        np.testing.assert_array_equal(whole(open_chosen(tmp_path / path, ImageChoice(1 - other, 1))), SMALL)
    ambiguous(tmp_path)
    for last, shape in ((False, (6, 20, 5)), (True, (5, 6, 20))):
        assert open_chosen(tmp_path / "a.npy", ImageChoice(channels_last=last)).shape == shape


def write_grey_tiff(path: Path) -> None:
    tifffile.imwrite(path, pixels(1)[0], photometric="minisblack")


@pytest.mark.parametrize(
    ("name", "write", "choice", "message"),
    [
        (
            "a.png",
            lambda path: Image.new("RGB", (8, 6)).save(path),
            ImageChoice(channels_last=True),
            "is a picture, whose format says where the channels are: leave channels_last=True "
            "(--channels-last) out",
        ),
        (
            "a.png",
            lambda path: Image.new("RGB", (8, 6)).save(path),
            ImageChoice(series=1),
            "is no TIFF or OME-Zarr: allowed is series 0; leave series= out, or give --series 0",
        ),
        (
            "a.png",
            lambda path: Image.new("RGB", (8, 6)).save(path),
            ImageChoice(level=1),
            "has one resolution: allowed is level 0; leave level= out, or give --level 0",
        ),
        (
            "a.svs",
            lambda path: write_pyramid(path, [LARGE, SMALL]),
            ImageChoice(channels_last=False),
            "is a slide, whose format says where the channels are: leave channels_last=False "
            "(--channels-first) out",
        ),
        (
            "a.svs",
            lambda path: write_pyramid(path, [LARGE, SMALL]),
            ImageChoice(series=1),
            "is no TIFF or OME-Zarr: allowed is series 0; leave series= out, or give --series 0",
        ),
        (
            "a.tif",
            write_two_series,
            ImageChoice(channels_last=False),
            "says that its axes are Y, X, S, with the channels last: leave channels_last=False "
            "(--channels-first) out",
        ),
        (
            "a.tif",
            write_grey_tiff,
            ImageChoice(channels_last=True),
            "has rows and columns and no axis of channels: leave channels_last=True (--channels-last) out",
        ),
        (
            "a.npy",
            lambda path: np.save(path, pixels(1)[0]),
            ImageChoice(channels_last=False),
            "has rows and columns and no axis of channels: leave channels_last=False (--channels-first) out",
        ),
        ("a.tif", write_two_series, ImageChoice(level=2), "has no level 2: allowed are 0..1"),
        ("a.tif", write_two_series, ImageChoice(series=2), "has no image 2: allowed are 0..1"),
    ],
)
def test_what_does_not_apply_is_refused_by_name(
    tmp_path: Path, name: str, write: Callable[[Path], None], choice: ImageChoice, message: str
) -> None:
    if name == "a.svs":
        pytest.importorskip("openslide")
    write(tmp_path / name)
    open_image(tmp_path / name)
    with pytest.raises(DatasetMismatch, match=re.escape(f"{tmp_path / name} {message}")):
        open_chosen(tmp_path / name, choice)


def test_names_of_axes_may_be_repeated_and_not_contradicted(tmp_path: Path) -> None:
    path = write_ome(tmp_path, "0.5", "cyx", [LARGE])
    assert ZarrSource(path, channels_last=False).shape == LARGE.shape
    with pytest.raises(DatasetMismatch, match=r"its axes are c, y, x, with the channels first: leave chan"):
        ZarrSource(path, channels_last=True)
    one = write_ome(tmp_path / "one", "0.5", "cyx", [LARGE[:1]])
    assert ZarrSource(one, channels_last=False).shape == (1, 150, 202)
    tifffile.imwrite(tmp_path / "a.tif", channels_last(OTHER), photometric="rgb")
    assert open_image(tmp_path / "a.tif", channels_last=True).shape == OTHER.shape


def test_a_folder_of_bioformats2raw_gives_the_series_that_is_asked_for(tmp_path: Path) -> None:
    write_raw(tmp_path / "in/raw.zarr", OTHER, LARGE)
    with pytest.raises(DatasetMismatch, match=r"holds 2 images .* to take, or series= \(--series\)"):
        find_images([tmp_path / "in"])
    for given in (tmp_path / "in", tmp_path / "in/raw.zarr"):
        (found,) = find_images([given], series=1)
        np.testing.assert_array_equal(whole(open_chosen(found.path, ImageChoice(series=1))), LARGE)


def classes(folder: Path) -> Path:
    for name in ("cat", "dog"):
        (folder / name).mkdir(parents=True)
        write_two_series(folder / name / "a.tif", turned=name == "cat")
    return folder


def test_data_sets_read_what_is_chosen(tmp_path: Path) -> None:
    folder = classes(tmp_path / "in")
    table = tmp_path / "labels.csv"
    table.write_text("image,label\nin/cat/a.tif,cat\nin/dog/a.tif,dog\n")
    fingerprints = set()
    for choice, expected in (
        (ImageChoice(), LARGE),
        (ImageChoice(level=1), SMALL),
        (ImageChoice(series=1), OTHER),
    ):
        for data in (folder, table):
            images = open_dataset(data, choice=choice)
            assert images.choice == choice
            np.testing.assert_array_equal(whole(images[1][0]), expected)
            fingerprints.add(images.fingerprint)
        np.testing.assert_array_equal(whole(next(open_table(table, choice=choice))[1]), 255 - expected)
    assert len(fingerprints) == 6
    with pytest.raises(DatasetMismatch, match="has no level 2: allowed are"):
        FileDataset(folder, choice=ImageChoice(level=2))


def records(out: Path, *arguments: Any, **options: Any) -> list[ImageRecord]:
    return list(convert(find_images(*arguments), out, **options))


def test_another_series_or_level_is_another_image(tmp_path: Path) -> None:
    write_two_series(tmp_path / "a.tif")
    out, images = tmp_path / "store", [tmp_path / "a.tif"]
    (record,) = records(out, images, choice=ImageChoice(series=1))
    assert record.shape == OTHER.shape
    assert (record.origin["series"], record.origin["level"]) == (1, 0)
    assert records(out, images, choice=ImageChoice(series=1)) == []
    for choice, message in (
        (ImageChoice(), "series 1, level 0 of {}; level 0 of {} is another one"),
        (ImageChoice(series=0, level=1), "series 1, level 0 of {}; series 0, level 1 of {} is another one"),
    ):
        described = message.format(images[0], images[0])
        with pytest.raises(DatasetMismatch, match=re.escape(f"'a' already, {described}: rename it or")):
            records(out, images, choice=choice)


def test_another_place_of_the_channels_is_written_anew(tmp_path: Path) -> None:
    ambiguous(tmp_path / "in")
    labels = tmp_path / "labels.csv"
    labels.write_text("image,label\na,4\n")
    out, images = tmp_path / "store", [tmp_path / "in"]
    first, last = ImageChoice(channels_last=False), ImageChoice(channels_last=True)
    (record,) = records(out, images, labels=labels, choice=first)
    assert (record.shape, record.label) == ((6, 20, 5), 4)
    assert records(out, images, choice=first) == []
    (record,) = records(out, images, choice=last)
    assert (record.shape, record.label) == ((5, 6, 20), 4)
    store = TileStore(out)
    np.testing.assert_array_equal(
        whole(store.source(store.records[0])), whole(ArraySource(tmp_path / "in/a.npy", channels_last=True))
    )
    with pytest.raises(DatasetMismatch, match=r"may be \(C, H, W\) or \(H, W, C\)"):
        records(out, images)
    assert [each.shape for each in TileStore(out).records] == [(5, 6, 20)]


def test_what_older_stores_do_not_say_is_the_default(tmp_path: Path) -> None:
    write_two_series(tmp_path / "a.tif")
    out = tmp_path / "store"
    (record,) = records(out, [tmp_path / "a.tif"])
    assert set(record.origin) == {"path", "level", "fingerprint"}
    assert "largest" not in json.loads(record.to_json())
    assert records(out, [tmp_path / "a.tif"]) == []


def test_images_of_a_tile_store_are_chosen_when_it_is_written(tmp_path: Path) -> None:
    folder = classes(tmp_path / "in")
    labels = tmp_path / "labels.csv"
    labels.write_text("image,label\ncat/a,0\ndog/a,1\n")
    choice = ImageChoice(level=1)
    records(tmp_path / "store", [folder], labels=labels, choice=choice)
    assert open_dataset(tmp_path / "store").choice == choice
    with pytest.raises(DatasetMismatch) as refused:
        open_dataset(tmp_path / "store", choice=ImageChoice(series=1, channels_last=True))
    assert str(refused.value) == (
        f"{tmp_path / 'store'} is a tile store, whose images were chosen when it was written: leave series=, "
        "channels_last= out (series=1, channels_last=True), or write another store with `streamcnn convert`"
    )


# --- the command line ------------------------------------------------------------------------------------


def test_info_says_which_series_and_level_is_taken(tmp_path: Path, run: Run) -> None:
    write_two_series(tmp_path / "a.tif")
    write_raw(tmp_path / "raw.zarr", LARGE, OTHER)
    for name in ("a.tif", "raw.zarr"):
        facts = json.loads(run("info", tmp_path / name, "--json")[1])
        assert facts["taken"] == {"series": 0, "level": 0}
        assert [facts[f"series {n}"]["opened"] for n in (0, 1)] == ["yes", "no"]
        assert facts["series 0"]["levels"] == ["150 x 202", "75 x 101"]
        assert facts["series 1"]["levels"][0] == "60 x 80"
        facts = json.loads(run("info", tmp_path / name, "--level", "1", "--json")[1])
        assert (facts["shape"], facts["taken"]) == ([3, 75, 101], {"series": 0, "level": 1})
        status, out, _ = run("info", tmp_path / name, "--series", "1")
        assert (status, "series: 1; level: 0" in out, "3 x 60 x 80" in out) == (0, True, True)
    ambiguous(tmp_path)
    status, _, err = run("info", tmp_path / "a.npy")
    assert (status, "(--channels-first or --channels-last)" in err) == (1, True)
    assert "6 x 20 x 5" in run("info", tmp_path / "a.npy", "--channels-first")[1]


def test_info_lists_the_levels_of_slides_and_of_ome_zarr(tmp_path: Path, run: Run) -> None:
    pytest.importorskip("openslide")
    write_pyramid(tmp_path / "a.svs", [LARGE, SMALL])
    image = write_ome(tmp_path, "0.4", "cyx", [LARGE, SMALL])
    turned = write_ome(tmp_path / "turned", "0.5", "xyc", [LARGE.transpose(2, 1, 0)])
    for path, levels in (
        (tmp_path / "a.svs", ["150 x 202", "75 x 101"]),
        (image, ["150 x 202", "75 x 101"]),
        (turned, ["150 x 202"]),
    ):
        facts = json.loads(run("info", path, "--json")[1])
        assert facts["series 0"]["levels"] == levels
        assert facts["taken"] == {"series": 0, "level": 0}
    status, _, err = run("info", tmp_path / "a.svs", "--channels-last")
    assert (status, "is a slide, whose format says where the channels are" in err) == (1, True)


def test_info_refuses_to_choose_in_a_tile_store(tmp_path: Path, run: Run) -> None:
    write_two_series(tmp_path / "a.tif")
    assert run("convert", tmp_path / "a.tif", tmp_path / "store", "--series", "1")[0] == 0
    assert TileStore(tmp_path / "store").records[0].shape == OTHER.shape
    status, _, err = run("info", tmp_path / "store", "--level", "1")
    assert (status, "is a tile store, whose images were chosen when it was written" in err) == (1, True)


@pytest.mark.parametrize("command", ["info", "plan", "convert", "train", "evaluate", "predict"])
def test_every_command_that_opens_images_chooses(run: Run, command: str) -> None:
    status, out, _ = run(command, "--help")
    assert status == 0
    for option in ("--series", "--level", "--channels-last", "--channels-first"):
        assert option in out
