"""One row of the table: a method trained and scored under its ceiling, in a process of its own.

The budget counts from before the network is made, so weights, gradients and the optimiser's state are part of
it, and it holds in training and in inference. On the CPU the kernel refuses what goes past it; on a GPU
PyTorch's allocator is capped and NVML is read all through.
"""

from __future__ import annotations

import gc
import re
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.harness.classifiers import (
    LearnedResizer,
    PatchGD,
    TileVote,
    WholeImages,
    grid_size,
    make_net,
    read_whole,
)
from benchmarks.harness.images import ShrunkImages, fingerprint_of, steps_to
from benchmarks.harness.method import Kind, Method, Stage
from benchmarks.harness.scales import Scale
from streamcnn import BudgetExceeded, PlanDoesNotFit, StreamingModel
from streamcnn.ceiling.device import Ceiling, ceiling_for
from streamcnn.ceiling.refusals import is_out_of_memory
from streamcnn.data.augmentation import RandomAugmentation
from streamcnn.data.dataset import ImageDataset, TileDataset
from streamcnn.data.normalisation import Normalise
from streamcnn.data.sampling import divide
from streamcnn.data.sources import ImageSource, TensorSource
from streamcnn.data.tile_store import TileStore
from streamcnn.training import Trainer, TrainSettings, score
from streamcnn.training.checkpoints import CheckpointFolder, load_checkpoint
from streamcnn.training.evaluation import require_metrics
from streamcnn.training.runs import best_weights

VALIDATION_SHARE = 0.1
PATIENCE = 10
"""Epochs without a better validation accuracy after which training ends."""
UNKNOWN_BATCH = 4096
"""Where the search for the largest batch ends if nothing else ends it."""
HOST_SLACK = 3 * 2**23
"""Bytes of a streamed row's budget that are left to the interpreter between passes."""
ADAM_COPIES = 3
"""Weights, and the two averages that Adam keeps of each."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """What is to be done."""

    method: Method
    scale: Scale
    budget: int
    """Bytes, for training and for inference."""
    seed: int
    pretrained: bool
    device: str
    images: Path
    """Tile store of the scale's images."""
    folder: Path
    """For checkpoints and shrunk images."""


class OutOfTime(Exception):
    """The scale's seconds are over."""


class Refused(Exception):
    """The method does not fit its budget."""


def run(task: Task) -> dict[str, Any]:
    """Train and score; what was found, or why the ceiling refused it, as JSON has it."""
    store = TileStore(task.images)
    _warm_up(store)
    ceiling = ceiling_for(torch.device(task.device))
    stages = task.method.stages or (Stage(resolution=task.method.resolution or 0, learning_rate=0.0),)
    what = {
        "images": fingerprint_of(store),
        "digits": store.head.provenance["digits"],
        "versions": _versions(),
    }
    found: dict[str, Any] = {}
    weights: Mapping[str, Any] | None = None
    try:
        for number, stage in enumerate(stages):
            weights, found = _train(task, stage, number, weights, store, ceiling)
    except Refused as error:
        return {"outcome": "refused", "reason": str(error), **found, **what}
    return {"outcome": "finished", "reason": None, **found, **what}


def _versions() -> dict[str, str]:
    """Of the libraries that a result depends on besides PyTorch."""
    return {name: version(name) for name in ("streamcnn", "timm", "torchvision", "numpy", "zarr")}


def _warm_up(store: TileStore) -> None:
    """Start threads, and load code that is loaded at its first use, some 150 MB: not the method's doing."""
    source, _ = TileDataset(store, "test")[0]
    read_whole(source)
    require_metrics()
    net = nn.Sequential(nn.Conv2d(source.shape[0], 2, 3), nn.BatchNorm2d(2), nn.AdaptiveAvgPool2d(1))
    for model in (StreamingModel(net, tile=64, preprocess=Normalise()), WholeImages(net)):
        optimizer = torch.optim.Adam(model.parameters())
        model([source]).sum().backward()
        optimizer.step()


def _train(
    task: Task,
    stage: Stage,
    number: int,
    weights: Mapping[str, Any] | None,
    store: TileStore,
    ceiling: Ceiling,
) -> tuple[Mapping[str, Any], dict[str, Any]]:
    """One stage: the weights that were best on the validation images, and their score on the test images."""
    method, scale = task.method, task.scale
    train, validation, test = _datasets(task, stage, store)
    with _refusing(), ceiling.limit(task.budget, reuse_heap=True):
        model = _make_model(task, train)
        if weights is not None:
            model.load_state_dict(weights)
        batch = _without_single(_largest_batch(task, model, train[0][0]), len(train))
    gc.collect()
    ceiling.give_back()
    known = method.hyperparameters_for(task.budget)
    learning_rate = scale.learning_rate or stage.learning_rate or known.learning_rate
    gamma = {"gamma": scale.gamma or known.gamma} if method.schedule == "ExponentialLR" else {}
    settings = TrainSettings(
        epochs=scale.epochs,
        batch_size=batch,
        learning_rate=learning_rate,
        schedule=method.schedule,
        schedule_options=gamma,
        patience=PATIENCE,
        save_every=500,
        seed=task.seed,
    )
    folder = task.folder / f"{method.name}-{task.seed}-stage-{number}"
    kind = PatchGDTrainer if isinstance(model, PatchGD) else Trainer
    identity = {"method": method.name, "scale": scale.name, "row_budget": task.budget}
    trainer = kind(model, train, validation, settings, folder, identity=identity)
    started = time.perf_counter()
    if scale.seconds is not None:
        trainer.listener = _time_keeper(started + scale.seconds)
    with _refusing(), ceiling.limit(task.budget, reuse_heap=True) as limit:
        try:
            trainer.run()
        except OutOfTime:
            pass
        ceiling.check()
        trained = time.perf_counter()
        best = CheckpointFolder(folder / "checkpoints").best()
        state = model.state_dict() if best is None else best_weights(load_checkpoint(best))
    training_peak, reading = limit.peak_bytes, limit.reading
    updates = trainer.progress.update
    del trainer
    gc.collect()
    ceiling.give_back()
    with _refusing(), ceiling.limit(task.budget, reuse_heap=True) as limit:
        model.load_state_dict(state)
        model.eval()
        result = score(model, test, batch_size=min(batch, 8))
        ceiling.check()
    return state, {
        "test_accuracy": result.accuracy,
        "test_loss": result.loss,
        "batch_size": batch,
        "resolution": train[0][0].shape[1],
        "learning_rate": learning_rate,
        "updates": updates,
        "epochs": round(updates * batch / len(train), 2),
        "training_peak_bytes": training_peak,
        "inference_peak_bytes": limit.peak_bytes,
        "reading": reading,
        "training_seconds": round(trained - started, 1),
        "test_seconds": round(time.perf_counter() - trained, 1),
        "num_parameters": sum(p.numel() for p in model.parameters()),
    }


@contextmanager
def _refusing() -> Iterator[None]:
    """A block in which refused memory ends the row."""
    try:
        yield
    except (BudgetExceeded, PlanDoesNotFit) as error:
        raise Refused(_first_line(error)) from error
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        raise Refused(_first_line(error)) from error


def _first_line(error: Exception) -> str:
    """What an error says, without the place in PyTorch's own code."""
    return re.sub(r"^\[.*?\] (err == 0. )?", "", str(error)).splitlines()[0]


def _time_keeper(deadline: float) -> Callable[[str, Mapping[str, Any]], None]:
    """What ends training at a moment of ``time.perf_counter()``."""

    def listen(kind: str, values: Mapping[str, Any]) -> None:
        if time.perf_counter() > deadline:
            raise OutOfTime

    return listen


class PatchGDTrainer(Trainer):
    """Trains by the inner steps of `PatchGD`."""

    def differentiate(
        self, sources: list[ImageSource], labels: Tensor, weight: float
    ) -> tuple[float, Tensor]:
        """Add the gradients of all inner steps; loss and logits are those of the last."""
        assert isinstance(self.model, PatchGD)
        self.model.begin(sources)
        for _ in range(self.model.inner_steps):
            loss, logits = super().differentiate(sources, labels, weight / self.model.inner_steps)
        return loss, logits


def _datasets(task: Task, stage: Stage, store: TileStore) -> tuple[ImageDataset, ImageDataset, ImageDataset]:
    """For training, for validation, and for the test."""
    labels = TileDataset(store, "train").labels
    chosen, rest = divide(labels, share=VALIDATION_SHARE, seed=task.seed)
    inversion = task.method.inversion
    augmentation = RandomAugmentation(inversion=inversion) if inversion else None

    def dataset(split: str, positions: tuple[int, ...] | None, *, augmented: bool = False) -> ImageDataset:
        drawn = augmentation if augmented else None
        if task.method.kind is Kind.SHRINK:
            steps = steps_to(stage.resolution, task.scale)
            folder = task.folder / "shrunk"
            return ShrunkImages(
                store, split, steps, folder, positions=positions, augmentation=drawn, seed=task.seed
            )
        return TileDataset(store, split, positions=positions, augmentation=drawn, seed=task.seed)

    return dataset("train", chosen, augmented=True), dataset("train", rest), dataset("test", None)


def _make_model(task: Task, images: ImageDataset) -> nn.Module:
    """The method's classifier, on the device."""
    method, scale = task.method, task.scale
    assert method.model is not None
    num_classes, size = scale.recipe.num_classes, images[0][0].shape[1]
    torch.manual_seed(task.seed)

    def net(of_size: int, width: int = num_classes) -> nn.Module:
        assert method.model is not None
        return make_net(method.model, width, of_size, pretrained=task.pretrained)

    if method.kind is Kind.STREAM:
        whole = net(size)
        taken = 0
        if task.device == "cpu":
            # A pass counts from what there is when it begins.
            taken = ADAM_COPIES * sum(p.nbytes for p in whole.parameters()) + HOST_SLACK
        if taken >= task.budget:
            raise Refused(f"weights and Adam's averages alone take {taken} bytes")
        return StreamingModel(whole, task.budget - taken, preprocess=Normalise(), device=task.device)
    if method.kind is Kind.SHRINK:
        return WholeImages(net(size)).to(task.device)
    if method.kind is Kind.RESIZER:
        assert method.resolution is not None
        resolution = scale.pixels(method.resolution)
        return WholeImages(nn.Sequential(LearnedResizer(resolution), net(resolution))).to(task.device)
    assert method.tile is not None
    tile = scale.pixels(method.tile)
    if method.kind is Kind.TILES:
        return TileVote(net(tile), tile, method.share).to(task.device)
    assert method.kind is Kind.PATCHGD
    width = 256
    found = PatchGD(
        net(tile, width),
        tile,
        method.share,
        width=width,
        grid_size=grid_size(size, tile),
        num_classes=num_classes,
        inner_steps=method.inner_steps,
    )
    return found.to(task.device)


def _largest_batch(task: Task, model: nn.Module, source: ImageSource) -> int:
    """The largest batch of such images that an update can be made with under the ceiling in force.

    A streamed model takes as many images as it is told, if a plan for them fits.
    """
    cap = task.scale.largest_batch or UNKNOWN_BATCH
    if isinstance(model, StreamingModel):
        batch = min(cap, task.method.hyperparameters_for(task.budget).batch or 1)
        model.train()
        while batch > 1 and not model.plan((batch, *source.shape)).fits:
            batch //= 2
        return batch
    # Two first: batch norm of pooled features cannot be trained on one image.
    good, refusal = 2, _try_batch(task, model, source, 2)
    if refusal is not None:
        good, refusal = 1, _try_batch(task, model, source, 1)
        if refusal is not None:
            raise Refused(f"an update with a single image: {refusal}")
        return good
    bad = 2 * good
    while bad <= cap and _try_batch(task, model, source, bad) is None:
        good, bad = bad, 2 * bad
    bad = min(bad, cap + 1)
    while bad - good > max(1, good // 8):
        middle = (good + bad) // 2
        if _try_batch(task, model, source, middle) is None:
            good = middle
        else:
            bad = middle
    return good


def _without_single(batch: int, num_images: int) -> int:
    """The next smaller batch with which an epoch's last one has more than one image."""
    while batch > 2 and num_images % batch == 1:
        batch -= 1
    return batch


def _try_batch(task: Task, model: nn.Module, source: ImageSource, batch: int) -> str | None:
    """Make an update on blank images and take it back; what refused it, if anything did."""
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    refusal: str | None = None
    with torch.random.fork_rng():
        try:
            optimizer = torch.optim.Adam(model.parameters())
            sources = [TensorSource(torch.zeros(source.shape, dtype=source.dtype)) for _ in range(batch)]
            model.train()
            if isinstance(model, PatchGD):
                model.begin(sources)
            F.cross_entropy(
                model(sources), torch.zeros(batch, dtype=torch.int64, device=task.device)
            ).backward()
            optimizer.step()
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            refusal = _first_line(error)
    model.zero_grad(set_to_none=True)
    del optimizer
    model.load_state_dict(before)
    gc.collect()
    return refusal
