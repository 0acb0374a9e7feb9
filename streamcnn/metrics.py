"""How well maps of classes fit their masks: sums over space, so that they stream like a loss."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

import torch
import torch.nn.functional as F
from torch import Tensor


def class_overlaps(y_pred: Tensor, y_true: Tensor, *, ignore_index: int | None = None) -> Tensor:
    """Pixels of each class in prediction and truth, in the prediction, and in the truth: (3, C) int64.

    It is a function for ``StreamingModel.streamed_loss``, and its results of several images add up.

    Parameters
    ----------
    y_pred
        Scores (N, C, H, W), of which the largest is taken; of one channel, positive ones are class 1 of two.
    y_true
        Classes (N, H, W).
    ignore_index
        Class of pixels that do not count.
    """
    num_classes = max(y_pred.shape[1], 2)
    found = (y_pred[:, 0] > 0).long() if y_pred.shape[1] == 1 else y_pred.argmax(1)
    counts = torch.ones_like(y_true) if ignore_index is None else (y_true != ignore_index).long()
    known = y_true if ignore_index is None else torch.where(counts == 1, y_true, 0)
    predicted = F.one_hot(found, num_classes) * counts[..., None]
    true = F.one_hot(known.long(), num_classes) * counts[..., None]
    return torch.stack([each.sum((0, 1, 2)) for each in (predicted * true, predicted, true)])


@dataclass(frozen=True, slots=True)
class SegmentationScore:
    """What sums of :func:`class_overlaps` say; nan for classes that are neither predicted nor there."""

    overlaps: Tensor
    """(3, C): of all images together."""

    def __add__(self, other: Self) -> SegmentationScore:
        return SegmentationScore(self.overlaps + other.overlaps)

    @property
    def iou(self) -> Tensor:
        """Intersection over union of each class, (C,) in float64."""
        both, predicted, true = self.overlaps.double().unbind()
        return both / (predicted + true - both)

    @property
    def dice(self) -> Tensor:
        """Dice coefficient, or F1 score, of each class, (C,) in float64."""
        both, predicted, true = self.overlaps.double().unbind()
        return 2 * both / (predicted + true)

    @property
    def mean_iou(self) -> float:
        """Mean of the classes that are predicted or there."""
        return float(self.iou.nanmean())

    @property
    def mean_dice(self) -> float:
        """Mean of the classes that are predicted or there."""
        return float(self.dice.nanmean())

    @property
    def accuracy(self) -> float:
        """Share of the pixels that count whose class is found."""
        both, _, true = self.overlaps.double().sum(1)
        return float(both / true)
