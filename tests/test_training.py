"""Training: what a run writes, and that a run that was interrupted ends bitwise as one that was not."""

from __future__ import annotations

import itertools
import os
import signal
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from training_runs import assert_equal, final_state, log_without_times

from streamcnn import ImageSource, StreamingModel, TensorSource
from streamcnn.errors import (
    DamagedCheckpoint,
    DatasetMismatch,
    PlanDoesNotFit,
    RunMismatch,
    TrainingDiverged,
)
from streamcnn.geometry.regions import Region
from streamcnn.training import Terminated, Trainer, TrainSettings, read_log, score
from streamcnn.training.checkpoints import CheckpointFolder, load_checkpoint

SIZE = (40, 36)


class Images:
    """Random images of three classes, whose means tell them apart."""

    def __init__(self, count: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> None:
        self.labels = tuple(position % 3 for position in range(count))
        draw = torch.Generator().manual_seed(seed)
        self.pixels = [torch.randn(1, *SIZE, generator=draw, dtype=dtype) + label for label in self.labels]
        self.fingerprint = f"{count} images of seed {seed}"
        self.epochs: list[int] = []

    def set_epoch(self, epoch: int) -> None:
        self.epochs.append(epoch)

    def prefetch(self, position: int) -> None:
        assert 0 <= position < len(self)

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, position: int) -> tuple[ImageSource, int]:
        return TensorSource(self.pixels[position]), self.labels[position]


def make_net() -> nn.Sequential:
    torch.manual_seed(1)
    return nn.Sequential(
        nn.Conv2d(1, 6, 3, padding=1, bias=False),
        nn.BatchNorm2d(6),
        nn.ReLU(),
        nn.Dropout(0.2),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(6, 3),
    )


class ImagesWithNumbers(Images):
    """Images that look alike, with a number that tells classes apart, and one that says nothing."""

    def __init__(self, count: int, seed: int = 0, width: int = 2) -> None:
        super().__init__(count, seed)
        self.pixels = [torch.zeros_like(each) for each in self.pixels]
        self.width = width

    def __getitem__(self, position: int) -> tuple[ImageSource, int, Tensor]:  # type: ignore[override]
        source, label = super().__getitem__(position)
        return source, label, torch.tensor([label - 1.0, *[0.5] * (self.width - 1)])


class WithNumbers(nn.Module):
    """Takes two numbers of each image besides it."""

    def __init__(self) -> None:
        super().__init__()
        self.features = make_net()
        self.head = nn.Linear(5, 3)

    def forward(self, x: Tensor, numbers: Tensor) -> Tensor:
        found: Tensor = self.head(torch.cat((self.features(x), numbers), 1))
        return found


def make_trainer_with_numbers(folder: Path, *, streamed: bool = True, **changes: Any) -> Trainer:
    torch.manual_seed(2)
    net = WithNumbers()
    net.features[3] = nn.Identity()
    values: dict[str, Any] = {
        "epochs": 6,
        "batch_size": 2,
        "accumulate": 2,
        "learning_rate": 0.1,
        "save_every": 2,
        **changes,
    }
    return Trainer(
        StreamingModel(net, tile=20) if streamed else OnTensors(net),
        ImagesWithNumbers(14),
        ImagesWithNumbers(5, seed=1),
        TrainSettings(**values),
        folder,
    )


class OnTensors(nn.Module):
    """Plain PyTorch on whole images."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, sources: Sequence[ImageSource], *inputs: Tensor) -> Tensor:
        whole = Region.whole(SIZE)
        logits: Tensor = self.net(torch.stack([source.read(whole) for source in sources]), *inputs)
        return logits


def test_further_inputs_go_into_the_model(tmp_path: Path) -> None:
    streamed = make_trainer_with_numbers(tmp_path / "streamed").run()
    assert streamed.best_accuracy == 1.0
    make_trainer_with_numbers(tmp_path / "plain", streamed=False).run()
    found, expected = (
        [line["loss"] for line in read_log(tmp_path / name) if line["kind"] == "update"]
        for name in ("streamed", "plain")
    )
    assert found == pytest.approx(expected, rel=1e-3)


def test_a_run_with_further_inputs_that_was_killed_ends_as_one_that_was_not(tmp_path: Path) -> None:
    make_trainer_with_numbers(tmp_path / "whole", epochs=2).run()
    trainer = make_trainer_with_numbers(tmp_path / "killed", epochs=2)
    original, calls = trainer._step, itertools.count(1)

    def step() -> None:
        original()
        if next(calls) == 3:
            raise Killed

    trainer._step = step  # type: ignore[method-assign]
    with pytest.raises(Killed):
        trainer.run()
    make_trainer_with_numbers(tmp_path / "killed", epochs=2).run()
    assert_equal(final_state(tmp_path / "killed"), final_state(tmp_path / "whole"))


def test_images_and_validation_have_the_same_inputs(tmp_path: Path) -> None:
    trainer = make_trainer_with_numbers(tmp_path)
    trainer.validation = ImagesWithNumbers(5, width=3)
    with pytest.raises(DatasetMismatch, match=r"shapes \(\(2,\),\), and validation images \(\(3,\),\)"):
        trainer.run()
    trainer.validation = Images(5)
    with pytest.raises(DatasetMismatch, match=r"validation images \(\): give both the same inputs"):
        trainer.run()


@cache
def shared_model() -> StreamingModel:
    return StreamingModel(make_net(), tile=20)


def fresh_model() -> StreamingModel:
    """As a new one, but that it knows its plans: to capture each anew takes most of a short run's time."""
    # Captured passes hold in one environment, and pytest makes the test's name a part of that.
    os.environ.pop("PYTEST_CURRENT_TEST", None)
    model = shared_model()
    model.load_state_dict(make_net().state_dict())
    model.zero_grad(set_to_none=True)
    model.train()
    model.budget, model.last_report = None, None
    return model


def make_trainer(folder: Path, net: nn.Module | None = None, **changes: Any) -> Trainer:
    values: dict[str, Any] = {
        "epochs": 3,
        "batch_size": 2,
        "accumulate": 2,
        "schedule": "ExponentialLR",
        "schedule_options": {"gamma": 0.9},
        "ema_decay": 0.9,
        "clip_norm": 1.0,
        "save_every": 2,
        **changes,
    }
    model = fresh_model() if net is None else StreamingModel(net, tile=20)
    return Trainer(
        model, Images(14), Images(5, seed=1), TrainSettings(**values), folder, identity={"model": "small"}
    )


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run without a break, of a model of its own."""
    folder = tmp_path_factory.mktemp("whole")
    make_trainer(folder, make_net()).run()
    return folder


class Killed(BaseException):
    """Stands for the process being gone: nothing may be saved on its way."""


@pytest.mark.parametrize("after", range(1, 12))
def test_a_run_that_was_killed_ends_as_one_that_was_not(whole: Path, tmp_path: Path, after: int) -> None:
    trainer = make_trainer(tmp_path)
    calls = itertools.count(1)
    original = trainer._step

    def step() -> None:
        original()
        if next(calls) == after:
            raise Killed

    trainer._step = step  # type: ignore[method-assign]
    with pytest.raises(Killed):
        trainer.run()
    # Another process would find another state of everything that is random.
    torch.rand(5)
    make_trainer(tmp_path).run()
    assert_equal(final_state(tmp_path), final_state(whole))
    assert log_without_times(tmp_path) == log_without_times(whole)


def test_a_run_learns_and_writes_what_it_does(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, epochs=8, learning_rate=0.05, ema_decay=None)
    result = trainer.run()
    assert result.best_accuracy == 1.0
    assert result.num_epochs == 8
    updates = [line for line in read_log(tmp_path) if line["kind"] == "update"]
    epochs = [line for line in read_log(tmp_path) if line["kind"] == "epoch"]
    # 14 images in updates of two batches of two: three whole ones and one of two images.
    assert [line["update"] for line in updates] == list(range(1, 8 * 4 + 1))
    assert result.num_updates == 32
    assert [line["epoch"] for line in epochs] == list(range(8))
    assert epochs[-1]["loss"] < 0.7 * epochs[0]["loss"]
    assert all(line["projected_bytes"] > 0 for line in updates)
    assert all(line["learning_rate"] == pytest.approx(0.05 * 0.9 ** line["epoch"]) for line in updates)
    assert all(line["retries"] == 0 for line in updates)
    best = load_checkpoint(result.best)
    assert best["progress"]["best"] == result.best.name
    # The epochs' augmentations are drawn anew.
    assert trainer.images.epochs == list(range(8))  # type: ignore[attr-defined]


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float64, 1e-9), (torch.float32, 1e-4)])
def test_the_losses_are_those_of_plain_pytorch(tmp_path: Path, dtype: torch.dtype, bound: float) -> None:
    """Twenty updates with Adam."""
    images = Images(10, dtype=dtype)
    settings = TrainSettings(epochs=4, batch_size=1, accumulate=2, learning_rate=0.01, optimizer="Adam")
    net = make_net().to(dtype)
    net[3] = nn.Identity()  # dropout draws by position in both, but from different streams
    Trainer(StreamingModel(net, tile=16), images, images, settings, tmp_path).run()
    found = [line["loss"] for line in read_log(tmp_path) if line["kind"] == "update"]
    plain = make_net().to(dtype)
    plain[3] = nn.Identity()
    assert found == pytest.approx(plain_losses(plain, images, settings), rel=bound)
    assert len(found) == 20


def pairs(positions: Sequence[int]) -> list[Sequence[int]]:
    return [positions[at : at + 2] for at in range(0, len(positions), 2)]


def plain_losses(net: nn.Module, images: Images, settings: TrainSettings) -> list[float]:
    """The same updates without the trainer, on whole images."""
    from streamcnn.data.sampling import ResumableSampler

    optimizer = torch.optim.Adam(net.parameters(), lr=settings.learning_rate)
    sampler = ResumableSampler(images, seed=settings.seed)
    losses = []
    for epoch in range(settings.epochs):
        for positions in pairs(sampler.order(epoch)):
            optimizer.zero_grad()
            total = 0.0
            for position in positions:
                label = torch.tensor([images.labels[position]])
                loss = F.cross_entropy(net(images.pixels[position][None]), label) / len(positions)
                loss.backward()
                total += float(loss.detach())
            optimizer.step()
            losses.append(total)
    return losses


def test_sigterm_saves_and_ends_the_run(whole: Path, tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, save_every=1000)
    original = trainer._step

    def step() -> None:
        original()
        if trainer.progress.update == 4:
            os.kill(os.getpid(), signal.SIGTERM)

    trainer._step = step  # type: ignore[method-assign]
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(Terminated, match="after update 5; the state is saved"):
        trainer.run()
    assert signal.getsignal(signal.SIGTERM) is before
    assert final_state(tmp_path)["progress"]["update"] == 5
    make_trainer(tmp_path).run()
    assert_equal(final_state(tmp_path), final_state(whole))


def test_a_run_ends_when_it_is_told_to(whole: Path, tmp_path: Path) -> None:
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
    assert_equal(final_state(tmp_path), final_state(whole))


def test_sigterm_is_heeded_in_validation_too(whole: Path, tmp_path: Path) -> None:
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
    assert_equal(final_state(tmp_path), final_state(whole))
    assert log_without_times(tmp_path) == log_without_times(whole)


def damage(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def test_a_damaged_checkpoint_is_passed_over(whole: Path, tmp_path: Path) -> None:
    make_trainer(tmp_path, epochs=2).run()
    newest, before = CheckpointFolder(tmp_path / "checkpoints").paths()[:2]
    damage(newest)
    with pytest.warns(UserWarning, match=rf"{newest.name} is damaged.*going on from {before.name}"):
        make_trainer(tmp_path).run()
    assert_equal(final_state(tmp_path), final_state(whole))
    # It is out of the way, and two intact ones are kept.
    assert newest.with_name(newest.name + ".damaged").exists()
    kept = CheckpointFolder(tmp_path / "checkpoints").paths()[:2]
    assert all(load_checkpoint(path) for path in kept)


def test_an_intact_checkpoint_is_not_removed_for_a_damaged_one(tmp_path: Path) -> None:
    checkpoints = CheckpointFolder(tmp_path)
    for update in (1, 2):
        checkpoints.save({"update": update}, update)
    damage(checkpoints.paths()[0])
    with pytest.warns(UserWarning, match="is damaged"):
        assert checkpoints.newest() == {"update": 1}
    checkpoints.save({"update": 2}, 2)
    assert [load_checkpoint(path)["update"] for path in checkpoints.paths()] == [2, 1]


def test_the_best_is_the_one_that_was_best_at_the_checkpoint(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, epochs=2, save_every=1)
    trainer.run()
    checkpoints = CheckpointFolder(tmp_path / "checkpoints")
    known = load_checkpoint(checkpoints.paths()[0])["progress"]["best"]
    # A later epoch was better, but its checkpoint is damaged.
    later = checkpoints.save({"update": 9}, 9)
    checkpoints.mark_best(later.name)
    damage(later)
    with pytest.warns(UserWarning, match="is damaged"):
        result = make_trainer(tmp_path, epochs=2, save_every=1).run()
    assert result.best.name == known
    assert checkpoints.best() == result.best


def test_a_best_checkpoint_that_is_gone_is_noticed(tmp_path: Path) -> None:
    result = make_trainer(tmp_path, epochs=5, learning_rate=1e-9, ema_decay=None).run()
    assert result.best not in CheckpointFolder(tmp_path / "checkpoints").paths()[:2]
    result.best.unlink()
    with (
        pytest.warns(UserWarning, match=f"{result.best.name}, the best checkpoint, is gone"),
        pytest.raises(DamagedCheckpoint, match="is gone: train for more epochs"),
    ):
        make_trainer(tmp_path, epochs=5, learning_rate=1e-9, ema_decay=None).run()


def test_a_log_that_lacks_lines_is_noticed(tmp_path: Path) -> None:
    make_trainer(tmp_path, epochs=1).run()
    log = tmp_path / "log.jsonl"
    log.write_bytes(log.read_bytes()[:100])
    with pytest.raises(RunMismatch, match=r"log.jsonl has 100 bytes, and had \d+ when"):
        make_trainer(tmp_path).run()
    assert log.stat().st_size == 100


def test_what_may_change_rounding_is_told(tmp_path: Path) -> None:
    make_trainer(tmp_path, epochs=1).run()
    trainer = make_trainer(tmp_path)
    original = trainer._begin

    def begin() -> None:
        original()
        trainer._plan_digest = "another"

    trainer._begin = begin  # type: ignore[method-assign]
    with pytest.warns(UserWarning, match="began with plan .* goes on with another"):
        trainer.run()


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


def test_damage_to_all_checkpoints_is_an_error(tmp_path: Path) -> None:
    make_trainer(tmp_path, epochs=1).run()
    checkpoints = CheckpointFolder(tmp_path / "checkpoints")
    for path in checkpoints.paths():
        damage(path)
    with pytest.raises(DamagedCheckpoint, match=r"no checkpoint in .* can be used.*is damaged.*is damaged"):
        make_trainer(tmp_path).run()
    digest = checkpoints.paths()[0].with_name(checkpoints.paths()[0].name + ".sha256")
    digest.unlink()
    with pytest.raises(DamagedCheckpoint, match="has no digest beside it"):
        load_checkpoint(checkpoints.paths()[0])


def test_the_best_checkpoint_stays_and_older_ones_go(tmp_path: Path) -> None:
    checkpoints = CheckpointFolder(tmp_path)
    assert checkpoints.best() is None
    for update in range(1, 6):
        path = checkpoints.save({"update": update}, update)
        if update == 2:
            checkpoints.mark_best(path.name)
    assert [load_checkpoint(path)["update"] for path in checkpoints.paths()] == [5, 4, 2]
    checkpoints.mark_best(checkpoints.paths()[1].name)
    checkpoints.save({"update": 6}, 6)
    checkpoints.save({"update": 7}, 7)
    assert [load_checkpoint(path)["update"] for path in checkpoints.paths()] == [7, 6, 4]
    assert checkpoints.best() == checkpoints.paths()[-1]
    # Nothing but these, their digests and the marker.
    assert len(list(tmp_path.iterdir())) == 7


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"learning_rate": 0.5}, "learning_rate was 0.001 and is 0.5"),
        ({"batch_size": 1, "seed": 4}, "batch_size was 2 and is 1; seed was 0 and is 4"),
        ({"net": nn.Sequential(nn.Conv2d(1, 3, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten())}, "tensors was"),
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
    with pytest.raises(RunMismatch, match="validation was '5 images of seed 1' and is '5 images of seed 9'"):
        trainer.run()


def test_a_loss_that_is_no_number_ends_the_run(tmp_path: Path) -> None:
    net = make_net()
    with torch.no_grad():
        net[-1].bias.fill_(torch.inf)
    with pytest.raises(TrainingDiverged, match="the loss of update 1 is nan"):
        make_trainer(tmp_path, net).run()
    assert final_state(tmp_path)["progress"]["update"] == 0


def test_a_run_ends_when_it_gets_no_better(tmp_path: Path) -> None:
    result = make_trainer(tmp_path, epochs=50, patience=2, learning_rate=1e-9, ema_decay=None).run()
    assert result.num_epochs < 50
    progress = final_state(tmp_path)["progress"]
    assert progress["epochs_since_best"] == 2
    # More patience lets it go on.
    assert make_trainer(tmp_path, epochs=5, patience=9, learning_rate=1e-9, ema_decay=None).run()


def test_validation_is_by_the_averaged_weights(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, epochs=1, ema_decay=0.5)
    seen: list[Tensor] = []
    original = trainer._validate

    def validate() -> Any:
        with trainer._averaged_weights():
            seen.append(trainer.net.state_dict()["0.weight"].clone())
        return original()

    trainer._validate = validate  # type: ignore[method-assign]
    trainer.run()
    state = final_state(tmp_path)
    assert torch.equal(seen[0], state["averaged"]["module.0.weight"])
    assert not torch.equal(seen[0], state["model"]["0.weight"])


def test_a_score_counts_labels_and_predictions() -> None:
    images = Images(7)
    answers = iter([0, 1, 1, 0, 2, 2, 0])

    def classify(sources: list[ImageSource]) -> Tensor:
        return torch.stack([4.0 * F.one_hot(torch.tensor(next(answers)), 3) for _ in sources])

    found = score(classify, images, batch_size=2)
    # Labels are 0, 1, 2, 0, 1, 2, 0.
    assert found.predictions == (0, 1, 1, 0, 2, 2, 0)
    assert found.confusion == ((3, 0, 0), (0, 1, 1), (0, 1, 1))
    assert found.accuracy == pytest.approx(5 / 7)
    right, wrong = (float(F.cross_entropy(torch.tensor([[4.0, 0, 0]]), torch.tensor([k]))) for k in (0, 1))
    assert found.loss == pytest.approx((5 * right + 2 * wrong) / 7)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"epochs": 0}, "epochs=0: allowed are 1 and more"),
        ({"learning_rate": 0}, "learning_rate=0: allowed are positive numbers"),
        ({"clip_norm": -1.0}, "clip_norm=-1.0: allowed are positive numbers, or None"),
        ({"ema_decay": 1.0}, "ema_decay=1.0: allowed are 0 and more, and less than 1"),
        ({"patience": 0}, "patience=0: allowed are 1 and more, or None"),
        ({"autocast": "int8"}, "autocast='int8': allowed are bfloat16, float16, or None"),
        ({"schedule_every": "day"}, "schedule_every='day': allowed are epoch and update"),
        ({"optimizer": "Adamm"}, "optimizer='Adamm': allowed are .*Adam, .*SGD"),
        ({"schedule": "Optimizer"}, "schedule='Optimizer': allowed are .*ExponentialLR"),
        ({"optimizer_options": {"momentum": 0.9}}, "optimizer='Adam' with .*momentum.*unexpected keyword"),
        ({"optimizer": "LBFGS"}, "optimizer='LBFGS' with .*closure"),
        ({"optimizer": "SparseAdam"}, "optimizer='SparseAdam' with .*dense"),
        ({"schedule": "ExponentialLR"}, "schedule='ExponentialLR' with .*gamma"),
        ({"schedule": "ReduceLROnPlateau", "schedule_every": "update"}, "allowed is schedule_every='epoch'"),
    ],
)
def test_settings_without_meaning_are_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TrainSettings(**values)


def test_a_learning_rate_is_the_one_that_the_update_was_made_with(tmp_path: Path) -> None:
    make_trainer(tmp_path, epochs=1, schedule_every="update").run()
    rates = [line["learning_rate"] for line in read_log(tmp_path) if line["kind"] == "update"]
    assert rates == pytest.approx([1e-3 * 0.9**update for update in range(4)])


def test_trying_settings_out_draws_no_random_numbers() -> None:
    torch.manual_seed(0)
    TrainSettings(optimizer="AdamW", schedule="CosineAnnealingLR", schedule_options={"T_max": 5})
    found = torch.rand(3)
    torch.manual_seed(0)
    assert torch.equal(found, torch.rand(3))


def test_a_label_without_an_output_is_one_clear_error() -> None:
    with pytest.raises(DatasetMismatch, match=r"gives \(2, 2\) for 2 images, one of which has the label 2"):
        score(lambda sources: torch.zeros(len(sources), 2), Images(4), batch_size=2)


def test_tensorboard_finds_the_numbers(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, epochs=1)
    trainer.events = True
    trainer.run()
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(tmp_path / "events"))
    events.Reload()
    found = {event.step: event.value for event in events.Scalars("update/loss")}
    lines = [line for line in read_log(tmp_path) if line["kind"] == "update"]
    assert found == pytest.approx({line["update"]: line["loss"] for line in lines})
    assert events.Scalars("epoch/validation_accuracy")
