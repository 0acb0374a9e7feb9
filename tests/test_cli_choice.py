"""Runs read images as they were told, and go on, evaluate and predict in the same way."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import tifffile

from streamcnn.data.sources import ImageChoice
from streamcnn.training import load_run
from streamcnn.training.runs import read_run

Run = Callable[..., tuple[int, str, str]]

FACTORY = """
from torch import nn

def small(channels=3):
    return nn.Sequential(
        nn.Conv2d(channels, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2)
    )
"""
TRUST = "--trust=choice_factories:small"


def write_turned(path: Path, bright: bool, number: int) -> None:
    """A pyramid whose second level says the opposite of the first."""
    path.parent.mkdir(parents=True, exist_ok=True)
    draw = np.random.default_rng(number)
    levels = [
        draw.integers(180, 220, (64, 48, 3)).astype("u1"),
        draw.integers(20, 60, (32, 24, 3)).astype("u1"),
    ]
    if not bright:
        levels = [255 - level for level in levels]
    with tifffile.TiffWriter(path) as file:
        file.write(levels[0], photometric="rgb", subifds=1, metadata=None)
        file.write(levels[1], photometric="rgb", subfiletype=1, metadata=None)


@pytest.fixture
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for seed, (split, count) in enumerate((("train", 4), ("val", 2), ("test", 2))):
        for number in range(count):
            name = "bright" if number % 2 else "dark"
            path = tmp_path / "images" / split / name / f"{number}.tif"
            write_turned(path, name == "bright", 10 * seed + number)
    (tmp_path / "choice_factories.py").write_text(FACTORY)
    monkeypatch.syspath_prepend(tmp_path)
    return tmp_path


def train(run: Run, data: Path, out: Path, *options: str) -> tuple[int, str, str]:
    fixed = ("--validation-split=val", "--batch=2", "--tile=32", "--learning-rate=0.1")
    return run("train", "choice_factories:small", data, f"--out={out}", *fixed, *options)


def test_a_run_reads_images_as_it_was_told(workplace: Path, run: Run) -> None:
    images, folder = workplace / "images", workplace / "run"
    status, _, err = train(run, images, folder, "--level=1", "--epochs=6")
    assert (status, err) == (0, "")
    assert read_run(folder).choice == ImageChoice(level=1)
    assert load_run(folder, trust=["choice_factories:small"]).choice == ImageChoice(level=1)
    # It goes on with the same choice, and with no other one.
    assert train(run, images, folder, "--level=1", "--epochs=7")[0] == 0
    status, _, err = train(run, images, folder, "--epochs=7")
    assert (status, "choice was {'level': 1} and is None" in err) == (1, True)

    assert json.loads(run("evaluate", TRUST, folder, "--json")[1])["accuracy"] == 1.0
    assert json.loads(run("evaluate", TRUST, folder, "--level=0", "--json")[1])["accuracy"] == 0.0
    test = images / "test"
    for options, expected in (((), ["bright", "dark"]), (("--level=0",), ["dark", "bright"])):
        lines = run("predict", TRUST, folder, test, "--json", *options)[1].splitlines()
        assert [json.loads(line)["class"] for line in lines] == expected
    table = workplace / "new.csv"
    table.write_text("image\nimages/test/dark/0.tif\n")
    assert json.loads(run("predict", TRUST, folder, table, "--json")[1])["class"] == "dark"
    status, _, err = run("predict", TRUST, folder, test, "--channels-first")
    assert (status, "Y, X, S, with the channels last: leave channels_last=False" in err) == (1, True)
    status, _, err = run("evaluate", TRUST, folder, "--series=3")
    assert (status, "has no image 3: allowed are 0..0" in err) == (1, True)


def test_what_a_store_was_made_of_is_what_predict_reads(workplace: Path, run: Run) -> None:
    rows = [
        f"{path.relative_to(workplace / 'images')},{path.parent.name},{path.relative_to(workplace).parts[1]}"
        for path in sorted((workplace / "images").rglob("*.tif"))
    ]
    labels = workplace / "labels.csv"
    labels.write_text("\n".join(["image,label,split", *rows, ""]))
    store, folder = workplace / "store", workplace / "run"
    assert run("convert", workplace / "images", store, f"--labels={labels}", "--level=1")[0] == 0
    status, _, err = train(run, store, folder, "--level=1")
    assert (status, "is a tile store, whose images were chosen when it was written" in err) == (1, True)
    assert train(run, store, folder, "--epochs=6")[::2] == (0, "")
    assert load_run(folder, trust=["choice_factories:small"]).choice == ImageChoice(level=1)
    assert json.loads(run("evaluate", TRUST, folder, "--json")[1])["accuracy"] == 1.0
    lines = run("predict", TRUST, folder, workplace / "images/test", "--json")[1].splitlines()
    assert [json.loads(line)["class"] for line in lines] == ["bright", "dark"]
    found = run("evaluate", TRUST, folder, "--json", f"--data={workplace / 'images'}")[1]
    assert json.loads(found)["accuracy"] == 1.0


def write_12_bit(path: Path, value: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    tag = (281, "H", 1, 4095, True)
    tifffile.imwrite(path, np.full((32, 24), value, "u2"), photometric="minisblack", extratags=[tag])


def test_a_run_from_before_there_were_choices_goes_on_as_it_was(workplace: Path, run: Run) -> None:
    """Its file has no choice, and its pixels were divided by the largest of their type."""
    images, folder = workplace / "deep", workplace / "run"
    for split in ("train", "val"):
        for name, value in (("dark", 500), ("bright", 3500)):
            write_12_bit(images / split / name / "a.tif", value)
    options = ("--model-option=channels=1", "--epochs=1")
    assert train(run, images, folder, *options)[0] == 0
    assert read_run(folder).normalise.divisor == "range"
    settings = json.loads((folder / "run.json").read_text())
    del settings["choice"], settings["read_by"], settings["normalise"]["divisor"]
    (folder / "run.json").write_text(json.dumps(settings))
    old = load_run(folder, trust=["choice_factories:small"])
    assert (old.choice, old.config.choice) == (ImageChoice(), ImageChoice())
    assert old.config.normalise.divisor == "type"
    # The checkpoint is of a run that divided by 4095; one from before says nothing of that.
    status, _, err = train(run, images, folder, "--model-option=channels=1", "--epochs=2")
    assert (status, "largest was 4095 and is None" in err) == (1, True)
    other = workplace / "other"
    other.mkdir()
    (other / "run.json").write_text(json.dumps(settings))
    assert train(run, images, other, *options)[0] == 0
    assert read_run(other).normalise.divisor == "type"
    assert train(run, images, other, "--model-option=channels=1", "--epochs=2")[0] == 0


@pytest.mark.parametrize(
    ("choice", "message"),
    [
        ({"series": -1, "level": 0, "channels_last": None}, "choice: series=-1: allowed are whole numbers"),
        (
            {"series": None, "level": "1", "channels_last": None},
            "choice.level is '1': allowed is a valid integer",
        ),
        (3, "choice is 3: allowed is"),
    ],
)
def test_a_choice_in_a_runs_file_that_is_none(tmp_path: Path, run: Run, choice: object, message: str) -> None:
    (tmp_path / "run.json").write_text(
        json.dumps(
            {
                "model": "resnet18",
                "data": "x",
                "num_classes": 2,
                "num_channels": 3,
                "classes": None,
                "choice": choice,
            }
        )
    )
    status, _, err = run("evaluate", tmp_path)
    assert (status, message in err) == (1, True), err
