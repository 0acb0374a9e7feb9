"""A run that was interrupted ends bitwise as one that was not, or does not go on."""

from __future__ import annotations

import itertools
import os
import signal
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from training_runs import (
    Images,
    assert_equal,
    damage,
    final_state,
    log_without_times,
    make_net,
    make_trainer,
    make_trainer_with_numbers,
)

from streamcnn import ImageSource, StreamingModel
from streamcnn.errors import (
    PlanDoesNotFit,
    RunMismatch,
    TrainingDiverged,
)
from streamcnn.plan.plan import Plan
from streamcnn.training import Terminated, read_log
from streamcnn.training.checkpoint_file import load_checkpoint
from streamcnn.training.checkpoints import CheckpointFolder
from streamcnn.training.optimisation import Optimisation


def test_a_run_with_further_inputs_that_was_killed_ends_as_one_that_was_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_trainer_with_numbers(tmp_path / "uninterrupted", epochs=2).run()
    with monkeypatch.context() as patch:
        after_step(patch, 3, kill)
        with pytest.raises(Killed):
            make_trainer_with_numbers(tmp_path / "killed", epochs=2).run()
    make_trainer_with_numbers(tmp_path / "killed", epochs=2).run()
    assert_equal(final_state(tmp_path / "killed"), final_state(tmp_path / "uninterrupted"))


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run without a break, of a model of its own."""
    folder = tmp_path_factory.mktemp("uninterrupted")
    make_trainer(folder, make_net()).run()
    return folder


class Killed(BaseException):
    """Stands for the process being gone: nothing may be saved on its way."""


def kill() -> None:
    raise Killed


def after_step(patch: pytest.MonkeyPatch, number: int, act: Callable[[], None]) -> None:
    """Have something done when a step of the optimiser has changed the weights, before it is counted."""
    original, calls = Optimisation.step, itertools.count(1)

    def step(optimisation: Optimisation) -> None:
        original(optimisation)
        if next(calls) == number:
            act()

    patch.setattr(Optimisation, "step", step)


@pytest.mark.parametrize("after", range(1, 12))
def test_a_run_that_was_killed_ends_as_one_that_was_not(
    uninterrupted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, after: int
) -> None:
    with monkeypatch.context() as patch:
        after_step(patch, after, kill)
        with pytest.raises(Killed):
            make_trainer(tmp_path).run()
    # Another process would find another state of everything that is random.
    torch.rand(5)
    make_trainer(tmp_path).run()
    assert_equal(final_state(tmp_path), final_state(uninterrupted))
    assert log_without_times(tmp_path) == log_without_times(uninterrupted)


def test_a_schedule_that_makes_its_first_step_after_a_break_is_not_warned_of(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(Optimisation, "end_epoch", lambda *_: kill())
        with pytest.raises(Killed):
            make_trainer(tmp_path, save_every=1).run()
    # Warnings are errors: PyTorch's is that the schedule goes before the optimiser.
    make_trainer(tmp_path, save_every=1).run()


def test_sigterm_saves_and_ends_the_run(
    uninterrupted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = signal.getsignal(signal.SIGTERM)
    with monkeypatch.context() as patch:
        after_step(patch, 5, lambda: os.kill(os.getpid(), signal.SIGTERM))
        with pytest.raises(Terminated, match="after update 5; the state is saved"):
            make_trainer(tmp_path, save_every=1000).run()
    assert signal.getsignal(signal.SIGTERM) is before
    assert final_state(tmp_path)["progress"]["update"] == 5
    make_trainer(tmp_path).run()
    assert_equal(final_state(tmp_path), final_state(uninterrupted))


def test_a_run_ends_when_it_is_told_to(uninterrupted: Path, tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path)

    def listen(kind: str, values: Mapping[str, Any]) -> None:
        if trainer.progress.update == 5:
            trainer.end("a whim")

    trainer.listener = listen
    with pytest.raises(Terminated, match="ended by a whim after update 5; the state is saved"):
        trainer.run()
    # It may be told to go on, in the same process too.
    trainer.listener = None
    trainer.run()
    assert_equal(final_state(tmp_path), final_state(uninterrupted))


def test_sigterm_is_heeded_in_validation_too(uninterrupted: Path, tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path)
    images = trainer.validation

    class Interrupting(Images):
        def __getitem__(self, position: int) -> tuple[ImageSource, int]:
            if position == 2 and trainer.progress.epoch == 1:
                os.kill(os.getpid(), signal.SIGTERM)
            return super().__getitem__(position)

    trainer.validation = Interrupting(len(images), seed=1)
    with pytest.raises(Terminated, match="after update 8; the state is saved"):
        trainer.run()
    progress = final_state(tmp_path)["progress"]
    assert (progress["update"], progress["epoch"]) == (8, 1)
    make_trainer(tmp_path).run()
    assert_equal(final_state(tmp_path), final_state(uninterrupted))
    assert log_without_times(tmp_path) == log_without_times(uninterrupted)


def test_a_damaged_checkpoint_is_passed_over(uninterrupted: Path, tmp_path: Path) -> None:
    make_trainer(tmp_path, epochs=2).run()
    newest, before = CheckpointFolder(tmp_path / "checkpoints").paths()[:2]
    damage(newest)
    with pytest.warns(UserWarning, match=rf"{newest.name} is damaged.*going on from {before.name}"):
        make_trainer(tmp_path).run()
    assert_equal(final_state(tmp_path), final_state(uninterrupted))
    # It is out of the way, and two intact ones are kept.
    assert newest.with_name(newest.name + ".damaged").exists()
    kept = CheckpointFolder(tmp_path / "checkpoints").paths()[:2]
    assert all(load_checkpoint(path) for path in kept)


def test_a_log_that_lacks_lines_is_noticed(tmp_path: Path) -> None:
    make_trainer(tmp_path, epochs=1).run()
    log = tmp_path / "log.jsonl"
    log.write_bytes(log.read_bytes()[:100])
    with pytest.raises(RunMismatch, match=r"log.jsonl has 100 bytes, and had \d+ when"):
        make_trainer(tmp_path).run()
    assert log.stat().st_size == 100


def test_what_may_change_rounding_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_trainer(tmp_path, epochs=1).run()
    monkeypatch.setattr(Plan, "digest", "another")
    with pytest.warns(UserWarning, match="began with plan .* goes on with another"):
        make_trainer(tmp_path).run()


def test_a_start_that_failed_does_not_bind_the_run(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path)
    assert isinstance(trainer.model, StreamingModel)
    trainer.model.budget = 1000
    with pytest.raises(PlanDoesNotFit):
        trainer.run()
    # The folder was there before, and so stays; another process may have opened the lock.
    assert [path.name for path in tmp_path.iterdir()] == ["run.lock"]
    diverging = make_net()
    with torch.no_grad():
        diverging[-1].bias.fill_(torch.inf)
    with pytest.raises(TrainingDiverged):
        make_trainer(tmp_path, diverging).run()
    # No update was made, so other settings are no contradiction.
    assert make_trainer(tmp_path, learning_rate=0.01).run().num_updates == 12


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"learning_rate": 0.5}, "learning_rate was 0.001 and is 0.5"),
        ({"batch_size": 1, "seed": 4}, "batch_size was 2 and is 1; seed was 0 and is 4"),
        (
            {"net": nn.Sequential(nn.Conv2d(1, 3, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten())},
            r": tensors: 0.weight was torch.float32\(6, 1, 3, 3\) and is torch.float32\(3, 1, 1, 1\), ",
        ),
    ],
)
def test_a_run_goes_on_with_what_it_began_with_alone(
    tmp_path: Path, changes: dict[str, Any], named: str
) -> None:
    make_trainer(tmp_path, epochs=1).run()
    before = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    lines = read_log(tmp_path)
    with pytest.raises(RunMismatch, match=named):
        make_trainer(tmp_path, **{"epochs": 2, **changes}).run()
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == before
    assert read_log(tmp_path) == lines


def test_other_images_are_another_run(tmp_path: Path) -> None:
    make_trainer(tmp_path, epochs=1).run()
    trainer = make_trainer(tmp_path)
    trainer.validation = Images(5, seed=9)
    with pytest.raises(
        RunMismatch, match=r"validation images or .*\(5 images of seed 1, now 5 images of seed 9"
    ):
        trainer.run()


@pytest.mark.parametrize("after", [2, 6])
def test_a_checkpoint_of_the_first_format_is_gone_on_with(
    uninterrupted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, after: int
) -> None:
    with monkeypatch.context() as patch:
        after_step(patch, after + 1, kill)
        with pytest.raises(Killed):
            make_trainer(tmp_path).run()
    checkpoints = CheckpointFolder(tmp_path / "checkpoints")
    state = checkpoints.newest()
    assert state is not None
    progress = state["progress"]
    # What there was before there were other tasks.
    state["format"] = 1
    progress["best_accuracy"] = progress.pop("best_score")
    progress["num_right"] = int(progress.pop("sums").get("accuracy", 0))
    checkpoints.save(state, progress["update"])
    make_trainer(tmp_path).run()
    found, expected = final_state(tmp_path), final_state(uninterrupted)
    assert found["progress"] == expected["progress"]
    assert_equal(found["model"], expected["model"])
    assert log_without_times(tmp_path) == log_without_times(uninterrupted)
