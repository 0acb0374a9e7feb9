"""Translations of recurrent layers whose batch is made up of images and positions."""

from __future__ import annotations

from typing import Any

from streamcnn.capture.lowering.folding import (
    TRANSLATIONS,
    Folded,
    FoldingTracer,
    as_folded,
    as_seen,
    is_global,
    parts_of,
    reshaped,
    values_of,
)
from streamcnn.graph.ops import recurrent
from streamcnn.graph.ops.rules import Call, NotStreamable
from streamcnn.graph.program import Ref


def _recurrent_layer(tracer: FoldingTracer, call: Call) -> Any:
    """Translate a recurrent layer along rows or columns, or along an axis that is not spatial."""
    value = as_folded(tracer, call.args[0])
    states, layers, dropout, trains = call.bind("hx", "num_layers", "dropout", "train")
    states = [states] if isinstance(states, (Ref, Folded)) else states
    if not all(is_global(tracer, each) for each in values_of(call)[1:]):
        return NotStreamable("its first states or weights depend on the position")
    if len(value.runs) != 3:
        return NotStreamable("its batch has no positions")
    if dropout and trains and layers > 1:
        return NotStreamable("it has dropout between its layers")
    batch = 0 if call.bind("batch_first")[0] else 1
    time, channels = value.span(1 - batch), value.span(2)
    axes = tracer.axes(value.ref)
    assert axes is not None
    if len(time) > 1 or len(channels) > 1 or channels[0] in axes:
        return NotStreamable("it works along merged axes of space")
    # A state is a map with one position along the axis of time: (layers, ..., channels).
    images = parts_of(tracer, value, batch)
    between = (*images, 1) if batch == 0 else (1, *images)
    like, *last = tracer.fake_seen(call)
    begun = []
    for state, each in zip(states, last, strict=True):
        apart = reshaped(tracer, state, (each.shape[0], *between, each.shape[-1]))
        begun.append(tracer.promote(apart, (axes[0] + 1, axes[1] + 1)))
    extents = tracer.spec(value.ref).shape
    likes = [like.new_empty((*extents[:-1], like.shape[-1]))]
    likes += [each.new_empty((each.shape[0], *between, each.shape[-1])) for each in last]
    output, *states = recurrent.layer_on_lines(tracer, call, value.ref, begun, value.span(batch), likes)
    if time[0] in axes:
        # The last states of lines are one row or column, which the code goes on with as it likes.
        states = [tracer.gather(state) for state in states]
    run = (1, len(between), 1)
    seen = (as_seen(tracer, state, run, each.shape) for state, each in zip(states, last, strict=True))
    return (as_seen(tracer, output, value.runs, like.shape), *seen)


TRANSLATIONS[recurrent.recurrent_layer] = _recurrent_layer
