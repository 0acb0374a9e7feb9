"""Losses of maps: each position's term is local, and their sum or mean is a reduction.

A mean over classes divides by the sum of the weights of pixels that are not ignored, which is a reduction of
its own. If all pixels are ignored, the mean is 0 / 0, as in plain PyTorch.
"""

from __future__ import annotations

from enum import IntEnum
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._ops import OpOverload

from streamcnn.errors import UnsupportedModel
from streamcnn.graph.costs import NOTHING, Cost, declare
from streamcnn.graph.ops.late_checks import check_late
from streamcnn.graph.ops.pointwise import pointwise
from streamcnn.graph.ops.reduction_types import Sum, statistics_dtype
from streamcnn.graph.ops.rules import Call, NotStreamable, Sample, Tracer, rule
from streamcnn.graph.ops.shape import reshape
from streamcnn.graph.program import Access, Axes, Ref

aten = torch.ops.aten


class Over(IntEnum):
    """A loss's reduction over its positions, numbered as in ATen."""

    NONE = 0
    MEAN = 1
    SUM = 2


# --- losses of each value by itself -------------------------------------------------------------------


@rule(
    aten.binary_cross_entropy.default,
    aten.binary_cross_entropy_with_logits.default,
    aten.huber_loss.default,
    aten.kl_div.default,
    aten.l1_loss.default,
    aten.mse_loss.default,
    aten.poisson_nll_loss.default,
    aten.smooth_l1_loss.default,
    aten.soft_margin_loss.default,
)
def loss_of_values(tracer: Tracer, call: Call) -> Ref | NotStreamable:
    """A loss of each value and its target; the mean divides by the number of values."""
    over = Over(call.bind("reduction")[0])
    losses: Ref | NotStreamable = pointwise(tracer, _with(call, reduction=Over.NONE))
    if isinstance(losses, NotStreamable) or over is Over.NONE:
        return losses
    return _summed(tracer, losses, average=over is Over.MEAN)


def _with(call: Call, **changed: Any) -> Call:
    """``call`` with other values for some of the schema's arguments."""
    assert isinstance(call.target, OpOverload)
    arguments = call.target._schema.arguments
    names = [argument.name for argument in arguments]
    values = {**dict(zip(names, call.bind(*names), strict=True)), **changed}
    named = [argument.name for argument in arguments if argument.kwarg_only]
    return Call(
        call.target,
        tuple(values[name] for name in names if name not in named),
        {name: values[name] for name in named},
    )


def _summed(tracer: Tracer, losses: Ref, *, average: bool = False) -> Ref:
    """The sum or mean of all elements of a map."""
    shape = tracer.spec(losses).shape
    divisor = tracer.spec(losses).numel if average else 1
    result: Ref = tracer.reduce(Sum(shape, tuple(range(len(shape))), False, divisor), losses)[0]
    return result


# --- losses of classes --------------------------------------------------------------------------------


@rule(aten.cross_entropy_loss.default, aten.nll_loss_nd.default, aten.nll_loss2d.default)
def loss_of_classes(tracer: Tracer, call: Call) -> Ref | NotStreamable:
    """Cross-entropy of maps (N, C, H, W) with classes (N, H, W), or with their probabilities."""
    scores, target, weight, over = call.bind("self", "target", "weight", "reduction")
    if tracer.axes(scores) != (2, 3) or (weight is not None and tracer.axes(weight) is not None):
        return NotStreamable("its scores are no map of shape (N, C, H, W)")
    shapes = tracer.spec(scores).shape, tracer.spec(target).shape
    has_probabilities = shapes[0] == shapes[1]
    if not has_probabilities and shapes[1] != (shapes[0][0], *shapes[0][2:]):
        # Shape inference alone does not find this, and windows of the two maps would not match.
        raise UnsupportedModel(
            f"a loss compares scores of shape {shapes[0]} with classes of shape {shapes[1]}"
        )
    target = _as_map(tracer, target, (2, 3) if has_probabilities else (1, 2))
    if target is None:
        return NotStreamable("its targets have their spatial axes at other places")
    call = _with(call, target=target, reduction=Over.NONE)
    like = tracer.fake(call)
    both = {scores.name: Access(), target.name: Access()}
    # Sums over a map exceed the range of half precision.
    dtype = like.dtype if over == Over.NONE else statistics_dtype(like.dtype)
    losses = tracer.local(
        class_losses,
        (call.target, dtype, *call.args),
        like=like.to(dtype),
        axes=(1, 2),
        accesses=both,
    )
    if over == Over.NONE:
        return losses
    total = _summed(tracer, losses, average=over == Over.MEAN and has_probabilities)
    if over == Over.MEAN and not has_probabilities:
        (ignored,) = call.bind("ignore_index")
        weights = tracer.local(
            class_weights,
            (target, weight, ignored, dtype),
            like=like.to(dtype),
            axes=(1, 2),
            accesses={target.name: Access()},
        )
        total = tracer.global_value(torch.div, total, _summed(tracer, weights))
    result: Ref = tracer.global_value(aten.to.dtype, total, like.dtype) if dtype != like.dtype else total
    return result


def _as_map(tracer: Tracer, target: Ref, axes: Axes) -> Ref | None:
    """Targets as a map with spatial axes ``axes``; ``None`` if they are a map with other axes."""
    found = tracer.axes(target)
    if found is None:
        return tracer.promote(target, axes)
    return target if found == axes else None


def class_losses(loss: OpOverload, dtype: torch.dtype, scores: Tensor, target: Tensor, *args: Any) -> Tensor:
    """The term (N, h, w) of each position in a loss of classes.

    Raises
    ------
    IndexError
        For a class without scores; on a GPU when the phase ends.
    """
    if _is_fatal(target):
        target = _known(target, scores.shape[1], args[2])
    losses: Tensor = loss(scores, target, *args)
    return losses.to(dtype)


def _is_fatal(target: Tensor) -> bool:
    """Whether a class without scores would fail in a kernel, which ends all use of the GPU by the process."""
    return target.is_cuda and target.dtype == torch.int64


def _known(target: Tensor, num_classes: int, ignored: int) -> Tensor:
    """``target`` (N, h, w) with classes without scores set to ``ignored``; a late check refuses these."""
    is_known = ((target >= 0) & (target < num_classes)) | (target == ignored)
    extremes = torch.stack(target.masked_fill(is_known, ignored).aminmax())

    def check(found: list[int]) -> None:
        for unknown in found:
            if unknown != ignored:
                raise IndexError(f"Target {unknown} is out of bounds.")

    check_late(extremes, check)
    return target.masked_fill(~is_known, ignored)


def class_weights(target: Tensor, weight: Tensor | None, ignored: int, dtype: torch.dtype) -> Tensor:
    """The weight (N, h, w) of each position of ``target`` in a mean: 0 where it is ignored."""
    counts = target != ignored
    if weight is None:
        return counts.to(dtype)
    # Classes without scores are refused with the losses, on a GPU only after this has run.
    classes = torch.where(counts, target, 0).long().clamp(0, len(weight) - 1)
    return torch.where(counts, weight.detach().to(dtype)[classes], 0)


# Log-probabilities and, with label smoothing, their weighted copy; backward the same again.
declare(
    class_losses,
    cost=Cost(
        operations=lambda operation: 8 * operation.numel,
        workspace=lambda nbytes: 2 * nbytes.operands,
    ),
)
# The classes, twice, and their weights, twice.
declare(
    class_weights,
    cost=Cost(workspace=lambda nbytes: 2 * nbytes.operands + 2 * nbytes.result, saves=NOTHING),
)


# --- what losses are written with ---------------------------------------------------------------------


@rule(aten.one_hot.default)
def one_hot(tracer: Tracer, call: Call) -> Ref | NotStreamable:
    """Classes of a map along a new last axis."""
    ref, num_classes = call.bind("self", "num_classes")
    axes = tracer.axes(ref)
    if axes is None or num_classes < 0:
        return NotStreamable("the number of classes depends on the values: pass num_classes=")
    return tracer.local(
        call.target, (ref, num_classes), like=tracer.fake(call), axes=axes, accesses={ref.name: Access()}
    )


# In half precision, the gathered values in float32.
declare(aten.gather, cost=Cost(workspace=lambda nbytes: 2 * nbytes.result * nbytes.is_half))


@rule(aten.gather.default)
def gather_channels(tracer: Tracer, call: Call) -> Ref | NotStreamable:
    """``gather`` along an axis that is not spatial, with indices that are a map too."""
    ref, dim, index = call.bind("self", "dim", "index")
    like, axes = tracer.fake(call), tracer.axes(ref)
    shapes = [tracer.spec(each).shape for each in (ref, index)]
    if axes is None or dim % like.dim() in axes or any(shapes[0][axis] != shapes[1][axis] for axis in axes):
        return NotStreamable("it looks values up along a spatial axis")
    places = _as_map(tracer, index, axes)
    if places is None:
        return NotStreamable("its operands have their spatial axes at different places")
    accesses = {ref.name: Access(), places.name: Access()}
    return tracer.local(call.target, (ref, dim, places), like=like, axes=axes, accesses=accesses)


@rule(aten.broadcast_tensors.default)
def broadcast(tracer: Tracer, call: Call) -> tuple[Ref, ...] | NotStreamable:
    """Maps of the common shape as they are, others expanded along axes of extent 1."""
    (refs,) = call.args
    parts = [_expanded(tracer, ref, like.shape) for ref, like in zip(refs, tracer.fake(call), strict=True)]
    return next((part for part in parts if isinstance(part, NotStreamable)), tuple(parts))


def _expanded(tracer: Tracer, ref: Ref, shape: tuple[int, ...]) -> Any:
    if tracer.spec(ref).shape == tuple(shape):
        return ref
    if tracer.axes(ref) is None:
        return tracer.global_value(aten.expand.default, ref, tuple(shape))
    return reshape(tracer, Call(aten.expand.default, (ref, tuple(shape)), {}))


# --- samples ------------------------------------------------------------------------------------------


def _classes(num_classes: int) -> Tensor:
    """Classes (2, 43, 37), some of them -100."""
    places = torch.arange(2 * 43 * 37).reshape(2, 43, 37)
    return torch.where(places % 5 == 2, -100, places * 7 % num_classes)


class _WithClasses(nn.Module):
    """Losses of four classes, with and without weights and smoothing, also written out by operators."""

    target: Tensor
    weight: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, padding=1)
        self.register_buffer("weight", torch.tensor([0.5, 2.0, 1.0, 3.0]))
        self.register_buffer("target", _classes(4))

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        x, target, weight = self.conv(x), self.target, self.weight
        known = target.clamp(min=0)
        chances = torch.softmax(x, 1)
        hot = F.one_hot(known, 4).movedim(-1, 1)
        overlap = (chances * hot).sum((0, 2, 3)) / (chances + hot).sum((0, 2, 3))
        certain = chances.gather(1, known[:, None])
        return (
            F.cross_entropy(x, target),
            F.cross_entropy(x, target, weight, label_smoothing=0.2),
            F.cross_entropy(x, known, weight, ignore_index=2, reduction="sum"),
            F.cross_entropy(x, chances.detach().flip(1), weight, label_smoothing=0.1),
            F.nll_loss(F.log_softmax(x, 1), target, weight, reduction="none").mean(),
            1 - 2 * overlap.mean(),
            ((1 - certain) ** 2 * certain.log()).mean(),
        )


class _WithValues(nn.Module):
    """Losses against a map of numbers."""

    target: Tensor
    weight: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, padding=1)
        self.register_buffer("target", torch.linspace(0, 1, 2 * 4 * 43 * 37).reshape(2, 4, 43, 37).sin())
        self.register_buffer("weight", torch.linspace(0.5, 2, 4)[:, None, None])

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        x, target, weight = self.conv(x), self.target, self.weight
        return (
            F.mse_loss(x, target) + F.mse_loss(x, target[:, :1].expand_as(x), reduction="sum"),
            F.l1_loss(x, target, reduction="none").amax((2, 3)),
            F.smooth_l1_loss(x, target, beta=0.3) + F.huber_loss(x, target, delta=0.2),
            F.binary_cross_entropy(x.sigmoid(), target, weight, reduction="sum"),
            F.binary_cross_entropy_with_logits(x, target, weight, pos_weight=1 / weight),
            F.kl_div(F.log_softmax(x, 1), target, reduction="batchmean"),
            F.kl_div(F.log_softmax(x, 1), (target.abs() + 1).log(), log_target=True, reduction="sum"),
            F.poisson_nll_loss(x, target),
        )


SAMPLES = (
    Sample("losses of classes", _WithClasses),
    Sample("losses of values", _WithValues),
)
