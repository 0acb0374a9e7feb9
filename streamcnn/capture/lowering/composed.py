"""Calls that are lowered to several others: entries of an axis at an index that is a tensor."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from streamcnn.capture.lowering.folded_indices import known_places
from streamcnn.capture.lowering.joined import Caller, Handler, shape_seen
from streamcnn.graph.costs import NOTHING, Cost, declare
from streamcnn.graph.entries import ENTRY, entry_overwritten
from streamcnn.graph.ops.rules import Call

aten = torch.ops.aten


def _entry(caller: Caller, call: Call) -> Any:
    """``x[:, index]``."""
    value, dim, index = call.args
    places = caller.called(Call(known_places, (index, shape_seen(caller.recording, value)[dim], True), {}))
    line = caller.called(Call(aten.reshape.default, (places, [1]), {}))
    taken = caller.called(Call(aten.index_select.default, (value, dim, line), {}))
    return caller.called(Call(aten.squeeze.dim, (taken, dim), {}))


def _entry_overwritten(caller: Caller, call: Call) -> Any:
    """``x[:, index] = part``."""
    into, part, dim, index = call.args
    extents = shape_seen(caller.recording, into)
    places = caller.called(Call(known_places, (index, extents[dim], True), {}))
    is_there = caller.called(Call(is_place, (places, extents[dim], len(extents) - dim - 1), {}))
    values = caller.called(Call(aten.unsqueeze.default, (part, dim), {}))
    return caller.called(Call(aten.where.self, (is_there, values, into), {}))


def is_place(place: Tensor, total: int, num_after: int) -> Tensor:
    """Whether each of ``total`` positions is ``place``: truth values (total, 1, ...)."""
    found = torch.arange(total, device=place.device) == place
    return found.reshape(total, *(1,) * num_after)


declare(is_place, cost=Cost(saves=NOTHING, detaches=True))

COMPOSED: dict[Any, Handler] = {ENTRY: _entry, entry_overwritten: _entry_overwritten}
"""What carries out such calls, by their targets."""
