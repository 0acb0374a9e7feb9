"""Training: what a run learns, how it chooses and when it ends."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from training_runs import (
    Images,
    ImagesWithNumbers,
    final_state,
    make_net,
    make_trainer,
    make_trainer_with_numbers,
)

from streamcnn import ImageSource, StreamingModel
from streamcnn.errors import CannotWrite, DatasetMismatch, TrainingDiverged
from streamcnn.training import Trainer, TrainSettings, log, read_log, score
from streamcnn.training.checkpoint_file import load_checkpoint


def test_further_inputs_go_into_the_model(tmp_path: Path) -> None:
    streamed = make_trainer_with_numbers(tmp_path / "streamed").run()
    assert streamed.best_score == 1.0
    make_trainer_with_numbers(tmp_path / "plain", streamed=False).run()
    found, expected = (
        [line["loss"] for line in read_log(tmp_path / name) if line["kind"] == "update"]
        for name in ("streamed", "plain")
    )
    assert found == pytest.approx(expected, rel=1e-3)


def test_images_and_validation_have_the_same_inputs(tmp_path: Path) -> None:
    trainer = make_trainer_with_numbers(tmp_path)
    trainer.validation = ImagesWithNumbers(5, width=3)
    with pytest.raises(DatasetMismatch, match=r"shapes \(\(2,\),\), and validation images \(\(3,\),\)"):
        trainer.run()
    trainer.validation = Images(5)
    with pytest.raises(DatasetMismatch, match=r"validation images \(\): give both the same inputs"):
        trainer.run()


@pytest.mark.parametrize("odd", ["images", "validation"])
def test_images_of_a_batch_have_one_size(tmp_path: Path, odd: str) -> None:
    """It is told before the first update, however late the image would come."""
    trainer = make_trainer(tmp_path, epochs=1)
    images: Images = getattr(trainer, odd)
    images.pixels[3] = torch.randn(1, 44, 36)
    first = 0 if odd == "images" else 2
    text = rf"image 3 \(.*\) has 44 x 36 pixels, and image {first} \(.*\) 40 x 36: images of a batch have one"
    with pytest.raises(DatasetMismatch, match=rf"{text} size, so train one at a time, with --batch 1 --acc"):
        trainer.run()
    assert not list(tmp_path.glob("checkpoints/*"))
    make_trainer(tmp_path / "one by one", epochs=1, batch_size=1).run()


def test_a_run_learns_and_writes_what_it_does(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, epochs=8, learning_rate=0.05, ema_decay=None)
    result = trainer.run()
    assert result.best_score == 1.0
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

    class Watching(Images):
        def __getitem__(self, position: int) -> tuple[ImageSource, int]:
            seen.append(trainer.net.state_dict()["0.weight"].clone())
            return super().__getitem__(position)

    trainer.validation = Watching(5, seed=1)
    trainer.run()
    state = final_state(tmp_path)
    assert torch.equal(seen[-1], state["averaged"]["module.0.weight"])
    assert not torch.equal(seen[-1], state["model"]["0.weight"])


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


def test_a_learning_rate_is_the_one_that_the_update_was_made_with(tmp_path: Path) -> None:
    make_trainer(tmp_path, epochs=1, schedule_every="update").run()
    rates = [line["learning_rate"] for line in read_log(tmp_path) if line["kind"] == "update"]
    assert rates == pytest.approx([1e-3 * 0.9**update for update in range(4)])


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


def test_a_log_is_closed_where_its_events_cannot_be_opened(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(log, "require", lambda *_, **__: SimpleNamespace(SummaryWriter=refuse))
    # What is caught keeps all that was there when it was raised, so nothing is closed by being forgotten.
    with pytest.raises(CannotWrite, match="events: Permission denied"):
        log.RunLog(tmp_path, events=True)
    assert str(tmp_path / log.LOG) not in {os.path.realpath(each) for each in Path("/proc/self/fd").iterdir()}
