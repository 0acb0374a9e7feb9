"""The command line: what it parses, what it prints where, and its exit status."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import streamcnn
from streamcnn.cli import command_line, images
from streamcnn.data.sources import write_zarr_image
from streamcnn.errors import PlanDoesNotFit
from streamcnn.runtime import obstacles
from streamcnn.support import models

Run = Callable[..., tuple[int, str, str]]


@dataclass
class FakePlan:
    """Says with what it was made."""

    made_with: dict[str, Any]

    def explain(self) -> str:
        return f"plan {self.made_with}"

    def to_json(self) -> str:
        return json.dumps(self.made_with)

    def validate(self) -> None:
        """It fits."""


@pytest.fixture
def engine(monkeypatch: pytest.MonkeyPatch) -> None:
    """In the engine's place, something that repeats what it is asked."""

    class Model:
        def __init__(self, net: object, **options: object) -> None:
            self.options = options

        def plan(self, shape: tuple[int, ...]) -> FakePlan:
            return FakePlan({"shape": shape, **self.options})

    @dataclass
    class Report:
        max_error: float
        errors: dict[str, float]

        def explain(self) -> str:
            return f"largest error {self.max_error}"

    def verify(net: float, shape: tuple[int, ...], *, tile: object) -> Report:
        return Report(net, {"output": net})

    def streamability(net: float, shape: tuple[int, int, int, int]) -> obstacles.Streamability:
        return obstacles.Streamability(shape, 5, 0, (), 2**30)

    monkeypatch.setattr(streamcnn, "StreamingModel", Model, raising=False)
    monkeypatch.setattr(streamcnn, "verify", verify, raising=False)
    monkeypatch.setattr(obstacles, "streamability", streamability)
    monkeypatch.setattr(models, "load_model", float)


def test_version_and_help(run: Run) -> None:
    status, out, err = run("--version")
    assert (status, err) == (0, "")
    assert out.startswith("streamcnn")
    status, out, _ = run("--help")
    assert status == 0
    for command in ("demo", "plan", "verify", "info"):
        assert f"\n  {command} " in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["bogus"], "No such command 'bogus'"),
        (["plan"], "Missing argument 'MODEL'"),
        (["plan", "x", "--bogus"], "No such option: --bogus"),
        (["plan", "x", "--batch", "0"], "Invalid value for '--batch'"),
        (
            ["plan", "x", "--budget", "banana"],
            "--budget: cannot read 'banana' as a number of bytes: allowed is",
        ),
        (["plan", "x", "--size", "0"], "--size: cannot read '0' as pixels: allowed is"),
        (["plan", "x", "--size", "4000x"], "--size: cannot read '4000x' as pixels"),
        (["plan", "x", "--tile", "-5"], "--tile: cannot read '-5' as pixels"),
        (["verify", "x", "--size", "a"], "--size: cannot read 'a' as pixels"),
        (["verify", "no_such_package:net"], "MODEL: no module 'no_such_package'"),
        (["plan", ":net"], "MODEL: cannot read ':net' as a model"),
        (["demo", "--budget", "0"], "--budget: cannot read '0' as a number of bytes"),
        (["demo", "--size", "10"], "Invalid value for '--size'"),
    ],
)
def test_wrong_usage_is_status_2(run: Run, arguments: list[str], message: str) -> None:
    status, out, err = run(*arguments)
    assert status == 2
    assert out == ""
    assert message in err
    assert "Traceback" not in err


def test_info_prints_what_the_file_says(run: Run, tmp_path: Path) -> None:
    write_zarr_image(tmp_path / "a.zarr", torch.zeros(3, 70, 50, dtype=torch.uint8), chunk=32)
    status, out, err = run("info", tmp_path / "a.zarr")
    assert (status, err) == (0, "")
    assert out.splitlines() == [
        "shape        3 x 70 x 50",
        "dtype        uint8",
        "chunks       3 x 32 x 32",
        "stored_as    zarr chunks of 3 x 32 x 32",
        "pixel_bytes  10.3 KiB",
        "held_bytes   0 bytes",
        "tile_bytes   56.5 KiB",
    ]
    _, out, _ = run("info", tmp_path / "a.zarr", "--json")
    assert json.loads(out) == {
        "shape": [3, 70, 50],
        "dtype": "uint8",
        "chunks": [3, 32, 32],
        "stored_as": "zarr chunks of 3 x 32 x 32",
        "pixel_bytes": 3 * 70 * 50,
        "held_bytes": 0,
        # Six chunks as stored and decoded, what is cut out of them, and the tensor.
        "tile_bytes": 2 * 6 * 3 * 32 * 32 + 2 * 3 * 70 * 50,
    }


def test_names_of_classes_stand_apart_whatever_is_in_them(
    capsys: pytest.CaptureFixture[str],
) -> None:
    images._print_facts({"kind": "images", "classes": ["gland", 'size, "x"']}, as_json=False)
    assert capsys.readouterr().out.splitlines()[1] == 'classes  0: gland; 1: size, "x"'


def test_a_failed_run_is_one_line_and_status_1(run: Run, tmp_path: Path) -> None:
    status, out, err = run("info", tmp_path / "gone.zarr")
    assert (status, out) == (1, "")
    assert err.startswith("streamcnn: error: no image at ")
    assert err.count("\n") == 1


@pytest.mark.usefixtures("engine")
def test_plan_hands_over_what_it_parsed(run: Run) -> None:
    arguments = (
        "plan",
        "1",
        "--size",
        "4000x3000",
        "--batch",
        2,
        "--channels",
        1,
        "--budget",
        "1GiB",
        "--tile",
        512,
    )
    made_with = {"shape": (2, 1, 4000, 3000), "budget": 2**30, "tile": (512, 512)}
    assert run(*arguments) == (0, f"plan {made_with}\n", "")
    status, out, _ = run(*arguments, "--json")
    assert status == 0
    assert json.loads(out) == json.loads(json.dumps(made_with))


@pytest.mark.usefixtures("engine")
def test_plan_leaves_what_is_not_given_to_the_planner(run: Run) -> None:
    made_with = {"shape": (1, 3, 4000, 4000), "budget": None, "tile": None}
    assert run("plan", "1") == (0, f"plan {made_with}\n", "")


@pytest.mark.usefixtures("engine")
def test_a_budget_that_is_too_small_is_status_1(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(plan: FakePlan) -> None:
        raise PlanDoesNotFit("projected 3 GiB, allowed 1 GiB")

    monkeypatch.setattr(FakePlan, "validate", refuse)
    refusal = "streamcnn: error: projected 3 GiB, allowed 1 GiB\n"
    status, out, err = run("plan", "1")
    assert (status, out.startswith("plan {"), err) == (1, True, refusal)
    status, out, err = run("plan", "1", "--json")
    assert (status, json.loads(out)["budget"], err) == (1, None, refusal)


@pytest.mark.usefixtures("engine")
@pytest.mark.parametrize(("error", "expected"), [("1e-9", 0), ("0.5", 1), ("nan", 1)])
def test_verify_fails_beyond_the_tolerance(run: Run, error: str, expected: int) -> None:
    status, out, err = run("verify", error)
    assert (status, out.splitlines()) == (
        expected,
        [
            "2 images of 320x288 pixels: 5 operators are streamed, and none needs a whole map",
            "plain PyTorch would need 1.00 GiB for a training update",
            f"gradients {'differ' if expected else 'agree'} on 320x288 pixels, in float64",
            f"largest error {float(error)}",
        ],
    )
    assert ("the largest relative error is" in err) == bool(expected)


@pytest.mark.usefixtures("engine")
def test_verify_prints_json(run: Run) -> None:
    status, out, _ = run("verify", "1e-9", "--json")
    assert status == 0
    found = json.loads(out)
    assert (found["max_error"], found["errors"], found["agrees"]) == (1e-9, {"output": 1e-9}, True)
    assert found["streamability"]["num_streamed"] == 5


def test_errors_that_are_no_users_fault_keep_their_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> None:
        raise AssertionError("an invariant")

    monkeypatch.setattr(command_line, "app", broken)
    with pytest.raises(AssertionError, match="an invariant"):
        command_line.run()


def test_an_ultramnist_set_is_made_checked_and_shown(run: Run, tmp_path: Path) -> None:
    store = tmp_path / "set"
    settings = ("--train", 29, "--test", 3, "--size", 64, "--digits", "uci", "--recipe", "faithful")
    status, out, err = run("ultramnist", "generate", store, *settings)
    assert (status, err) == (0, "")
    assert "29 training and 3 test images of 64x64 pixels, 32 of them made now in" in out
    assert "0 of them made now" in run("ultramnist", "generate", store, *settings)[1]

    status, out, err = run("ultramnist", "verify", store)
    assert (status, err) == (0, "")
    for line in (
        "recipe         faithful",
        "images         test: 3; train: 29",
        "labels         test: 3 labels, 1 image each; train: 28 labels, 1 to 2 images each",
        "shapes         1 x 64 x 64",
        "damaged        0",
    ):
        assert line in out.splitlines()
    facts = json.loads(run("info", store, "--json")[1])
    assert facts["images"] == {"test": 3, "train": 29}
    assert facts["pixel_bytes"] == 32 * 64 * 64
    assert facts["codec"].startswith("blosc(")

    picture = tmp_path / "sheet.png"
    assert run("ultramnist", "preview", store, "--output", picture, "--edge", 32, "--boxes")[0] == 0
    assert picture.stat().st_size > 1000

    shard = store / "images/test/00001/0/c/0/0/0"
    shard.write_bytes(shard.read_bytes()[:-1])
    status, out, err = run("ultramnist", "verify", store)
    assert status == 1
    assert "damaged        1" in out
    assert "shard 0/c/0/0/0 has" in err


def test_missing_digits_are_said_aloud(run: Run, tmp_path: Path) -> None:
    _, out, _ = run("ultramnist", "generate", tmp_path / "set", "--train", 1, "--test", 0, "--size", 64)
    assert "MNIST" in out
    assert "made now" in out


def test_images_are_converted(run: Run, tmp_path: Path) -> None:
    write_zarr_image(tmp_path / "in/a.zarr", torch.ones(3, 70, 50, dtype=torch.uint8))
    (tmp_path / "labels.csv").write_text("image,label\na,cat\n")
    status, out, err = run("convert", tmp_path / "in", tmp_path / "out", "--labels", tmp_path / "labels.csv")
    assert (status, err) == (0, "")
    assert out.startswith("a: 3 x 70 x 50 uint8, ")
    assert "already" not in out
    assert run("convert", tmp_path / "in", tmp_path / "out") == (0, "1 image already in the store\n", "")
    assert "classes       0: cat" in run("info", tmp_path / "out")[1].splitlines()
    status, _, err = run("convert", tmp_path / "gone", tmp_path / "out")
    assert status == 1
    assert "there is nothing at" in err


@pytest.mark.parametrize("command", ["plan", "verify"])
def test_a_factory_gets_its_arguments(run: Run, command: str) -> None:
    options = [
        part
        for text in ("in_channels=2", "out_channels=3", "kernel_size=[3, 5]", "padding_mode=reflect")
        for part in ("--model-option", text)
    ]
    status, out, err = run(command, "torch.nn:Conv2d", *options, "--channels", "2", "--size", "40")
    assert (status, err) == (0, "")
    assert "40x40" in out
    status, _, err = run(command, "torch.nn:Conv2d", *options, "--model-option", "depth=1")
    assert status == 2
    assert "MODEL: torch.nn:Conv2d cannot be called with in_channels=2, " in err
    status, _, err = run(command, "torch.nn:Conv2d", "--model-option", "depth")
    assert status == 2
    assert "--model-option: cannot read 'depth': allowed is KEY=VALUE" in err


def test_an_image_that_cannot_be_counted_is_refused(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    status, _, err = run("plan", "resnet18", "--size", "2000000000")
    assert status == 1
    assert err.startswith(
        "streamcnn: error: an image of shape (1, 3, 2000000000, 2000000000) has 2**63 bytes"
    )
    status, _, err = run("profile", "resnet18", "--size", "2000000000")
    assert status == 1
    assert err.startswith("streamcnn: error: the image takes ")
    assert "free: give a smaller --size, or another disk with TMPDIR" in err


def test_it_runs_as_a_module() -> None:
    command = [sys.executable, "-m", "streamcnn", "plan"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.startswith("Usage: python -m streamcnn plan")


def test_a_warning_is_one_line(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 255, (70, 80, 3), np.uint8)
    for name in ("a", "b"):
        np.save(tmp_path / f"{name}.npy", pixels)
    (tmp_path / "t.csv").write_text("image,label\na.npy,0\nb.npy,0\n")
    command = [sys.executable, "-m", "streamcnn", "train", "no_such", "t.csv", "--out", "run"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path)
    first, second = done.stderr.splitlines()
    assert first.startswith("streamcnn: warning: ")
    assert "are the same, byte for byte: 'a.npy' = 'b.npy'" in first
    assert second.startswith("streamcnn: error: no timm model 'no_such'")


def test_a_warning_is_said_once() -> None:
    with command_line._warnings_as_lines():
        texts = [
            warnings.formatwarning(UserWarning(text), UserWarning, command_line.__file__, 1) for text in "aba"
        ]
    assert texts == ["streamcnn: warning: a\n", "streamcnn: warning: b\n", ""]


def test_a_warning_of_others_has_its_place() -> None:
    line = command_line._warning_line(UserWarning("slow\x1b"), UserWarning, "/usr/lib/other.py", 7)
    assert line == "streamcnn: warning: slow\\x1b (UserWarning, /usr/lib/other.py, line 7)\n"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("error", [None, RuntimeError("a library's own")])
def test_a_signal_is_one_line_whatever_becomes_of_it(
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    number: signal.Signals,
    error: Exception | None,
) -> None:
    def interrupted() -> None:
        try:
            signal.raise_signal(number)
        except KeyboardInterrupt as stopped:
            raise error or stopped from None

    monkeypatch.setattr(command_line, "app", interrupted)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(SystemExit) as caught:
            command_line.run()
    finally:
        signal.signal(signal.SIGINT, before)
    assert (caught.value.code, capfd.readouterr().err) == (
        128 + number,
        f"streamcnn: ended by {number.name}\n",
    )
