"""Writing an UltraMNIST set: the same store whatever the workers, and however often it was interrupted."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from streamcnn import DatasetMismatch
from streamcnn.data.tile_store import Head, TileStore, TileStoreWriter
from streamcnn.data.ultramnist import Digits, Recipe, Spec, load_digits, make_image
from streamcnn.data.ultramnist.generate import generate
from streamcnn.data.ultramnist.preview import write_contact_sheet
from streamcnn.geometry.regions import Region

SPEC = Spec(seed=4, recipe=Recipe.BALANCED, size=96)


@pytest.fixture(scope="module")
def digits() -> Digits:
    return load_digits("uci")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, digits: Digits) -> Path:
    """30 training and 5 test images by this process: another one is seconds until it has imported all."""
    folder = tmp_path_factory.mktemp("set")
    states = list(generate(folder, SPEC, digits, num_train=30, num_test=5, workers=0))
    assert [state.done for state in states] == list(range(36))
    assert all(state.total == 35 for state in states)
    return folder


def test_the_images_are_those_of_the_recipe(folder: Path, digits: Digits) -> None:
    store = TileStore(folder)
    assert [r.name for r in store.records] == [
        *(f"train/{i:05d}" for i in range(30)),
        *(f"test/{i:05d}" for i in range(5)),
    ]
    for position, (split, index) in ((3, ("train", 3)), (33, ("test", 3))):
        made = make_image(SPEC, split, index, digits)
        record = store.records[position]
        assert record.label == made.layout.label == sum(digit["value"] for digit in record.truth)
        assert np.array_equal(store.source(record).read(Region.whole((96, 96))).numpy(), made.pixels)
        boxes = [digit.box for digit in made.layout.digits]
        assert [digit["box"] for digit in record.truth] == [
            [b.rows.start, b.cols.start, b.rows.stop, b.cols.stop] for b in boxes
        ]
    assert len(store.label_counts("train")) == 28


def test_any_number_of_workers_writes_the_same(folder: Path, tmp_path: Path, digits: Digits) -> None:
    list(generate(tmp_path, SPEC, digits, num_train=30, num_test=5, workers=2))
    assert TileStore(tmp_path).records == TileStore(folder).records


def test_a_set_can_grow(folder: Path, tmp_path: Path, digits: Digits) -> None:
    list(generate(tmp_path, SPEC, digits, num_train=10, num_test=0, workers=0))
    states = list(generate(tmp_path, SPEC, digits, num_train=30, num_test=5, workers=0))
    assert states[0].done == 10
    assert TileStore(tmp_path).records == TileStore(folder).records
    # A smaller set is there already; nothing is taken away.
    assert [s.done for s in generate(tmp_path, SPEC, digits, num_train=2, num_test=1)] == [3]
    assert len(TileStore(tmp_path)) == 35


@pytest.mark.parametrize("way", [signal.SIGKILL, signal.SIGINT])
def test_a_run_that_was_stopped_goes_on(folder: Path, tmp_path: Path, digits: Digits, way: int) -> None:
    # It slows down at the third image, so that it is stopped in time on a busy machine too.
    code = f"""
        import signal, time
        # Whatever the process that runs the tests ignores, as in a shell's background.
        signal.signal(signal.SIGINT, signal.default_int_handler)
        from streamcnn.data.ultramnist import Recipe, Spec, load_digits
        from streamcnn.data.ultramnist.generate import generate
        if __name__ == "__main__":
            spec = Spec(seed=4, recipe=Recipe.BALANCED, size=96)
            for state in generate({str(tmp_path)!r}, spec, load_digits("uci"), num_train=30, num_test=5):
                print(state.done, flush=True)
                time.sleep(0.5 * (state.done >= 3))
    """
    script = tmp_path.with_suffix(".py")
    script.write_text(textwrap.dedent(code))
    process = subprocess.Popen(
        [sys.executable, str(script)],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        start_new_session=True,
    )
    assert process.stdout is not None
    while process.stdout.readline().strip() != "3":
        assert process.poll() is None
    os.kill(process.pid, way)
    # The workers hold the pipe too: it ends when the last of them has gone.
    process.communicate(timeout=240)
    with pytest.raises(DatasetMismatch, match="is not finished"):
        TileStore(tmp_path)
    states = list(generate(tmp_path, SPEC, digits, num_train=30, num_test=5, workers=0))
    assert 3 <= states[0].done < 35
    assert TileStore(tmp_path).records == TileStore(folder).records
    assert not [path for path in tmp_path.rglob("*") if "partial" in path.name]


def test_other_settings_are_refused(folder: Path, digits: Digits) -> None:
    other = Spec(seed=4, recipe=Recipe.FAITHFUL, size=96)
    text = "recipe is 'balanced', asked for is 'faithful'; give another folder"
    with pytest.raises(DatasetMismatch, match=text):
        list(generate(folder, other, digits, num_train=30, num_test=5))


def test_a_contact_sheet_shows_every_class(folder: Path, tmp_path: Path) -> None:
    from PIL import Image

    store = TileStore(folder)
    plain, marked = tmp_path / "plain.png", tmp_path / "marked.png"
    assert write_contact_sheet(store, plain, edge=64) == 28
    assert write_contact_sheet(store, marked, edge=64, boxes=True) == 28
    first, second = (np.asarray(Image.open(path)) for path in (plain, marked))
    assert first.shape == second.shape == (4 * (64 + 8 + 20) + 8, 7 * (64 + 8) + 8, 3)
    changed = (first != second).any(axis=-1)
    assert 0.01 < changed.mean() < 0.5
    # The first image, shrunk by averaging, is where it should be.
    record = next(r for r in store.records if r.label == 0)
    pixels = store.source(record).read(Region.whole((96, 96)))[None].float()
    expected = torch.nn.functional.interpolate(pixels, (64, 64), mode="area")[0, 0].numpy()
    assert np.abs(first[28:92, 8:72, 0] - expected).mean() < 40


def test_a_contact_sheet_fits_small_images_and_takes_any_spelling_of_a_split(
    folder: Path, tmp_path: Path
) -> None:
    from PIL import Image

    path = tmp_path / "sheet.png"
    assert write_contact_sheet(TileStore(folder), path, split="Training", edge=320) == 28
    with Image.open(path) as sheet:
        assert sheet.height == 4 * (96 + 8 + 20) + 8
        assert 7 * (96 + 8) + 8 <= sheet.width < 7 * (150 + 8) + 8
    assert list(tmp_path.iterdir()) == [path]


def test_a_contact_sheet_is_a_picture(
    run: Callable[..., tuple[int, str, str]], folder: Path, tmp_path: Path
) -> None:
    for name in ("sheet.txt", "sheet"):
        status, _, err = run("ultramnist", "preview", folder, "--output", tmp_path / name)
        assert status == 2
        assert "allowed are those of pictures, such as .png or .jpg" in err
    assert list(tmp_path.iterdir()) == []


def test_no_images_are_wrong_usage(run: Callable[..., tuple[int, str, str]], tmp_path: Path) -> None:
    status, _, err = run("ultramnist", "generate", tmp_path / "out", "--train", "0", "--test", "0")
    assert (status, "--train 0 and --test 0 are no images" in err) == (2, True)
    assert list(tmp_path.iterdir()) == []


def test_a_contact_sheet_of_nothing_is_refused(folder: Path, tmp_path: Path) -> None:
    store = TileStore(folder)
    with pytest.raises(
        DatasetMismatch, match=re.escape("no labelled image of split 'rest': it has ['test', ")
    ):
        write_contact_sheet(store, tmp_path / "sheet.png", split="rest")
    with TileStoreWriter(tmp_path / "empty", Head("images", {})) as writer:
        writer.finish()
    with pytest.raises(DatasetMismatch, match=r"image of split 'train': it has \[\] with labels"):
        write_contact_sheet(TileStore(tmp_path / "empty"), tmp_path / "sheet.png")
