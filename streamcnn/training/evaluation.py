"""Scores of a classifier on a set of images."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from streamcnn.data.dataset import LabelledImages
from streamcnn.errors import DatasetMismatch, TrainingDiverged
from streamcnn.support import torchvision_import
from streamcnn.support.extras import require
from streamcnn.training.naming import naming, not_finite, open_batch
from streamcnn.training.processes import Each, in_turn

Classify = Callable[..., Tensor]
"""From a list of image sources, and further inputs if images have any, to logits ``(N, classes)``."""


@dataclass(frozen=True, slots=True)
class Score:
    """A classifier's scores and predictions on a set of images."""

    loss: float
    """Mean cross-entropy."""
    accuracy: float
    """Share of images whose label it finds."""
    predictions: tuple[int, ...]
    """Of each image, by position."""
    confusion: tuple[tuple[int, ...], ...]
    """Numbers of images by label (rows) and prediction (columns)."""

    @property
    def value(self) -> float:
        """The accuracy."""
        return self.accuracy

    def to_log(self) -> dict[str, Any]:
        """The accuracy and the predictions, as an epoch's line of the log has them."""
        return {"validation_accuracy": self.accuracy, "predictions": self.predictions}

    def keep(self, folder: Path) -> None:
        """Write nothing: the log has all that the page shows."""


def score(
    classify: Classify,
    images: LabelledImages,
    *,
    batch_size: int = 1,
    casting: Callable[[], AbstractContextManager[None]] = nullcontext,
    before_batch: Callable[[], None] = lambda: None,
    each: Each = in_turn,
    device: torch.device | str = "cpu",
) -> Score:
    """Classify all ``images`` without gradients; the caller sets the model's mode and weights.

    Parameters
    ----------
    classify, images, batch_size
        The classifier, the images, and how many of them go into a batch.
    casting
        Makes the context manager in which each batch is classified, such as autocast.
    before_batch
        Called before each batch; an error that it raises ends the classification.
    each
        Applies the classification to all batches, in this process or divided among several.
    device
        Where further inputs go.

    Raises
    ------
    DatasetMismatch
        If an image has a label that the classifier has no output for.
    TrainingDiverged
        If the classifier gives NaN or infinity for an image; the text names it.
    MissingExtra
        If torchmetrics is not installed.
    """
    classification = require_metrics()

    def classified(at: int) -> Tensor:
        before_batch()
        positions = range(at, min(at + batch_size, len(images)))
        if positions.stop < len(images):
            images.prefetch(positions.stop)
        sources, labels, *inputs = open_batch(images, positions, "classification")
        names = [source.name for source in sources]
        with naming("classification", positions, names):
            with torch.no_grad(), casting():
                found = classify(sources, *(each.to(device) for each in inputs))
            require_labels(labels, found)
        logits = found.double().cpu()
        require_finite_logits(logits, positions, names)
        return logits

    logits = torch.cat(each(classified, range(0, len(images), batch_size)))
    return _score(logits, images.labels, classification)


def require_metrics() -> ModuleType:
    """The torchmetrics module with the functions that compute scores.

    Raises
    ------
    MissingExtra
        If it is not installed.
    """
    torchvision_import.install()
    return require("torchmetrics.functional.classification", extra="train")


def require_labels(labels: Tensor, logits: Tensor) -> None:
    """Make sure that a classifier's logits have at least two classes, and one for each of the ``labels``.

    Raises
    ------
    DatasetMismatch
        If not.
    """
    if logits.dim() != 2 or logits.shape[1] <= int(labels.max()):
        raise DatasetMismatch(
            f"the model gives {tuple(logits.shape)} for {len(labels)} images, one of which has the label "
            f"{int(labels.max())}: needed are (N, classes) with a class for each label"
        )
    if logits.shape[1] < 2:
        raise DatasetMismatch(
            "the model has one class, and there is nothing to tell apart: give it images of two and more"
        )


def require_finite_logits(logits: Tensor, positions: Sequence[int], names: Sequence[str]) -> None:
    """Make sure that a classifier's logits (N, classes) are finite.

    Raises
    ------
    TrainingDiverged
        If not; the text gives the positions and names of the images.
    """
    found = not_finite(logits, positions, names)
    if found:
        raise TrainingDiverged(
            f"the model gives NaN or infinity for {found}: see that the images are what it expects, or train "
            "it anew with a smaller learning_rate, or with clip_norm"
        )


def require_finite_loss(
    loss: float, update: int, logits: Tensor | None, positions: Sequence[int], names: Sequence[str]
) -> None:
    """Make sure that a batch's loss is finite; logits (N, classes), if given, tell which images are at fault.

    Raises
    ------
    TrainingDiverged
        If not; the text gives the update, and the positions and names of the images.
    """
    if math.isfinite(loss):
        return
    found = "" if logits is None else not_finite(logits, positions, names)
    which = f", as the model gives NaN or infinity for {found}" if found else ""
    raise TrainingDiverged(
        f"the loss of update {update} is {loss}{which}: see that the images are what the model expects, or "
        "begin another run with a smaller learning_rate, or with clip_norm; the checkpoints are from before "
        "it"
    )


def _score(logits: Tensor, labels: Sequence[int], classification: ModuleType) -> Score:
    wanted, found = torch.tensor(labels), logits.argmax(1)
    confusion = classification.multiclass_confusion_matrix(found, wanted, num_classes=logits.shape[1])
    return Score(
        loss=float(F.cross_entropy(logits, wanted)),
        accuracy=float(confusion.diagonal().sum() / confusion.sum()),
        predictions=tuple(found.tolist()),
        confusion=tuple(map(tuple, confusion.tolist())),
    )
