"""Losses of tokens in parts, such as those of a detector's levels; maxima of other axes, and assignments."""

from __future__ import annotations

from functools import partial
from typing import Any

from torch._ops import OpOverload

from streamcnn.capture.lowering.folded_losses import with_reduction
from streamcnn.capture.lowering.joined import HANDLERS, MEET, Caller, joined_in, shape_seen
from streamcnn.capture.lowering.joined_calls import each_part, listed_axes
from streamcnn.graph.ops import losses, reductions, writing
from streamcnn.graph.ops.rules import Call
from streamcnn.graph.schemas import takes


def _of_values(caller: Caller, call: Call) -> Any:
    """A loss of each value, with its reduction."""

    def reduced(target: OpOverload, each: Any) -> Any:
        return caller.called(Call(target, (each,), {}))

    return with_reduction(call, partial(each_part, caller), reduced)


def _extremum(caller: Caller, call: Call) -> Any:
    """Largest or smallest values over axes other than that of the tokens."""
    (value,) = joined_in(call)
    dims = call.bind("dim")[0] if takes(call.target, "dim") else None
    # Over tokens, equal values of several parts would have other shares of the gradient.
    if value.axis in listed_axes(dims, len(shape_seen(caller.recording, value))):
        return MEET
    return each_part(caller, call)


def _scattered(caller: Caller, call: Call) -> Any:
    """Values written to a range of an axis other than that of the tokens."""
    first = joined_in(call)[0]
    dim = call.args[2] % len(shape_seen(caller.recording, first))
    return MEET if dim == first.axis else each_part(caller, call)


def _broadcast(caller: Caller, call: Call) -> Any:
    """Values of one shape, which stay as they are."""
    (values,) = call.args
    shapes = {shape_seen(caller.recording, value) for value in values}
    return tuple(values) if len(shapes) == 1 else MEET


HANDLERS.update(
    {
        losses.broadcast: _broadcast,
        losses.loss_of_values: _of_values,
        reductions.extremum: _extremum,
        writing.slice_scatter: _scattered,
    }
)
