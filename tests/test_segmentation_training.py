"""Training of maps of classes: what a run learns, what it refuses, and that it goes on exactly."""

from __future__ import annotations

import io
import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tifffile
import torch
import torch.nn.functional as F
from segmentation_runs import FACTORY, IGNORED, a_config, draw_pair, importable_place, write_pairs
from test_training_resumed import Killed, after_step, kill
from torch import Tensor, nn
from training_runs import assert_equal, final_state, log_without_times

from streamcnn import ImageSource, StreamingModel
from streamcnn.data.augmentation import RandomAugmentation
from streamcnn.data.mask_dataset import MaskDataset
from streamcnn.data.sampling import ResumableSampler
from streamcnn.data.sources import open_image
from streamcnn.errors import CannotWrite, DatasetMismatch, RunMismatch
from streamcnn.geometry.regions import Region
from streamcnn.losses import dice_loss
from streamcnn.metrics import SegmentationScore, class_overlaps
from streamcnn.training import (
    RunConfig,
    Segmentation,
    SegmentationLoss,
    Terminated,
    Trainer,
    TrainSettings,
    load_run,
    make_trainer,
    read_log,
    write_report,
)
from streamcnn.training.segmentation_page import keep_maps

LOSS = SegmentationLoss(name="cross_entropy+dice", ignore_index=IGNORED)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return importable_place(tmp_path_factory.mktemp("segmentation"))


def lines_of(folder: Path, kind: str) -> list[dict[str, Any]]:
    return [line for line in read_log(folder) if line["kind"] == kind]


def test_a_run_learns_and_shows_what_it_has_learnt(place: Path, tmp_path: Path) -> None:
    config = a_config(place / "scenes.csv", loss=LOSS, settings={"epochs": 5, "accumulate": 1})
    result = make_trainer(config, tmp_path).run()
    epochs = lines_of(tmp_path, "epoch")
    assert epochs[-1]["loss"] < 0.7 * epochs[0]["loss"]
    assert epochs[-1]["validation_loss"] < 0.7 * epochs[0]["validation_loss"]
    ious = [line["validation_mean_iou"] for line in epochs]
    assert result.best_score == max(ious) > max(0.7, ious[0])
    assert "accuracy" not in epochs[0]
    # All pixels of the two validation images that count, and the classes that the masks say.
    overlaps = torch.tensor(epochs[-1]["overlaps"])
    assert overlaps[1:].sum(1).tolist() == [2 * 70 * 64] * 2
    assert SegmentationScore(overlaps).mean_iou == ious[-1]
    page = write_report(tmp_path).read_text()
    assert f"Best validation mean IoU {result.best_score:.1%}" in page
    assert page.count("<figure><figcaption>images/") == 2
    # Three curves, and each of the images alone, with its mask and with what is found.
    assert (page.count("data:image/png"), page.count("data:image/jpeg")) == (3, 6)
    assert load_run(tmp_path, trust=[FACTORY]).validation_score == result.best_score


def test_the_maps_on_the_page_are_those_of_the_best_weights(place: Path, tmp_path: Path) -> None:
    config = a_config(place / "scenes.csv", loss=LOSS, settings={"epochs": 2})
    make_trainer(config, tmp_path).run()
    model = load_run(tmp_path, trust=[FACTORY]).model
    images = MaskDataset(place / "scenes.csv", split="val")
    for position in range(2):
        kept = open_image(tmp_path / "maps" / f"{position}.tif")
        written = model.predict_to(images[position][0], tmp_path / f"{position}.zarr", output="classes")
        # Whole, as the image is small; a pixel may be of another class by rounding.
        assert int((_whole(kept) != _whole(open_image(written))).sum()) <= 4


def _whole(source: ImageSource) -> Tensor:
    found: Tensor = source.read(Region.whole(source.shape[1:]))
    return found


def test_maps_are_kept_in_a_runs_own_folder_alone(tmp_path: Path) -> None:
    maps = {0: torch.tensor([[0, 1], [2, 300]]), 3: torch.tensor([[0, 1]])}
    for _ in range(2):
        keep_maps(tmp_path, maps)
    for position, classes in maps.items():
        assert torch.equal(_whole(open_image(tmp_path / "maps" / f"{position}.tif"))[0].long(), classes)
    assert sorted(os.listdir(tmp_path / "maps")) == ["0.tif", "3.tif"]
    run = tmp_path / "run"
    run.mkdir()
    (run / "maps").symlink_to(tmp_path / "maps")
    with pytest.raises(RunMismatch, match=r"run/maps leads to .*: allowed are files and links inside"):
        keep_maps(run, maps)
    (run / "maps").unlink()
    (run / "maps").touch()
    with pytest.raises(CannotWrite, match="run/maps"):
        keep_maps(run, maps)


def resumable(place: Path) -> RunConfig:
    """Of images that are no squares: turned, they have other plans."""
    return a_config(
        place / "scenes.csv",
        loss=LOSS,
        augmentation=RandomAugmentation(mirrors=True, turns=True),
        settings={"schedule": "ExponentialLR", "schedule_options": {"gamma": 0.9}, "ema_decay": 0.9},
    )


@pytest.fixture(scope="module")
def uninterrupted(place: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("uninterrupted")
    make_trainer(resumable(place), folder).run()
    return folder


@pytest.mark.parametrize("after", [1, 3, 4])
def test_a_run_that_was_killed_ends_as_one_that_was_not(
    place: Path, uninterrupted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, after: int
) -> None:
    with monkeypatch.context() as patch:
        after_step(patch, after, kill)
        with pytest.raises(Killed):
            make_trainer(resumable(place), tmp_path).run()
    torch.rand(3)
    make_trainer(resumable(place), tmp_path).run()
    assert_equal(final_state(tmp_path), final_state(uninterrupted))
    assert log_without_times(tmp_path) == log_without_times(uninterrupted)


def test_a_signal_ends_the_check_of_masks_and_leaves_nothing(place: Path, tmp_path: Path) -> None:
    trainer = make_trainer(resumable(place), tmp_path / "run")
    trainer.task = Interrupting(trainer)
    with pytest.raises(Terminated, match="ended by a whim before it began"):
        trainer.run()
    assert not (tmp_path / "run").exists()


class Interrupting(Segmentation):
    """A task whose run is asked to end while its masks are read."""

    def __init__(self, trainer: Trainer) -> None:
        super().__init__(settings=LOSS)
        object.__setattr__(self, "trainer", trainer)

    def check(self, model: nn.Module, images: Any, before_image: Callable[[], None]) -> None:
        self.trainer.end("a whim")  # type: ignore[attr-defined]
        super().check(model, images, before_image)


def small_net() -> nn.Sequential:
    torch.manual_seed(3)
    net = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 3, 1))
    return net.double()


def halved(tile: Tensor) -> Tensor:
    return tile.double() / 255 - 0.5


@pytest.mark.parametrize(
    ("loss", "plain"),
    [
        (LOSS, lambda s, t: F.cross_entropy(s, t, ignore_index=255) + dice_loss(s, t, ignore_index=255)),
        (
            SegmentationLoss(ignore_index=IGNORED, class_weights=(1.0, 2.0, 3.0), label_smoothing=0.1),
            lambda s, t: F.cross_entropy(
                s, t, weight=torch.tensor([1.0, 2.0, 3.0]).double(), ignore_index=255, label_smoothing=0.1
            ),
        ),
    ],
)
def test_updates_and_scores_are_those_of_plain_pytorch(
    place: Path, tmp_path: Path, loss: SegmentationLoss, plain: Any
) -> None:
    """In float64, over updates of two passes and one of a single pass."""
    images = MaskDataset(place / "scenes.csv", split="train", positions=[0, 1, 2])
    settings = TrainSettings(epochs=2, accumulate=2, learning_rate=0.01)
    model = StreamingModel(small_net(), tile=30, preprocess=halved)
    Trainer(model, images, images, settings, tmp_path, task=Segmentation(settings=loss)).run()
    net = small_net()
    expected, score = plain_run(net, images, settings, plain)
    found = [line["loss"] for line in lines_of(tmp_path, "update")]
    assert found == pytest.approx(expected, rel=1e-9)
    last = lines_of(tmp_path, "epoch")[-1]
    assert last["validation_mean_iou"] == pytest.approx(score.mean_iou, abs=1e-3)
    for name, tensor in net.state_dict().items():
        torch.testing.assert_close(model.state_dict()[name], tensor, rtol=1e-9, atol=1e-12)


def plain_run(
    net: nn.Module, images: MaskDataset, settings: TrainSettings, loss: Any
) -> tuple[list[float], SegmentationScore]:
    """The losses of the same updates on whole images, and the score afterwards."""
    optimizer = torch.optim.Adam(net.parameters(), lr=settings.learning_rate)
    sampler = ResumableSampler(images, seed=settings.seed)
    losses = []
    for epoch in range(settings.epochs):
        order = sampler.order(epoch)
        for positions in (order[at : at + 2] for at in range(0, len(order), 2)):
            optimizer.zero_grad()
            losses.append(sum(_backward(net, images, at, loss, len(positions)) for at in positions))
            optimizer.step()
    net.eval()
    overlaps: Tensor = torch.zeros((), dtype=torch.int64)
    for position in range(len(images)):
        image, mask = tensors(images, position)
        overlaps = overlaps + class_overlaps(net(image), mask, ignore_index=IGNORED)
    return losses, SegmentationScore(overlaps)


def _backward(net: nn.Module, images: MaskDataset, position: int, loss: Any, count: int) -> float:
    image, mask = tensors(images, position)
    found = loss(net(image), mask) / count
    found.backward()
    return float(found.detach())


def tensors(images: MaskDataset, position: int) -> tuple[Tensor, Tensor]:
    image, mask = images[position]
    return halved(_whole(image))[None], _whole(mask).long()


def test_a_model_of_one_channel_tells_two_classes_apart(place: Path, tmp_path: Path) -> None:
    for seed in range(4):
        image, mask = draw_pair(seed)
        for name, pixels in (("images", image), ("masks", (mask > 0) * (mask < IGNORED))):
            (tmp_path / name).mkdir(exist_ok=True)
            tifffile.imwrite(tmp_path / name / f"{seed}.tif", pixels.astype("uint8"))
    config = a_config(
        tmp_path / "images",
        masks=str(tmp_path / "masks"),
        model_options={"classes": 1},
        loss=SegmentationLoss(name="cross_entropy+dice"),
        validation_split=None,
        validation_share=0.5,
        settings={"epochs": 6, "accumulate": 1},
    )
    result = make_trainer(config, tmp_path / "run").run()
    assert len(lines_of(tmp_path / "run", "epoch")[0]["overlaps"][0]) == 2
    assert result.best_score > 0.8


def test_losses_of_one_channel_are_binary() -> None:
    scores, target = torch.randn(2, 1, 9, 7), torch.randint(2, (2, 9, 7))
    expected = F.binary_cross_entropy_with_logits(scores[:, 0], target.float())
    torch.testing.assert_close(SegmentationLoss().function()(scores, target), expected)
    both = SegmentationLoss(name="cross_entropy+dice").function()(scores, target)
    torch.testing.assert_close(both, expected + dice_loss(scores, target, "binary"))


def test_one_of_several_results_is_trained_by_its_key(place: Path, tmp_path: Path) -> None:
    values: dict[str, Any] = {"loss": LOSS, "model": "segmenting_nets:Named", "settings": {"epochs": 1}}
    with pytest.raises(DatasetMismatch, match="result is a dict of 'out', 'aux', and key is None: allowed"):
        make_trainer(a_config(place / "scenes.csv", **values), tmp_path / "run").run()
    make_trainer(a_config(place / "scenes.csv", key="out", **values), tmp_path / "run").run()
    picked = {**values, "model": "segmenting_nets:picked"}
    make_trainer(a_config(place / "scenes.csv", **picked), tmp_path / "hook").run()
    with pytest.raises(RunMismatch, match="key was 'out' and is 'aux'"):
        make_trainer(a_config(place / "scenes.csv", key="aux", **values), tmp_path / "run").run()


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        (
            {},
            r"hold the classes 255 \(mask .*tif holds 255\), and the model's result has 3 channels",
        ),
        (
            {"loss": LOSS, "model_options": {"classes": 2}},
            r"classes 2 \(mask .*: allowed are 0 to 1, and 255, which is ignored; correct the masks",
        ),
        (
            {"loss": SegmentationLoss(ignore_index=IGNORED, class_weights=(1.0, 2.0))},
            "there are 2 class_weights, and the model tells 3 classes apart",
        ),
        ({"loss": LOSS, "key": "out"}, "the model's result is a tensor, and key is 'out'"),
        (
            {"loss": LOSS, "model": "segmenting_nets:classifier"},
            r"the model gives \(1, 3\) for an image of shape \(1, 72, 64\): allowed are maps",
        ),
    ],
)
def test_masks_that_do_not_fit_the_model_are_one_error_and_nothing_is_written(
    place: Path, tmp_path: Path, changes: dict[str, Any], text: str
) -> None:
    logged = io.StringIO()
    logger, handler = logging.getLogger("torch._subclasses.fake_tensor"), logging.StreamHandler(logged)
    logger.addHandler(handler)
    try:
        with pytest.raises(DatasetMismatch, match=text):
            make_trainer(a_config(place / "scenes.csv", **changes), tmp_path / "run").run()
    finally:
        logger.removeHandler(handler)
    assert not (tmp_path / "run").exists()
    assert logged.getvalue() == ""


def test_a_mask_that_has_nothing_that_counts_is_named(place: Path, tmp_path: Path) -> None:
    write_pairs(tmp_path, 4)
    _, mask = draw_pair(1)
    tifffile.imwrite(tmp_path / "masks" / "1.tif", 0 * mask + IGNORED)
    with pytest.raises(DatasetMismatch, match=r"1\.tif holds 255 alone, which does not count: take it out"):
        make_trainer(a_config(tmp_path / "scenes.csv", loss=LOSS), tmp_path / "run").run()


def test_another_mask_is_another_run(tmp_path: Path, place: Path) -> None:
    table = write_pairs(tmp_path, 4)
    config = a_config(table, loss=LOSS, settings={"epochs": 1})
    make_trainer(config, tmp_path / "run").run()
    _, mask = draw_pair(0)
    mask[40, 40] = (mask[40, 40] + 1) % 3
    tifffile.imwrite(tmp_path / "masks" / "0.tif", mask)
    with pytest.raises(RunMismatch, match=r"training images or their labels, masks .*\(content"):
        make_trainer(config, tmp_path / "run").run()


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"task": "detection"}, "task='detection': allowed are classification and segmentation"),
        ({"task": "classification", "masks": "/m"}, "masks: allowed for the task segmentation"),
        ({"task": "classification", "loss": LOSS, "key": "a"}, "loss and key: allowed for the task"),
        ({"inputs": ("age",)}, "allowed for the task classification; a model of maps gets the image"),
        ({"settings": {"balanced": True}}, "balanced=True: allowed for the task classification"),
        ({"model": "resnet18"}, "model='resnet18': allowed for segmentation are factories"),
    ],
)
def test_values_of_another_task_are_refused(changes: dict[str, Any], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        a_config(Path("/data"), **changes)


@pytest.mark.parametrize(
    ("values", "text"),
    [
        ({"name": "hinge"}, "loss='hinge': allowed are cross_entropy, dice, tversky, and sums"),
        ({"name": "dice+dice"}, r"loss='dice\+dice'"),
        ({"name": "dice", "label_smoothing": 0.1}, "are of cross_entropy, and the loss is 'dice'"),
        ({"label_smoothing": 1.0}, "label_smoothing=1.0"),
        ({"class_weights": (1.0, -1.0)}, "class_weights"),
        ({"class_weights": ()}, "class_weights"),
        ({"options": {"smooth": 1.0}}, "the loss 'cross_entropy' does not take smooth: leave them out"),
        (
            {"name": "dice", "options": {"alpha": 0.3}},
            "does not take alpha: allowed are classes, eps",
        ),
        ({"name": "dice", "options": {"ignore_index": 3}}, "does not take ignore_index"),
    ],
)
def test_a_loss_without_a_meaning_is_refused(values: dict[str, Any], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        SegmentationLoss(**values)


NEW_KEYS = ("task", "masks", "loss", "key", "class_names")


def test_a_config_is_read_as_it_was_written() -> None:
    loss = SegmentationLoss(
        name="tversky", ignore_index=3, options={"alpha": 0.3, "beta": 0.7, "classes": [0, 1]}
    )
    config = a_config(Path("/data"), masks="/masks", loss=loss, key="out", class_names=("a", "b"))
    assert RunConfig.from_dict(config.to_dict()) == config
    old = {key: value for key, value in a_config(Path("/data")).to_dict().items() if key not in NEW_KEYS}
    assert RunConfig.from_dict(old).task == "classification"


def test_a_model_that_does_not_stream_is_refused(place: Path, tmp_path: Path) -> None:
    images = MaskDataset(place / "scenes.csv", split="train")
    with pytest.raises(ValueError, match="the model is a Sequential: allowed is a Streaming"):
        Trainer(small_net(), images, images, TrainSettings(), tmp_path, task=Segmentation())
