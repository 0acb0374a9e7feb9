"""Dice and Tversky losses for segmentation, which stream, since they are functions of sums over space.

Names, arguments and values are those of segmentation-models-pytorch's losses.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

Mode = Literal["binary", "multiclass", "multilabel"]
_MODES = ("binary", "multiclass", "multilabel")
_SPACE = (0, 2, 3)
"""The axes of (N, C, H, W) over which a class's overlap is summed."""


def dice_loss(
    y_pred: Tensor,
    y_true: Tensor,
    mode: Mode = "multiclass",
    *,
    classes: Sequence[int] | None = None,
    log_loss: bool = False,
    from_logits: bool = True,
    smooth: float = 0.0,
    ignore_index: int | None = None,
    eps: float = 1e-7,
) -> Tensor:
    """One minus the Dice coefficient of each class over the whole batch, averaged: a scalar.

    Parameters
    ----------
    y_pred
        Scores (N, C, H, W), one channel in mode ``"binary"``.
    y_true
        Integer classes (N, H, W) in mode ``"multiclass"``; otherwise zeros and ones (N, C, H, W), which in
        mode ``"binary"`` may also be (N, H, W).
    mode
        ``"multiclass"`` for classes that exclude each other; ``"multilabel"`` and ``"binary"`` for channels
        that are independent of each other.
    classes
        The classes that count; ``None`` for all. The loss of a class that no pixel has is 0.
    log_loss
        Whether a class's loss is the negative logarithm of its coefficient, instead of one minus it.
    from_logits
        Whether scores are logits, rather than probabilities.
    smooth
        Added to the intersection and the cardinality.
    ignore_index
        Value of pixels to ignore.
    eps
        Lower bound of the divisor, and of the coefficient whose logarithm is taken.

    Raises
    ------
    ValueError
        If ``mode`` or a shape is not allowed.
    """
    chances, truth = _compared(y_pred, y_true, mode, from_logits, ignore_index)
    both = (chances * truth).sum(_SPACE)
    sizes = (chances + truth).sum(_SPACE)
    scores = (2 * both + smooth) / (sizes + smooth).clamp_min(eps)
    return _averaged(scores, truth, classes, log_loss, eps)


def tversky_loss(
    y_pred: Tensor,
    y_true: Tensor,
    mode: Mode = "multiclass",
    *,
    classes: Sequence[int] | None = None,
    log_loss: bool = False,
    from_logits: bool = True,
    smooth: float = 0.0,
    ignore_index: int | None = None,
    eps: float = 1e-7,
    alpha: float = 0.5,
    beta: float = 0.5,
    gamma: float = 1.0,
) -> Tensor:
    """One minus the Tversky index of each class over the whole batch, averaged: a scalar.

    ``alpha`` and ``beta`` are the weights of false positives and false negatives. The mean is raised to the
    power ``gamma`` (focal Tversky loss). Other parameters are as for :func:`dice_loss`, which this is with
    the defaults.

    Raises
    ------
    ValueError
        If ``mode`` or a shape is not allowed.
    """
    chances, truth = _compared(y_pred, y_true, mode, from_logits, ignore_index)
    both = (chances * truth).sum(_SPACE)
    false_positives = chances.sum(_SPACE) - both
    false_negatives = truth.sum(_SPACE) - both
    weighted = both + alpha * false_positives + beta * false_negatives
    scores = (both + smooth) / (weighted + smooth).clamp_min(eps)
    return _averaged(scores, truth, classes, log_loss, eps) ** gamma


def _compared(
    y_pred: Tensor, y_true: Tensor, mode: Mode, from_logits: bool, ignore_index: int | None
) -> tuple[Tensor, Tensor]:
    """Probabilities and truth (N, C, H, W), both 0 at ignored pixels."""
    if mode not in _MODES:
        raise ValueError(f"mode={mode!r}: allowed are {', '.join(map(repr, _MODES))}")
    num_classes = y_pred.shape[1]
    if mode == "binary" and y_true.dim() == 3:
        y_true = y_true[:, None]
    expected = (y_pred.shape[0], *y_pred.shape[2:]) if mode == "multiclass" else tuple(y_pred.shape)
    if tuple(y_true.shape) != tuple(expected):
        raise ValueError(
            f"y_true has shape {tuple(y_true.shape)}: allowed is {tuple(expected)} in mode {mode!r}, for "
            f"scores of shape {tuple(y_pred.shape)}"
        )
    chances = y_pred
    if from_logits:
        chances = torch.softmax(y_pred, 1) if mode == "multiclass" else torch.sigmoid(y_pred)
    counts = None if ignore_index is None else y_true != ignore_index
    known = y_true if counts is None else torch.where(counts, y_true, 0)
    if mode == "multiclass":
        known = F.one_hot(known.long(), num_classes).permute(0, 3, 1, 2)
        counts = None if counts is None else counts[:, None]
    truth = known.to(chances.dtype)
    return (chances, truth) if counts is None else (chances * counts, truth * counts)


def _averaged(
    scores: Tensor, truth: Tensor, classes: Sequence[int] | None, log_loss: bool, eps: float
) -> Tensor:
    """The mean of the classes' losses, given their scores (C,)."""
    losses = -scores.clamp_min(eps).log() if log_loss else 1 - scores
    losses = losses * (truth.sum(_SPACE) > 0)
    return losses.mean() if classes is None else losses[list(classes)].mean()
