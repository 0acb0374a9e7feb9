"""Segmentation losses by name, as a run's settings have them."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from streamcnn.losses import dice_loss, tversky_loss
from streamcnn.support.documents import require_storable

_CROSS_ENTROPY = "cross_entropy"
_OVERLAPS: Mapping[str, Callable[..., Tensor]] = {"dice": dice_loss, "tversky": tversky_loss}
_OTHERWISE_SAID = {"y_pred", "y_true", "mode", "from_logits", "ignore_index"}
"""Arguments of losses of overlap that are no options."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SegmentationLoss:
    """The loss that a segmentation model is trained by.

    Raises
    ------
    ValueError
        If a value has no meaning; the text says what is allowed.
    """

    name: str = _CROSS_ENTROPY
    """``"cross_entropy"``, ``"dice"``, ``"tversky"``, or a sum of these such as ``"cross_entropy+dice"``."""
    ignore_index: int | None = None
    """Value of pixels that count neither in the loss nor in scores."""
    class_weights: tuple[float, ...] | None = None
    """For the cross-entropy: one weight for each class."""
    label_smoothing: float = 0.0
    """For the cross-entropy."""
    options: Mapping[str, Any] = field(default_factory=dict)
    """Further arguments of the losses of overlap, such as ``smooth`` and ``log_loss``."""

    def __post_init__(self) -> None:
        known = (_CROSS_ENTROPY, *_OVERLAPS)
        if not set(self.terms) <= set(known) or len(set(self.terms)) < len(self.terms):
            raise ValueError(
                f"loss={self.name!r}: allowed are {', '.join(known)}, and sums of different ones such as "
                "cross_entropy+dice"
            )
        if not 0 <= self.label_smoothing < 1:
            raise ValueError(
                f"label_smoothing={self.label_smoothing}: allowed are 0 and more, and less than 1"
            )
        weights = self.class_weights
        if weights is not None and not (
            all(0 <= weight < math.inf for weight in weights) and sum(weights) > 0
        ):
            raise ValueError(f"class_weights={weights}: allowed are numbers from 0 on, not all of them 0")
        if _CROSS_ENTROPY not in self.terms and (weights is not None or self.label_smoothing):
            raise ValueError(
                f"class_weights and label_smoothing are of cross_entropy, and the loss is {self.name!r}: "
                f"leave them out, or take cross_entropy+{self.name}"
            )
        self._check_options()

    def _check_options(self) -> None:
        require_storable("options", self.options)
        taken = [
            set(inspect.signature(_OVERLAPS[term]).parameters) for term in self.terms if term in _OVERLAPS
        ]
        allowed = set.intersection(*taken) - _OTHERWISE_SAID if taken else set()
        unknown = [name for name in self.options if name not in allowed]
        if unknown:
            described = f"allowed are {', '.join(sorted(allowed))}" if allowed else "leave them out"
            raise ValueError(f"the loss {self.name!r} does not take {', '.join(unknown)}: {described}")

    @property
    def terms(self) -> tuple[str, ...]:
        """The names of the losses in the sum."""
        return tuple(self.name.split("+"))

    def function(self) -> Callable[[Tensor, Tensor], Tensor]:
        """The loss of scores (N, C, H, W), or (N, 1, H, W) for two classes, given classes (N, H, W).

        Each call returns a new function, for which a streamed pass is captured anew: keep it.
        """
        terms: list[Callable[[Tensor, Tensor], Tensor]] = []
        for term in self.terms:
            if term == _CROSS_ENTROPY:
                terms.append(
                    partial(
                        _cross_entropy,
                        ignore_index=self.ignore_index,
                        class_weights=self.class_weights,
                        label_smoothing=self.label_smoothing,
                    )
                )
            else:
                terms.append(
                    partial(_overlap, loss=_OVERLAPS[term], ignore_index=self.ignore_index, **self.options)
                )
        return terms[0] if len(terms) == 1 else _Sum(tuple(terms))


@dataclass(frozen=True, slots=True, eq=False)
class _Sum:
    """The sum of losses."""

    terms: tuple[Callable[[Tensor, Tensor], Tensor], ...]

    def __call__(self, scores: Tensor, target: Tensor) -> Tensor:
        return torch.stack([term(scores, target) for term in self.terms]).sum()


def _cross_entropy(
    scores: Tensor,
    target: Tensor,
    *,
    ignore_index: int | None,
    class_weights: tuple[float, ...] | None,
    label_smoothing: float,
) -> Tensor:
    if scores.shape[1] == 1:
        # The softmax of (0, s) is the sigmoid of s.
        scores = torch.cat((torch.zeros_like(scores), scores), 1)
    return F.cross_entropy(
        scores,
        target,
        weight=None if class_weights is None else scores.new_tensor(class_weights),
        ignore_index=-100 if ignore_index is None else ignore_index,
        label_smoothing=label_smoothing,
    )


def _overlap(scores: Tensor, target: Tensor, *, loss: Callable[..., Tensor], **options: Any) -> Tensor:
    return loss(scores, target, "binary" if scores.shape[1] == 1 else "multiclass", **options)
