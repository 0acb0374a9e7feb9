"""How good a classifier is on a set of images."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from types import ModuleType

import torch
import torch.nn.functional as F
from torch import Tensor

from streamcnn.data.dataset import LabelledImages, collate
from streamcnn.data.sources import ImageSource
from streamcnn.extras import require
from streamcnn.models import make_torchvision_importable

Classify = Callable[[list[ImageSource]], Tensor]
"""From a list of images to logits ``(N, classes)``."""


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


def score(
    classify: Classify,
    images: LabelledImages,
    *,
    batch_size: int = 1,
    casting: Callable[[], AbstractContextManager[None]] = nullcontext,
) -> Score:
    """Classify all ``images``, without gradients; modes and weights are the caller's.

    Raises
    ------
    MissingExtra
        If torchmetrics is not installed.
    """
    classification = require_metrics()
    logits: list[Tensor] = []
    for at in range(0, len(images), batch_size):
        positions = range(at, min(at + batch_size, len(images)))
        if positions.stop < len(images):
            images.prefetch(positions.stop)
        sources, _ = collate([images[position] for position in positions])
        with torch.no_grad(), casting():
            logits.append(classify(sources).double().cpu())
    return _score(torch.cat(logits), images.labels, classification)


def require_metrics() -> ModuleType:
    """The module of torchmetrics that scores are by.

    Raises
    ------
    MissingExtra
        If it is not installed.
    """
    make_torchvision_importable()
    return require("torchmetrics.functional.classification", extra="train")


def _score(logits: Tensor, labels: Sequence[int], classification: ModuleType) -> Score:
    wanted, found = torch.tensor(labels), logits.argmax(1)
    confusion = classification.multiclass_confusion_matrix(found, wanted, num_classes=logits.shape[1])
    return Score(
        loss=float(F.cross_entropy(logits, wanted)),
        accuracy=float(confusion.diagonal().sum() / confusion.sum()),
        predictions=tuple(found.tolist()),
        confusion=tuple(map(tuple, confusion.tolist())),
    )
