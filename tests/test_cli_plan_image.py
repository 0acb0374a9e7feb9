"""Plans for an image in a file: its size, its channels, and what reading it takes."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from source_contract import pixels, write_pyramid
from torch import nn

from streamcnn import StreamingModel
from streamcnn.data.normalisation import Normalise
from streamcnn.data.sources import open_image
from streamcnn.plan.reading import HELD

Run = Callable[..., tuple[int, str, str]]

FACTORY = """
from torch import nn

def small(channels=3):
    return nn.Sequential(nn.Conv2d(channels, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1))

def grey():
    return small(1)
"""


@pytest.fixture
def factory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    (tmp_path / "plan_factories.py").write_text(FACTORY)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "plan_factories", raising=False)
    monkeypatch.setenv("STREAMCNN_CALIBRATION", "off")
    return "plan_factories:small"


def test_a_plan_counts_what_reading_the_file_takes(tmp_path: Path, run: Run, factory: str) -> None:
    Image.fromarray(np.zeros((300, 400, 3), np.uint8)).save(tmp_path / "a.png")
    status, out, err = run("plan", factory, f"--image={tmp_path / 'a.png'}", "--batch=2", "--json")
    assert (status, err) == (0, "")
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1))
    model = StreamingModel(net, preprocess=Normalise())
    expected = model.plan([open_image(tmp_path / "a.png")] * 2)
    assert json.loads(out) == json.loads(expected.to_json())
    assert expected.image_shape == (2, 3, 300, 400)
    counted = {term.name: term.nbytes for term in expected.terms}
    assert counted[HELD] == 2 * 300 * 400 * 3
    by_size = json.loads(run("plan", factory, "--size=300x400", "--batch=2", "--json")[1])
    assert HELD in json.loads(out)["terms"]
    assert HELD not in by_size["terms"]


def test_the_file_is_described_as_it_is_stored(tmp_path: Path, run: Run, factory: str) -> None:
    (tmp_path / "a.pgm").write_bytes(b"P5 40 30 4095\n" + bytes(2400))
    status, out, err = run("plan", factory.replace("small", "grey"), f"--image={tmp_path / 'a.pgm'}")
    assert (status, err) == (0, "")
    first, second = out.splitlines()[:2]
    assert first == (
        f"{tmp_path / 'a.pgm'}: 1 x 30 x 40 of uint16 up to 4095, stored as a PPM picture of 30 x 40 pixels, "
        "which is decoded whole"
    )
    assert second.startswith("image 1x1x30x40 float32")


def test_a_plan_is_of_the_level_that_is_chosen(tmp_path: Path, run: Run, factory: str) -> None:
    write_pyramid(tmp_path / "a.tif", [pixels(3, size=(150, 202)), pixels()])
    options = (f"--image={tmp_path / 'a.tif'}", "--level=1")
    assert "image 1x3x75x101 float32" in run("plan", factory, *options)[1]
    assert "image 1x3x75x101 float32" in run("plan", factory, *options, "--card")[1]
    status, _, err = run("plan", factory, f"--image={tmp_path / 'a.tif'}", "--channels-first")
    assert (status, "with the channels last: leave channels_last=False" in err) == (1, True)


@pytest.mark.parametrize("device", [(), ("--card",)])
def test_a_plan_is_of_passes_under_autocast(run: Run, factory: str, device: tuple[str, ...]) -> None:
    taken = {}
    for dtype in ("", "bfloat16", "float16"):
        options = (f"--autocast={dtype}",) if dtype else ()
        status, out, err = run("plan", factory, "--size=512", *options, *device, "--json")
        assert (status, err) == (0, "")
        taken[dtype] = json.loads(out)["plain_bytes"]
    # Of what the card itself reserves nothing is saved.
    assert taken["bfloat16"] == taken["float16"] < taken[""] - 4 * 10**6
    status, _, err = run("plan", factory, "--autocast=int8")
    assert (status, "'int8' is not one of 'bfloat16', 'float16'" in err) == (2, True)


def test_a_model_of_timm_is_made_for_the_files_channels(tmp_path: Path, run: Run) -> None:
    timm = pytest.importorskip("timm")
    np.save(tmp_path / "a.npy", pixels(5, size=(96, 96)))
    status, out, err = run("plan", "resnet10t", f"--image={tmp_path / 'a.npy'}", "--json")
    assert (status, err) == (0, "")
    with torch.device("meta"):
        assert timm.create_model("resnet10t", in_chans=5).conv1[0].in_channels == 5
    assert json.loads(out)["image_shape"] == [1, 5, 96, 96]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--image=a.png", "--size=40"], "--size: a.png says it: leave it out, or leave --image out"),
        (["--image=a.png", "--size=40", "--channels=3"], "--size, --channels: a.png says it"),
        (["--level=1"], "--level: chooses in a file: give it with --image, or leave it out"),
        (["--channels-first"], "--channels-last/--channels-first: chooses in a file"),
        (["--series=0"], "--series: chooses in a file"),
    ],
)
def test_options_that_contradict_each_other(run: Run, options: list[str], message: str) -> None:
    status, out, err = run("plan", "x", *options)
    assert (status, out) == (2, "")
    assert message in err
