"""Translations of losses of maps whose rows and columns are merged into one axis.

Cross-entropy of ``logits.flatten(2)``, or of scores (P, C) with channels last, is computed on the map itself.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch._ops import OpOverload

from streamcnn.capture.lowering.folded_axes import alike_folded, along_new_axes
from streamcnn.capture.lowering.folding import TRANSLATIONS, FoldingTracer, as_folded, as_seen
from streamcnn.graph.ops import losses
from streamcnn.graph.ops.losses import Over
from streamcnn.graph.ops.rules import Call, NotStreamable

aten = torch.ops.aten

_DIFFERENT = NotStreamable("its operands have their axes of space merged differently")


def with_reduction(
    call: Call, of_each: Callable[[Call], Any], reduced: Callable[[OpOverload, Any], Any]
) -> Any:
    """A loss of each value by ``of_each``, and its mean or sum by ``reduced`` if the call asks for one."""
    over = Over(call.bind("reduction")[0])
    each = of_each(call.replaced("reduction", int(Over.NONE)))
    if isinstance(each, NotStreamable) or over is Over.NONE:
        return each
    return reduced(aten.mean.default if over is Over.MEAN else aten.sum.default, each)


def _of_values(tracer: FoldingTracer, call: Call) -> Any:
    """Translate a loss of each value by itself, with its reduction."""

    def reduced(target: OpOverload, each: Any) -> Any:
        return tracer.stream(Call(target, (as_folded(tracer, each).ref,), {}))

    return with_reduction(call, partial(alike_folded, tracer), reduced)


def _of_classes(tracer: FoldingTracer, call: Call) -> Any:
    """Translate a loss of scores (N, C, P) with classes (N, P), or of scores (P, C) with classes (P,)."""
    operands = call.bind("self", "target")
    scores, target = (as_folded(tracer, each) for each in operands)
    if any(tracer.axes(each.ref) is None for each in (scores, target)):
        return _DIFFERENT
    first, second = scores.ref, target.ref
    if target.runs == (2,):
        # One image, without its batch axis.
        first, second = (
            tracer.stream(Call(aten.unsqueeze.default, (each, 0), {})) for each in (first, second)
        )
    if scores.runs == (*target.runs, 1) and len(target.runs) == 1:
        first = tracer.stream(Call(aten.permute.default, (first, (0, 3, 1, 2)), {}))
    elif (scores.runs, target.runs) != ((1, 1, 2), (1, 2)):
        return _DIFFERENT
    result = tracer.stream(call.replaced("self", first).replaced("target", second))
    if isinstance(result, NotStreamable) or tracer.axes(result) is None:
        return result
    if target.runs == (2,):
        result = tracer.stream(Call(aten.squeeze.dim, (result, 0), {}))
    return as_seen(tracer, result, target.runs, tracer.fake_seen(call).shape)


def _broadcast(tracer: FoldingTracer, call: Call) -> Any:
    """Translate ``broadcast_tensors`` of values of one shape, which stay as they are."""
    (values,) = call.args
    seen = (as_folded(tracer, value) for value in values)
    shapes = {value.seen(tracer.spec(value.ref).shape) for value in seen}
    return tuple(values) if len(shapes) == 1 else _DIFFERENT


TRANSLATIONS.update(
    {
        losses.loss_of_values: _of_values,
        losses.loss_of_classes: _of_classes,
        losses.one_hot: along_new_axes,
        losses.broadcast: _broadcast,
    }
)
