"""The commands train, evaluate and predict, as processes where signals end them."""

from __future__ import annotations

import json
import platform
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from training_runs import assert_equal, final_state, log_without_times

from streamcnn.cli.arguments import parse_key_values
from streamcnn.cli.training_options import RunOptions, SettingsOptions
from streamcnn.training import RunConfig, load_run, read_log
from streamcnn.training.checkpoints import CheckpointFolder
from streamcnn.training.runs import read_run

Run = Callable[..., tuple[int, str, str]]

FACTORY = """
from torch import nn

def small(width=4):
    return nn.Sequential(
        nn.Conv2d(3, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU(), nn.Dropout(0.1),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 2),
    )
"""

TRUST = "--trust=factories:small"
"""What evaluate and predict need to call that factory."""
TRUST_NUMBERS = "--trust=factories:WithNumbers"


@pytest.fixture
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a factory of models and images of two classes, bright and dark."""
    draw = np.random.default_rng(0)
    for split, count in (("train", 12), ("val", 4), ("test", 6)):
        for index in range(count):
            name, middle = ("bright", 180) if index % 2 else ("dark", 70)
            folder = tmp_path / "images" / split / name
            folder.mkdir(parents=True, exist_ok=True)
            pixels = draw.integers(middle - 60, middle + 60, (34, 30, 3))
            Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{index}.png")
    (tmp_path / "factories.py").write_text(FACTORY)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    return tmp_path


def arguments(workplace: Path, out: str = "run", **changes: Any) -> list[str]:
    options = {"validation-split": "val", "epochs": 6, "batch": 2, "tile": 20, "learning-rate": 0.05}
    flat = [f"--{name}={value}" for name, value in {**options, **changes}.items()]
    return ["train", "factories:small", str(workplace / "images"), f"--out={workplace / out}", *flat]


WITH_NUMBERS = """

class WithNumbers(nn.Module):
    def __init__(self):
        super().__init__()
        self.features, self.head = small(), nn.Linear(4, 2)

    def forward(self, x, numbers):
        return self.head(torch.cat((self.features(x), numbers), 1))
"""


@pytest.fixture
def table(workplace: Path) -> Path:
    """All images, grey, so that only the column ``side`` tells classes apart, and a model that reads it."""
    with (workplace / "factories.py").open("a") as file:
        file.write("import torch\n" + WITH_NUMBERS)
    rows = []
    for path in sorted((workplace / "images").rglob("*.png")):
        Image.fromarray(np.full((34, 30, 3), 128, np.uint8)).save(path)
        split, name = path.relative_to(workplace / "images").parts[:2]
        rows.append(f"{path.relative_to(workplace)},{name},{split},{1 if name == 'dark' else -1},0.5")
    table = workplace / "table.csv"
    table.write_text("\n".join(["image,label,split,side,other", *rows, ""]))
    return table


def with_inputs(table: Path, inputs: str = "side,other", **changes: Any) -> list[str]:
    parts = arguments(table.parent, **{"inputs": inputs, **changes})
    return [parts[0], "factories:WithNumbers", str(table), *parts[3:]]


def test_numbers_of_a_table_go_into_the_model(table: Path, run: Run) -> None:
    status, out, err = run(*with_inputs(table, epochs=4))
    assert (status, err) == (0, "")
    assert "best validation accuracy 100.0%" in out
    folder = table.parent / "run"
    assert read_run(folder).inputs == ("side", "other")
    assert (folder / "report.html").exists()
    # The same command goes on, one with other inputs does not.
    assert run(*with_inputs(table, epochs=5))[0] == 0
    status, _, err = run(*with_inputs(table, "other,side", epochs=5))
    assert (status, "inputs was ['side', 'other'] and is ['other', 'side']" in err) == (1, True)

    status, out, _ = run("evaluate", TRUST_NUMBERS, folder, "--json")
    assert (status, json.loads(out)["accuracy"]) == (0, 1.0)
    new = table.parent / "new.csv"
    new.write_text("image,place,rest\nimages/val/dark/0.png,1,0.5\nimages/val/dark/2.png,-1,0.5\n")
    status, out, _ = run("predict", TRUST_NUMBERS, folder, new, "--inputs", "place,rest", "--json")
    answers = [json.loads(line) for line in out.splitlines()]
    assert [(answer["class"], Path(answer["image"]).name) for answer in answers] == [
        ("dark", "0.png"),
        ("bright", "2.png"),
    ]
    status, _, err = run("predict", TRUST_NUMBERS, folder, new)
    assert (status, "there is no 'side', 'other' for inputs" in err) == (1, True)
    status, _, err = run("predict", TRUST_NUMBERS, folder, table.parent / "images")
    assert (status, "CSV file with the columns image,side,other" in err) == (2, True)
    for command in (("predict", TRUST_NUMBERS, folder, new), ("evaluate", TRUST_NUMBERS, folder)):
        status, _, err = run(*command, "--inputs", "place")
        assert (status, "was trained with side,other: allowed are as many columns" in err) == (2, True)


@pytest.mark.parametrize(
    ("inputs", "expected", "message"),
    [
        ("side,none", 1, "there is no 'none' for inputs"),
        ("split", 2, "other than image, label and split"),
        ("side,side", 2, "each once"),
        ("side", 1, "the model cannot be captured"),
    ],
)
def test_wrong_inputs_are_refused(table: Path, run: Run, inputs: str, expected: int, message: str) -> None:
    status, _, err = run(*with_inputs(table, inputs))
    assert (status, message in err) == (expected, True), err


def test_a_run_from_before_there_were_inputs_goes_on(workplace: Path, run: Run) -> None:
    assert run(*arguments(workplace, epochs=1))[0] == 0
    path = workplace / "run" / "run.json"
    values = json.loads(path.read_text())
    del values["inputs"]
    path.write_text(json.dumps(values))
    assert read_run(workplace / "run").inputs == ()
    assert run("evaluate", TRUST, workplace / "run")[0] == 0
    checkpoints = CheckpointFolder(workplace / "run" / "checkpoints")
    state = checkpoints.newest()
    assert state is not None
    del state["identity"]["inputs"]
    checkpoints.save(state, state["progress"]["update"])
    status, out, _ = run(*arguments(workplace, epochs=2))
    assert (status, "12 updates in 2 epochs" in out) == (0, True)


def start(arguments: list[str], ignored: str = "") -> subprocess.Popen[str]:
    # Whatever the process that runs the tests ignores: under nohup it ignores SIGHUP, for example.
    code = f"""
import signal
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGTERM, signal.SIG_DFL)
signal.signal(signal.SIGHUP, signal.SIG_DFL)
if {ignored!r}:
    signal.signal(getattr(signal, {ignored!r}), signal.SIG_IGN)
from streamcnn.cli import main
main()
"""
    command = [sys.executable, "-c", code, *arguments]
    return subprocess.Popen(command, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def test_a_classifier_is_trained_evaluated_and_asked(workplace: Path, run: Run) -> None:
    status, out, err = run(*arguments(workplace, budget="1GiB"))
    assert (status, err) == (0, "")
    assert "epoch 6: loss" in out
    assert "36 updates in 6 epochs; best validation accuracy 100.0%" in out
    folder = workplace / "run"
    assert "0 of 4 validation images misclassified" in (folder / "report.html").read_text()
    first = read_log(folder)[0]
    assert (first["kind"], first["measured_bytes"] > 0) == ("update", True)

    status, out, _ = run("evaluate", TRUST, folder)
    assert status == 0
    assert out.splitlines()[0].startswith("accuracy 100.0% of 6 images")
    assert out.splitlines()[1:] == ["  bright: 3 of 3", "  dark: 3 of 3"]
    status, out, _ = run("evaluate", TRUST, folder, "--json", "--split", "val", "--batch", 3)
    found = json.loads(out)
    assert (found["accuracy"], found["confusion"], found["num_images"]) == (1.0, [[2, 0], [0, 2]], 4)

    status, out, _ = run("predict", TRUST, folder, workplace / "images" / "test" / "dark", "--json")
    answers = [json.loads(line) for line in out.splitlines()]
    assert [answer["class"] for answer in answers] == ["dark"] * 3
    assert all(answer["label"] == 1 and 0.5 < answer["probability"] <= 1 for answer in answers)
    status, out, _ = run("predict", TRUST, folder, workplace / "images" / "test" / "dark" / "0.png")
    assert out.startswith(f"{workplace / 'images' / 'test' / 'dark' / '0.png'}: dark, ")


def test_a_timm_model_takes_classes_and_channels_of_the_images(workplace: Path, run: Run) -> None:
    parts = arguments(workplace, epochs=1)
    status, _, err = run("train", "resnet18", *parts[2:])
    assert (status, err) == (0, "")
    trained = load_run(workplace / "run")
    assert trained.model.state_dict()["fc.weight"].shape[0] == 2
    assert not trained.model.training


def test_images_of_one_class_are_refused(workplace: Path, run: Run) -> None:
    shutil.rmtree(workplace / "images" / "train" / "bright")
    shutil.rmtree(workplace / "images" / "val" / "bright")
    shutil.rmtree(workplace / "images" / "test" / "bright")
    status, _, err = run("train", "resnet18", *arguments(workplace)[2:])
    assert (status, "the model has one class" in err) == (1, True)


MORE_CLASSES = """
def more():
    net = small()
    net[-1] = nn.Linear(4, 5)
    nn.init.constant_(net[-1].bias[4:], 100)
    return net
"""


def test_classes_of_the_model_that_no_image_has_are_told_by_number(workplace: Path, run: Run) -> None:
    (workplace / "more_factories.py").write_text(FACTORY + MORE_CLASSES)
    assert run("train", "more_factories:more", *arguments(workplace, epochs=1)[2:])[0] == 0
    image = workplace / "images" / "test" / "dark" / "0.png"
    status, out, err = run("predict", "--trust=more_factories:more", workplace / "run", image, "--json")
    assert (status, err) == (0, "")
    assert [json.loads(out)[key] for key in ("label", "class")] == [4, "4"]


def test_averaged_weights_are_those_that_are_used(workplace: Path, run: Run) -> None:
    run(*arguments(workplace, **{"ema-decay": 0.9, "epochs": 1}))
    saved = final_state(workplace / "run")
    weights = load_run(workplace / "run", trust=["factories:small"]).model.state_dict()
    assert torch.equal(weights["0.weight"], saved["averaged"]["module.0.weight"])
    assert not torch.equal(weights["0.weight"], saved["model"]["0.weight"])


def test_the_same_command_goes_on_and_another_one_does_not(workplace: Path, run: Run) -> None:
    assert run(*arguments(workplace, epochs=1))[0] == 0
    status, out, _ = run(*arguments(workplace, epochs=2))
    assert (status, "12 updates in 2 epochs" in out) == (0, True)
    status, _, err = run(*arguments(workplace, epochs=2, batch=3))
    assert status == 1
    assert "batch_size was 2 and is 3" in err
    assert read_run(workplace / "run").settings.batch_size == 2
    status, _, err = run(*arguments(workplace, epochs=2, std=0.25))
    assert (status, "normalise: std was 0.5 and is 0.25" in err) == (1, True)
    assert run(*arguments(workplace, "other", epochs=2))[0] == 0
    assert log_without_times(workplace / "other") == log_without_times(workplace / "run")


without_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"epochs": 0}, "epochs=0: allowed are 1 and more"),
        ({"optimizer": "Adamm"}, "optimizer='Adamm': allowed are"),
        ({"std": 0}, "std=0.0: allowed are positive numbers"),
        ({"validation-share": 2}, "validation_share=2.0: allowed are shares between 0 and 1"),
        ({"model-option": "width"}, "--model-option: cannot read 'width': allowed is KEY=VALUE"),
        ({"budget": "many"}, "--budget: "),
        ({"device": "cuda:99x"}, "device='cuda:99x': allowed are cpu and cuda"),
        pytest.param({"device": "cuda"}, "device='cuda': there is cpu here", marks=without_gpu),
        ({"model-option": "depth=3"}, "factories:small cannot be called with depth=3: got an unexpected"),
        ({"schedule": "StepLR"}, "schedule='StepLR' with schedule_options={}: "),
    ],
)
def test_wrong_usage_leaves_nothing(workplace: Path, run: Run, changes: dict[str, Any], message: str) -> None:
    status, _, err = run(*arguments(workplace, **changes))
    assert (status, message in err) == (2, True), err
    assert not (workplace / "run").exists()


def test_turned_images_that_are_no_squares_are_trained_on_one_by_one(workplace: Path, run: Run) -> None:
    # A batch in which one is turned would otherwise end the run, in whichever epoch that is drawn.
    flags = ["--turns", "--epochs=1"]
    status, _, err = run(*arguments(workplace), *flags)
    assert (status, "is not square" in err, "--batch 1 --accumulate 2" in err) == (1, True, True), err
    assert run(*arguments(workplace, batch=1, accumulate=2), *flags)[0] == 0


def test_too_few_classes_are_one_clear_error(workplace: Path, run: Run) -> None:
    (workplace / "labels.csv").write_text("image,label\nimages/train/dark/0.png,5\nimages/val/dark/0.png,5\n")
    parts = arguments(workplace)
    status, _, err = run(
        *parts[:2], workplace / "labels.csv", parts[3], "--validation-share=0.5", "--epochs=1"
    )
    assert status == 1
    assert "the model gives (1, 2) for 1 images, one of which has the label 5" in err


def test_classes_are_those_that_the_run_was_trained_with(workplace: Path, run: Run) -> None:
    assert run(*arguments(workplace, epochs=6))[0] == 0
    folder, images = workplace / "run", workplace / "images"
    # Alone, it would be class 0.
    (workplace / "some.csv").write_text("image,label\nimages/test/dark/0.png,dark\n")
    status, out, _ = run("evaluate", TRUST, folder, "--data", workplace / "some.csv", "--split", "train")
    assert (status, out.splitlines()[1:]) == (0, ["  dark: 1 of 1"])
    (workplace / "some.csv").write_text("image,label\nimages/test/dark/0.png,grey\n")
    status, _, err = run("evaluate", TRUST, folder, "--data", workplace / "some.csv", "--split", "train")
    assert (
        status,
        "there are images of 'grey'; known classes are 'bright', 'dark': give" in err,
    ) == (1, True)
    (workplace / "some.csv").write_text("image,label\nimages/test/dark/0.png,1\n")
    status, _, err = run("evaluate", TRUST, folder, "--data", workplace / "some.csv", "--split", "train")
    assert (status, "labels are numbers here, and names where the classes are from" in err) == (1, True)
    shutil.copy(images / "test" / "dark" / "0.png", workplace / "new.png")
    shutil.rmtree(images)
    status, out, _ = run("predict", TRUST, folder, workplace / "new.png")
    assert (status, ": dark, " in out) == (0, True)


def test_a_table_in_another_encoding_is_a_clear_error(workplace: Path, run: Run) -> None:
    (workplace / "labels.csv").write_bytes("image,label\na.png,größe\n".encode("latin-1"))
    parts = arguments(workplace)
    status, _, err = run(*parts[:2], workplace / "labels.csv", *parts[3:])
    assert (status, "save it as CSV in UTF-8" in err) == (1, True)


def test_a_run_file_that_cannot_be_read_is_a_clear_error(workplace: Path, run: Run) -> None:
    (workplace / "run").mkdir()
    (workplace / "run" / "run.json").write_text("{")
    status, _, err = run("evaluate", workplace / "run")
    assert (status, "run.json is no valid JSON" in err) == (1, True)


def test_no_run_is_a_clear_error(tmp_path: Path, run: Run) -> None:
    for command in (("evaluate", tmp_path), ("predict", tmp_path, tmp_path)):
        status, _, err = run(*command)
        assert (status, f"{tmp_path} has no run" in err) == (1, True)


def test_options_of_options_are_read_as_json_or_text() -> None:
    found = parse_key_values(["momentum=0.9", "nesterov=true", "mode=max", "betas=[0.9, 0.99]"])
    assert found == {"momentum": 0.9, "nesterov": True, "mode": "max", "betas": [0.9, 0.99]}
    with pytest.raises(ValueError, match="mode is given twice"):
        parse_key_values(["mode=min", "mode=max"])
    with pytest.raises(ValueError, match="a is nested too deeply: allowed are plain values"):
        parse_key_values([f"a={'[' * 100_000}"])


@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    ("number", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130), (signal.SIGHUP, 129)]
)
def test_a_signal_saves_and_has_a_status_of_its_own(
    workplace: Path, number: signal.Signals, status: int
) -> None:
    process = start(arguments(workplace, epochs=100000))
    wait_for_checkpoint(workplace / "run", process, after=0)
    process.send_signal(number)
    _, err = process.communicate(timeout=300)
    assert process.returncode == status, err
    update = final_state(workplace / "run")["progress"]["update"]
    assert f"ended by {number.name} after update {update}; the state is saved" in err


@pytest.mark.timeout(900)
def test_one_process_trains_in_a_folder_and_others_may_read_it(workplace: Path, run: Run) -> None:
    folder = workplace / "run"
    assert run(*arguments(workplace, epochs=1))[0] == 0
    process = start(arguments(workplace, epochs=100000))
    wait_for_checkpoint(folder, process, after=6)
    status, out, err = run(*arguments(workplace, epochs=100000))
    assert (status, out) == (1, "")
    assert err == (
        f"streamcnn: error: {folder} is in use: process {process.pid} on {platform.node()} trains there; "
        "wait until it is over, stop it, or give another folder\n"
    )
    assert run("evaluate", TRUST, folder)[0] == 0
    process.kill()
    process.communicate(timeout=300)
    updates = newest_update(folder)
    status, out, err = run(*arguments(workplace, epochs=-(-updates // 6)))
    assert (status, err) == (0, "")
    numbers = [line["update"] for line in read_log(folder) if line["kind"] == "update"]
    assert numbers == list(range(1, len(numbers) + 1))
    assert not (folder / "run.pid").exists()


@pytest.mark.timeout(900)
def test_a_signal_that_was_ignored_is_ignored(workplace: Path) -> None:
    process = start(arguments(workplace, epochs=100000), ignored="SIGHUP")
    wait_for_checkpoint(workplace / "run", process, after=0)
    process.send_signal(signal.SIGHUP)
    wait_for_checkpoint(workplace / "run", process, after=newest_update(workplace / "run"))
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=300)
    assert (process.returncode, "SIGHUP" in err) == (130, False)


@pytest.mark.timeout(900)
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_that_ends_another_command_has_its_status(workplace: Path, number: signal.Signals) -> None:
    picture = workplace / "images" / "train" / "dark" / "0.png"
    for index in range(2000):
        shutil.copy(picture, picture.with_name(f"copy-{index}.png"))
    out = workplace / "out"
    process = start(["convert", str(workplace / "images"), str(out)])
    while not any((out / "images").glob("*")):
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)
    process.send_signal(number)
    _, err = process.communicate(timeout=300)
    assert process.returncode == 128 + number
    assert err.splitlines() == [
        "streamcnn: finished images are kept; the same command goes on",
        f"streamcnn: ended by {number.name}",
    ]
    assert not list(out.rglob("*.partial"))


def newest_update(folder: Path) -> int:
    """Of the newest checkpoint; -1 if there is none."""
    names = [path.stem for path in (folder / "checkpoints").glob("save-*.pt")]
    return max((int(name.partition("-update-")[2]) for name in names), default=-1)


def wait_for_checkpoint(folder: Path, process: subprocess.Popen[str], after: int) -> None:
    """Until there is a checkpoint of more than so many updates, or the process is over."""
    deadline = time.monotonic() + 300
    while process.poll() is None and newest_update(folder) <= after:
        assert time.monotonic() < deadline, "the run wrote no checkpoint"
        time.sleep(0.001)


@pytest.mark.timeout(3600)
@pytest.mark.parametrize("num_kills", [2, pytest.param(20, marks=pytest.mark.slow)])
def test_a_run_that_is_killed_again_and_again_ends_as_if_it_were_not(
    workplace: Path, run: Run, num_kills: int
) -> None:
    """By SIGKILL, at random moments: in updates, in validation and while checkpoints are written.

    The run that is not killed is this process's: another one needs as long to begin as to train.
    """
    torch.set_num_threads(1)
    options = {"epochs": 6 * num_kills, "save-every": 2, "schedule": "ExponentialLR", "clip-norm": 1}
    options |= {"schedule-option": "gamma=0.99", "ema-decay": 0.9}
    status, _, err = run(*arguments(workplace, "whole", **options))
    assert status == 0, err
    moments = random.Random(num_kills)
    for _ in range(num_kills):
        process = start(arguments(workplace, "killed", **options))
        wait_for_checkpoint(workplace / "killed", process, after=newest_update(workplace / "killed"))
        time.sleep(moments.uniform(0, 0.4))
        process.send_signal(signal.SIGKILL)
        _, err = process.communicate(timeout=1200)
        assert "damaged" not in err
        assert process.returncode == -signal.SIGKILL, "the run was over too early for all kills"
    # In a process of its own: PyTorch warns of a schedule that goes on, which is an error in this one.
    process = start(arguments(workplace, "killed", **options))
    _, err = process.communicate(timeout=1200)
    assert "damaged" not in err
    assert process.returncode == 0, err
    assert_equal(final_state(workplace / "killed"), final_state(workplace / "whole"))
    assert log_without_times(workplace / "killed") == log_without_times(workplace / "whole")


def test_brackets_in_the_name_of_a_run_are_no_markup(workplace: Path, run: Run) -> None:
    status, out, err = run(*arguments(workplace, "run[/bold]", epochs=1))
    assert (status, err) == (0, "")
    assert f"page: {workplace}/run[/bold]/report.html" in out


def test_options_that_are_not_given_are_as_in_the_library(tmp_path: Path) -> None:
    config = RunOptions().config("resnet18", str(tmp_path), SettingsOptions())()
    assert config == RunConfig(model="resnet18", data=str(tmp_path.resolve()))
