"""Losses of tokens in parts, such as those of a detector's levels; maxima of other axes, and assignments."""

from __future__ import annotations

from typing import Any

import torch

from streamcnn.capture.lowering.joined import HANDLERS, MEET, Caller, joined_in, shape_seen
from streamcnn.capture.lowering.joined_calls import each_part, listed_axes
from streamcnn.graph.ops import losses, reductions, writing
from streamcnn.graph.ops.losses import Over
from streamcnn.graph.ops.rules import Call, NotStreamable
from streamcnn.graph.schemas import takes

aten = torch.ops.aten


def _of_values(caller: Caller, call: Call) -> Any:
    """A loss of each value, with its reduction."""
    over = Over(call.bind("reduction")[0])
    each = each_part(caller, call.replaced("reduction", int(Over.NONE)))
    if isinstance(each, NotStreamable) or over is Over.NONE:
        return each
    target = aten.mean.default if over is Over.MEAN else aten.sum.default
    return caller.called(Call(target, (each,), {}))


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
