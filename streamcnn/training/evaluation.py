"""How good a classifier is on a set of images."""

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
    """What a classifier made of some images."""

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
        """Accuracy and predictions."""
        return {"validation_accuracy": self.accuracy, "predictions": self.predictions}

    def keep(self, folder: Path) -> None:
        """Nothing: the log has all that the page shows."""


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
    """Classify all ``images``, without gradients; modes and weights are the caller's.

    Parameters
    ----------
    classify, images, batch_size
        What classifies which images, so many at a time.
    casting
        The block in which it does.
    before_batch
        Called before each batch; an error of its own ends the classification.
    each
        Has all batches classified, here or by several processes.
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
    """The module of torchmetrics that scores are by.

    Raises
    ------
    MissingExtra
        If it is not installed.
    """
    torchvision_import.install()
    return require("torchmetrics.functional.classification", extra="train")


def require_labels(labels: Tensor, logits: Tensor) -> None:
    """Make sure that a classifier's logits have an output for each of the ``labels``, and two at least.

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
    """Make sure that a classifier's logits (N, classes) are numbers.

    Raises
    ------
    TrainingDiverged
        If not, naming the images, by their positions and names.
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
    """Make sure that the loss of a batch is a number; of logits (N, classes), if there are, it tells images.

    Raises
    ------
    TrainingDiverged
        If not, naming the update and the images, by their positions and names.
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
