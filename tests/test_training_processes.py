"""Training in several processes, compared with one that makes as many forward passes for an update."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import Any

import pytest
import torch
from process_groups import TORCHRUN, in_two_processes, prepare_commands, write_class_folders
from segmentation_runs import IGNORED, a_config, write_factories, write_pairs
from torch import Tensor, nn
from torch import distributed as dist
from training_runs import SIZE, Images, final_state, log_without_times

from streamcnn import ImageSource, StreamingModel
from streamcnn.data.sampling import ResumableSampler
from streamcnn.errors import CannotWrite, CorruptImage, RunMismatch, StreamError
from streamcnn.training import SegmentationLoss, Terminated, Trainer, TrainSettings, make_trainer
from streamcnn.training.segmentation_page import MAPS

pytestmark = pytest.mark.skipif(not dist.is_available(), reason="torch has no distributed package here")

NUM_IMAGES = 13
"""Of which two processes with batches of two and a single pass leave one for the last update."""


def make_net(*, dropout: float = 0.2, synchronised: bool = False) -> nn.Module:
    torch.manual_seed(1)
    net = nn.Sequential(
        nn.Conv2d(1, 6, 3, padding=1, bias=False),
        nn.BatchNorm2d(6),
        nn.ReLU(),
        nn.Conv2d(6, 4, 3, padding=1, bias=False),
        nn.BatchNorm2d(4, momentum=None),
        nn.ReLU(),
        nn.Dropout(dropout),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(4, 3),
    ).double()
    net.register_parameter("unused", nn.Parameter(torch.ones(2)))
    return nn.SyncBatchNorm.convert_sync_batchnorm(net) if synchronised else net


@cache
def shared_model(*, dropout: float, synchronised: bool) -> StreamingModel:
    return StreamingModel(make_net(dropout=dropout, synchronised=synchronised), tile=20)


def a_trainer(folder: Path, *, dropout: float = 0.2, synchronised: bool = False, **changes: Any) -> Trainer:
    # As in training_runs: a new model is captured anew, and one test is one environment.
    os.environ.pop("PYTEST_CURRENT_TEST", None)
    model = shared_model(dropout=dropout, synchronised=synchronised)
    model.load_state_dict(make_net().state_dict())
    count, identity = changes.pop("count", NUM_IMAGES), changes.pop("identity", None)
    images, validation = (Images(*each, torch.float64) for each in ((count, 0), (5, 1)))
    values = {"epochs": 2, "batch_size": 2, "learning_rate": 0.02, "ema_decay": 0.8, "clip_norm": 1.0}
    settings = TrainSettings(**{**values, **changes})
    return Trainer(model, images, validation, settings, folder, identity=identity)


def a_segmentation(folder: Path, place: Path, accumulate: int) -> Trainer:
    loss = SegmentationLoss(ignore_index=IGNORED)
    config = a_config(folder / "scenes.csv", loss=loss, settings={"accumulate": accumulate})
    return make_trainer(config, place)


def raised_by(work: Callable[[], Any]) -> tuple[str, str, Any]:
    """The error of something that fails: its kind, its text, and the rank of the process that is at fault."""
    try:
        work()
    except (StreamError, ValueError, Terminated) as error:
        return type(error).__name__, str(error), getattr(error, "rank", None)
    return "", "", None


class Mean(nn.Module):
    """Gives the mean of what all processes have."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 3, 3)

    def forward(self, x: Tensor) -> Tensor:
        found = self.conv(x).mean((2, 3))
        dist.all_reduce(found)
        return found


class Acting(Images):
    """Images of which one does something when it is asked for."""

    def __init__(self, count: int, seed: int, position: int, act: Callable[[], None]) -> None:
        super().__init__(count, seed, torch.float64)
        self.at, self.act = position, act

    def size_of(self, position: int) -> tuple[int, int]:
        return SIZE

    def __getitem__(self, position: int) -> tuple[ImageSource, int]:
        if position == self.at:
            self.act()
        return super().__getitem__(position)


def damaged() -> None:
    raise CorruptImage("image 5 is damaged")


def full() -> None:
    raise CannotWrite("the disk is full")


def ends(rank: int, folder: Path) -> dict[str, Any]:
    """How runs end that something goes wrong with in one process."""
    corrupt = a_trainer(folder / "corrupt")
    corrupt.images = Acting(NUM_IMAGES, 0, 5, damaged)
    unwritten = a_trainer(folder / "unwritten")
    unwritten.on_start = full
    # The second process has the third image of the first update, and the last one of the validation.
    asked, asked_late = a_trainer(folder / "asked"), a_trainer(folder / "asked late")
    if rank == 1:
        third = ResumableSampler(asked.images).order(0)[2]
        asked.images = Acting(NUM_IMAGES, 0, third, lambda: asked.end("a test"))
        asked_late.validation = Acting(5, 1, 4, lambda: asked_late.end("a test"))
    runs = {
        "corrupt": corrupt.run,
        "unwritten": unwritten.run,
        "asked": asked.run,
        "asked late": asked_late.run,
        "differing": a_trainer(folder / "differing", identity={"model": rank}).run,
        "few": a_trainer(folder / "few", synchronised=True, count=3).run,
        "collective": Trainer(
            StreamingModel(Mean()), Images(4), Images(4), TrainSettings(), folder / "collective"
        ).run,
        "wrapped": partial(
            Trainer,
            nn.parallel.DistributedDataParallel(make_net()),
            Images(3),
            Images(3),
            TrainSettings(),
            folder,
        ),
    }
    return {name: raised_by(run) for name, run in runs.items()}


def train(rank: int, folder: Path) -> dict[str, Any]:
    """Runs in a folder of this process's own, which shows what it writes; how others end."""
    sys.path.insert(0, str(folder))
    place = folder / str(rank)
    a_trainer(place / "whole").run()
    a_trainer(place / "begun", epochs=1).run()
    a_trainer(place / "normed", dropout=0, synchronised=True, batch_size=1, count=14).run()
    a_segmentation(folder, place / "maps", 1).run()
    return ends(rank, place)


def assert_alike(found: Path, expected: Path, rel: float = 1e-9) -> None:
    """The same run, up to rounding."""
    for found_line, line in zip(log_without_times(found), log_without_times(expected), strict=True):
        for each in (found_line, line):
            each.pop("projected_bytes", None)  # of batches, which are larger in one process
        of_floats = [{k: v for k, v in each.items() if isinstance(v, float)} for each in (found_line, line)]
        assert of_floats[0] == pytest.approx(of_floats[1], rel=rel)
        assert {**found_line, **of_floats[1]} == line
    found_state, state = final_state(found), final_state(expected)
    assert found_state["progress"]["update"] == state["progress"]["update"]
    if rel < 1e-6:
        for part in ("model", "averaged"):
            torch.testing.assert_close(found_state[part], state[part], rtol=rel, atol=1e-11)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]]]:
    """The folder in which two processes have trained, and how runs ended in each."""
    folder = tmp_path_factory.mktemp("processes")
    write_pairs(folder)
    write_factories(folder)
    return folder, in_two_processes(train, folder, folder)


Trained = tuple[Path, list[dict[str, Any]]]


def test_a_run_is_that_of_one_process_with_more_passes(trained: Trained, tmp_path: Path) -> None:
    folder, _ = trained
    a_trainer(tmp_path / "one", accumulate=2).run()
    assert_alike(folder / "0" / "whole", tmp_path / "one")
    # The first process alone has written.
    assert not (folder / "1").exists()
    # One goes on with what two began.
    with pytest.raises(RunMismatch, match=r"accumulate \(of all processes together\) was 2 and is 1"):
        a_trainer(folder / "0" / "begun").run()
    a_trainer(folder / "0" / "begun", accumulate=2).run()
    assert_alike(folder / "0" / "begun", tmp_path / "one")


def test_synchronised_norms_make_a_run_that_of_larger_batches(trained: Trained, tmp_path: Path) -> None:
    a_trainer(tmp_path, dropout=0, count=14).run()
    assert_alike(trained[0] / "0" / "normed", tmp_path)


def test_a_segmentation_is_that_of_one_process(
    trained: Trained, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, _ = trained
    monkeypatch.syspath_prepend(folder)
    a_segmentation(folder, tmp_path, 2).run()
    found = folder / "0" / "maps"
    assert_alike(found, tmp_path, rel=1e-4)
    names = [sorted(each.name for each in (place / MAPS).iterdir()) for place in (found, tmp_path)]
    assert names[0] == names[1]


@pytest.mark.parametrize(
    ("name", "kind", "text"),
    [
        ("corrupt", "CorruptImage", "image 5 is damaged (update"),
        ("unwritten", "CannotWrite", "the disk is full"),
        ("differing", "RunMismatch", "process 1 differs from the first in 'model'"),
        ("few", "DatasetMismatch", "2 processes with 2 images each together: start fewer processes"),
    ],
)
def test_an_error_in_one_process_ends_all(trained: Trained, name: str, kind: str, text: str) -> None:
    ended = [each[name] for each in trained[1]]
    assert sorted(kind for kind, _, _ in ended) == sorted([kind, "OtherProcessFailed"])
    for rank, (found, said, at_fault) in enumerate(ended):
        assert text in said
        # Others name the one that raises it.
        assert at_fault == (None if found == kind else 1 - rank)


def test_one_process_ends_the_run_of_all(trained: Trained) -> None:
    folder, ended = trained
    for name, update in (("asked", 1), ("asked late", 4)):
        expected = ("Terminated", f"ended by a test after update {update}; the state is saved", None)
        assert [each[name] for each in ended] == [expected, expected]
        progress = final_state(folder / "0" / name)["progress"]
        assert (progress["update"], progress["epoch"]) == (update, 0)


def test_a_model_that_brings_processes_together_itself_is_refused(trained: Trained) -> None:
    for each in trained[1]:
        kind, text, _ = each["wrapped"]
        assert (kind, "give the model itself" in text) == ("ValueError", True)
        assert "the model calls torch.distributed in its forward pass" in each["collective"][1]


def test_what_makes_up_no_multiple_is_left_out_of_an_epoch() -> None:
    sampler = ResumableSampler(range(8), multiple=3)
    assert (len(sampler), sampler.num_left_out) == (6, 2)
    whole = ResumableSampler(range(8))
    for epoch in range(4):
        assert list(sampler) == whole.order(epoch)[:6]
    assert len({frozenset(sampler.order(epoch)) for epoch in range(4)}) > 1


FACTORY = """
from torch import nn

def small():
    return nn.Sequential(
        nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout(0.1),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2),
    )
"""


def test_the_command_ends_in_several_processes_as_in_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """torchrun hands a signal on to all."""
    write_class_folders(tmp_path / "images", ("train", "val"))
    (tmp_path / "processes_nets.py").write_text(FACTORY)
    prepare_commands(tmp_path, monkeypatch)
    folder = tmp_path / "run"
    command = ["train", "processes_nets:small", str(tmp_path / "images")]
    options = ["--validation-split=val", "--tile=20", "--save-every=1"]
    process = subprocess.Popen(
        [*TORCHRUN, "-m", "streamcnn", *command, f"--out={folder}", *options, "--epochs=9999"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "2 processes, updates of 2 images\n"
    first = process.stdout.readline()
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=120)
    lines = (first + out).splitlines()
    assert [line.partition(":")[0] for line in lines] == [f"epoch {at + 1}" for at in range(len(lines))]
    update = final_state(folder)["progress"]["update"]
    assert [line for line in err.splitlines() if line.startswith("streamcnn: ")] == [
        "streamcnn: SIGTERM: saving after the present update; once more stops at once",
        f"streamcnn: ended by SIGTERM after update {update}; the state is saved; the same command goes on",
    ]
