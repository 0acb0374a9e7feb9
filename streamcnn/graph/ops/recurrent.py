"""Recurrent layers (LSTM, GRU) over the rows, the columns, or a sequence at each position of a map.

A sequence is an image of the layer's batch, which has spatial axes among its own. Sequences along the other
spatial axis are whole in every tile.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from streamcnn.geometry.axis_maps import Broadcast, Line, Same
from streamcnn.graph.costs import CallBytes, Cost, Operand, Operation, Routine, Saves, declare
from streamcnn.graph.ops.rules import Call, NotStreamable, Sample, Tracer, rule
from streamcnn.graph.ops.samples import chain
from streamcnn.graph.program import Access, Ref

aten = torch.ops.aten

_PLACES = (
    *("input", "hx", "params", "has_biases", "num_layers", "dropout", "train", "bidirectional"),
    "batch_first",
)


@rule(aten.gru.input, aten.lstm.input, aten.rnn_relu.input, aten.rnn_tanh.input)
def recurrent_layer(tracer: Tracer, call: Call) -> NotStreamable:
    """A recurrent layer: its batch has positions, so it is a call that merges spatial axes."""
    return NotStreamable("its batch has no positions")


def layer_on_lines(
    tracer: Tracer, call: Call, ref: Ref, states: Sequence[Ref], batch: range, likes: Sequence[Tensor]
) -> tuple[Ref, ...]:
    """Record a recurrent layer on a map (..., *batch, T, C) or (T, *batch, C).

    Parameters
    ----------
    states
        The layer's first states, as maps (layers, ..., C) that have one position along the axis of time.
    batch
        The map's axes that make up the batch.
    likes
        Fake tensors of the whole results, with the map's own axes.
    """
    axes, shape = tracer.axes(ref), tracer.spec(ref).shape
    assert axes is not None
    options = tuple(call.bind(*_PLACES[3:]))
    params = call.bind("params")[0]
    # States have an axis more in front, and one position along the axis of time.
    once = Access(*(Same() if axis in batch else Broadcast() for axis in axes))
    access = Access(*(Same() if axis in batch else Line(shape[axis]) for axis in axes))
    found = []
    for index, like in enumerate(likes):
        places = axes if index == 0 else (axes[0] + 1, axes[1] + 1)
        found.append(
            tracer.local(
                layer_result,
                (ref, tuple(states), tuple(params), call.target, options, (batch.start, batch.stop), index),
                like=like,
                axes=places,
                accesses={ref.name: access, **dict.fromkeys((state.name for state in states), once)},
                heavy=True,
            )
        )
    return tuple(found)


def layer_result(
    x: Tensor,
    states: Sequence[Tensor],
    params: Sequence[Tensor],
    layer: Callable[..., tuple[Tensor, ...]],
    options: tuple[Any, ...],
    batch: tuple[int, int],
    index: int,
) -> Tensor:
    """One of a recurrent layer's results, whose batch is made up of the axes ``batch`` of ``x``."""
    start, stop = batch
    first = [state.flatten(1, -2).contiguous() for state in states]
    sequences = x.flatten(start, stop - 1)
    results = layer(sequences, first if len(first) > 1 else first[0], list(params), *options)
    result = results[index]
    if index:
        return result.reshape(*states[index - 1].shape)
    return result.reshape(*x.shape[:-1], result.shape[-1])


def _weights(operation: Operation) -> list[Operand]:
    """The layer's matrices."""
    return [each for each in operation.args[2] if len(each.shape) == 2]


def _positions(operation: Operation) -> int:
    x = operation.args[0]
    return math.prod(x.shape[:-1])


def _operations(operation: Operation) -> int:
    """Every position meets every matrix once."""
    return 2 * _positions(operation) * sum(math.prod(each.shape) for each in _weights(operation))


def _saved(operation: Operation) -> int:
    """Bytes of the gates, and of the states in several forms, of each layer and direction.

    A matrix of a layer has a row for each gate and hidden channel; a layer has two. oneDNN, which computes
    LSTMs in float32, takes more where there are fewer than 16 hidden channels.
    """
    rows = sum(each.shape[0] for each in _weights(operation)) // 2
    return 4 * rows * _positions(operation) * int(operation.results[0].dtype.itemsize)


def _workspace(nbytes: CallBytes) -> int:
    return 2 * nbytes.operands + 8 * nbytes.result


declare(
    layer_result,
    cost=Cost(
        operations=_operations,
        workspace=_workspace,
        saves=Saves(operands=True, beside=_saved),
        routine=Routine.MATRIX_PRODUCT,
    ),
)


class _Lines(nn.Module):
    """Rows and then columns through recurrent layers, as in ReNet."""

    def __init__(self) -> None:
        super().__init__()
        self.rows = nn.LSTM(4, 16, batch_first=True, bidirectional=True)
        self.columns = nn.GRU(32, 4, num_layers=2)

    def forward(self, x: Tensor) -> Tensor:
        n, c, h, w = x.shape
        y = self.rows(x.permute(0, 2, 3, 1).reshape(n * h, w, c))[0].reshape(n, h, w, -1)
        columns = y.permute(1, 0, 2, 3).reshape(h, n * w, -1)
        result: Tensor = self.columns(columns)[0].reshape(h, n, w, -1).permute(1, 3, 0, 2)
        return result


SAMPLES = (Sample("recurrent layers", lambda: chain(nn.Conv2d(3, 4, 3), _Lines())),)
