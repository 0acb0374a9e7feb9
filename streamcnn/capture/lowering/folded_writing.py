"""Translations of assignments to ranges of axes that are not merged, such as ``boxes[..., :2] = centres``."""

from __future__ import annotations

from typing import Any

from streamcnn.capture.lowering.folding import (
    TRANSLATIONS,
    FoldingTracer,
    as_folded,
    as_seen,
    is_merged_like,
    taken_apart,
)
from streamcnn.graph.ops import writing
from streamcnn.graph.ops.rules import Call, NotStreamable


def _range_replaced(tracer: FoldingTracer, call: Call) -> Any:
    """Translate values with a range of one axis replaced."""
    into, part, dim, *place = call.args
    values = [as_folded(tracer, each) for each in (into, part)]
    maps = [value for value in values if tracer.axes(value.ref) is not None]
    first = maps[0]
    dim %= len(first.runs)
    if first.runs[dim] > 1:
        return NotStreamable("it works along merged axes of space")
    if any(value.runs != first.runs or not is_merged_like(tracer, value, first) for value in maps):
        return NotStreamable("its operands have their axes of space merged differently")
    extents = tracer.spec(first.ref).shape
    into, part = (
        value.ref if value in maps else taken_apart(tracer, value.ref, first, extents) for value in values
    )
    result = tracer.stream(Call(call.target, (into, part, first.starts[dim], *place), call.kwargs))
    return as_seen(tracer, result, first.runs, tracer.fake_seen(call).shape)


TRANSLATIONS.update({writing.slice_scatter: _range_replaced})
