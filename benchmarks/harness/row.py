"""One row of the table: a method trained and scored under its ceiling, in a process of its own."""

from __future__ import annotations

import time
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks.harness.attempts import Attempts, Refused
from benchmarks.harness.batch_search import Fit, without_single
from benchmarks.harness.classifiers import WholeImages
from benchmarks.harness.images import read_whole
from benchmarks.harness.json_files import read_json, write_json
from benchmarks.harness.method import Datasets, TrainedMethod
from benchmarks.harness.row_ceiling import RowCeiling
from benchmarks.harness.stage import Trained, train_stage
from benchmarks.harness.task import Task
from benchmarks.harness.trial import Trial
from benchmarks.record import device_name
from streamcnn import StreamingModel
from streamcnn.data.dataset import LabelledImages, TileDataset
from streamcnn.data.normalisation import Normalise
from streamcnn.data.tile_store import TileStore
from streamcnn.errors import TrainingDiverged
from streamcnn.support.extras import require
from streamcnn.training import Terminated, score
from streamcnn.training.checkpoint_file import load_checkpoint
from streamcnn.training.evaluation import require_metrics
from streamcnn.training.runs import best_weights

LARGEST_TEST_BATCH = 8
AGAIN = "again"
"""The outcome of a process that another one is to go on after."""
SAVED = "saved"
"""The outcome of a process that was asked to end by SIGTERM, and has saved."""


class StartAgain(Exception):
    """The row is to go on in a new process."""


def run(method: TrainedMethod, task: Task) -> dict[str, Any]:
    """Train and score; what was found, or why the ceiling refused it, as JSON has it."""
    _warm_up(task.store)
    found: dict[str, Any] = {
        "device": device_name(cpu=task.device == "cpu"),
        "digits": task.store.head.provenance["digits"],
        "versions": {name: version(name) for name in ("streamcnn", "timm", "torchvision", "numpy", "zarr")},
        "reason": None,
    }
    try:
        return {**found, "outcome": "finished", **_Row(method, task).run()}
    except StartAgain:
        return {"outcome": AGAIN}
    except Refused as error:
        return {**found, "outcome": "refused", "reason": str(error)}
    except TrainingDiverged as error:
        return {**found, "outcome": "diverged", "reason": str(error)}
    except Terminated as error:
        return {"outcome": SAVED, "reason": str(error)}


def _warm_up(store: TileStore) -> None:
    """Start threads, and load code that is loaded at its first use, some 150 MB: not the method's doing."""
    source, _ = TileDataset(store, "test")[0]
    read_whole(source)
    require_metrics()
    require("timm", extra="zoo")
    net = nn.Sequential(nn.Conv2d(source.shape[0], 2, 3), nn.BatchNorm2d(2), nn.AdaptiveAvgPool2d(1))
    for model in (StreamingModel(net, tile=64, preprocess=Normalise()), WholeImages(net)):
        optimizer = torch.optim.Adam(model.parameters())
        model([source]).sum().backward()
        optimizer.step()


class _Row:
    """A method at its task, and what it has taken so far."""

    def __init__(self, method: TrainedMethod, task: Task) -> None:
        self._method = method
        self._task = task
        self._attempts = Attempts(task.folder)
        self._trial = Trial(method, task, RowCeiling(task.device, task.budget), self._attempts)
        self._trained: list[Trained] = []

    def run(self) -> dict[str, Any]:
        """All stages of training, and the test."""
        # All before the first is trained: a search may have the row start again.
        datasets = [self._method.datasets(self._task, stage) for stage in self._method.training_stages]
        fits = [self._fit(found.train) for found in datasets]
        for number, (found, fit) in enumerate(zip(datasets, fits, strict=True)):
            last, fit = self._train(number, found, fit)
            self._trained.append(last)
        with self._attempts.trying("test"):
            tested = self._test(last.checkpoint, datasets[-1].test, fit)
        return {
            **tested,
            "selected": last.is_selected,
            "training_reading": last.reading,
            **self._costs(),
        }

    def _train(self, number: int, datasets: Datasets, fit: Fit) -> tuple[Trained, Fit]:
        """A stage, and what it was trained with: less than ``fit`` where that is refused after all."""
        stage = self._method.training_stages[number]
        start = self._trained[-1].checkpoint if self._trained else None
        while True:
            folder = self._task.folder / f"stage-{number}-batch-{fit.batch}-{fit.heap}"
            try:
                with self._attempts.trying(folder.name):
                    return train_stage(self._trial, stage, fit, datasets, folder, start), fit
            except Refused:
                # The search has seen two updates alone, and no validation.
                less = self._method.batch_search.less(self._trial, fit)
                if less is None:
                    raise
                fit = self._remembered(less, datasets.train)

    def _fit(self, images: LabelledImages) -> Fit:
        """The largest batch under the ceiling, found once for a row."""
        if known := read_json(self._fit_path(images)):
            return Fit(**known)
        search = self._method.batch_search
        fit = search.find(self._trial, images)
        return self._remembered(fit, images) if search.is_refused_memory else without_single(fit, len(images))

    def _remembered(self, fit: Fit, images: LabelledImages) -> Fit:
        """Have a row that is started again train like that.

        Raises
        ------
        StartAgain
            On the CPU, where memory that was refused has left holes in the heap.
        """
        fit = without_single(fit, len(images))
        write_json(self._fit_path(images), asdict(fit))
        if self._task.device == "cpu":
            raise StartAgain
        return fit

    def _fit_path(self, images: LabelledImages) -> Path:
        return self._task.folder / f"fit-{images[0][0].shape[1]}.json"

    def _test(self, checkpoint: Path, images: LabelledImages, fit: Fit) -> dict[str, Any]:
        """The score of a checkpoint's weights on the test images."""
        started, ceiling = time.perf_counter(), self._trial.ceiling
        weights = best_weights(load_checkpoint(checkpoint))
        with ceiling.limited(reuse_heap=fit.reuse_heap) as limit:
            model = self._trial.make_model(images)
            model.load_state_dict(weights)
            del weights
            found = score(
                model.eval(),
                images,
                batch_size=min(fit.batch, LARGEST_TEST_BATCH),
                before_batch=ceiling.check,
            )
        return {
            "test_accuracy": found.accuracy,
            "test_loss": found.loss,
            "batch_size": fit.batch,
            "reuse_heap": fit.reuse_heap,
            "resolution": images[0][0].shape[1],
            "num_parameters": sum(p.numel() for p in model.parameters()),
            "inference_peak_bytes": limit.peak_bytes,
            "inference_reading": limit.reading,
            "test_seconds": round(time.perf_counter() - started, 1),
        }

    def _costs(self) -> dict[str, Any]:
        costs = [trained.costs for trained in self._trained]
        return {
            "updates": sum(each.updates for each in costs),
            "epochs": round(sum(each.epochs for each in costs), 2),
            "training_seconds": round(sum(each.seconds for each in costs), 1),
            "training_peak_bytes": max(each.peak for each in costs),
        }
