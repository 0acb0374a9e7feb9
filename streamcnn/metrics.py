"""Scores of segmentations, as functions of sums over space, which stream like a loss."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

import torch
import torch.nn.functional as F
from torch import Tensor


def class_overlaps(y_pred: Tensor, y_true: Tensor, *, ignore_index: int | None = None) -> Tensor:
    """Count each class's pixels in prediction and truth, in the prediction, in the truth: (3, C) int64.

    Pass it to ``StreamingModel.streamed_loss``; results of several images may be added.

    Parameters
    ----------
    y_pred
        Scores (N, C, H, W): the largest gives the class. With one channel, positive scores are class 1.
    y_true
        Classes (N, H, W).
    ignore_index
        Class of pixels to ignore.
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
    """Scores from sums of :func:`class_overlaps`; NaN for classes in neither prediction nor truth."""

    overlaps: Tensor
    """(3, C) int64: the sum over all images."""

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
        """Mean over the classes that are in prediction or truth."""
        return float(self.iou.nanmean())

    @property
    def mean_dice(self) -> float:
        """Mean over the classes that are in prediction or truth."""
        return float(self.dice.nanmean())

    @property
    def accuracy(self) -> float:
        """Share of the pixels, without ignored ones, whose class is predicted correctly."""
        both, _, true = self.overlaps.double().sum(1)
        return float(both / true)
