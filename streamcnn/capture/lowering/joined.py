"""Tokens of a map that the code joins with others: class tokens, registers, padding, or those of other maps.

``torch.cat([class_token, tokens], 1)`` has one axis for values without positions and for all positions of a
map, and a detector joins the anchors of several maps, its levels. They stay in parts. Operators that treat
every token alike are applied to each part; where tokens meet, as in a sum over all of them or in attention,
the parts' results are put together.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch.utils import _pytree as pytree

from streamcnn.capture.lowering.folding import Folded, FoldingTracer
from streamcnn.graph.ops.rules import Call, NotStreamable, rule_for
from streamcnn.graph.program import Ref

aten = torch.ops.aten

MEET = NotStreamable("tokens of a map and others that are joined with them meet in it")


@dataclass(frozen=True, slots=True)
class Joined:
    """Values side by side along one axis, as the code sees them, among them maps with merged axes."""

    parts: tuple[Ref | Folded, ...]
    axis: int


class Caller(Protocol):
    """What carries out calls, here those on parts."""

    @property
    def recording(self) -> FoldingTracer:
        """What records nodes."""

    def called(self, call: Call) -> Any:
        """The result of a call."""

    def whole(self, value: Any) -> Ref:
        """A value as a global one."""


Handler = Callable[[Caller, Call], Any]

HANDLERS: dict[Any, Handler] = {}
"""What carries out a call on parts, by its operator's rule."""


def stream_joined(caller: Caller, call: Call) -> Any:
    """The result of a call with operands in parts; :class:`NotStreamable` if it needs them whole."""
    handler = HANDLERS.get(rule_for(call.target))
    if handler is None:
        return NotStreamable("it has no rule for tokens of a map that are joined with others")
    return handler(caller, call)


def shape_seen(tracer: FoldingTracer, value: Ref | Folded | Joined) -> tuple[int, ...]:
    """The shape that the code sees."""
    if isinstance(value, Folded):
        return value.seen(tracer.spec(value.ref).shape)
    if isinstance(value, Ref):
        return tracer.spec(value).shape
    extents = list(shape_seen(tracer, value.parts[0]))
    extents[value.axis] = sum(sizes_of(tracer, value))
    return tuple(extents)


def first_ref(value: Ref | Folded | Joined) -> Ref:
    """The value's node, or that of its first part."""
    if isinstance(value, Joined):
        value = value.parts[0]
    return value.ref if isinstance(value, Folded) else value


def sizes_of(tracer: FoldingTracer, value: Joined) -> list[int]:
    """The number of tokens of each part."""
    return [shape_seen(tracer, part)[value.axis] for part in value.parts]


def is_joined(call: Call) -> bool:
    """Whether an operand is in parts."""
    return bool(joined_in(call))


def joined_in(call: Call) -> list[Joined]:
    return [each for each in pytree.tree_leaves((call.args, dict(call.kwargs))) if isinstance(each, Joined)]


def values_seen(call: Call) -> list[Ref | Folded | Joined]:
    leaves = pytree.tree_leaves((call.args, dict(call.kwargs)))
    return [leaf for leaf in leaves if isinstance(leaf, (Ref, Folded, Joined))]


def is_merged(value: Ref | Folded, axis: int) -> bool:
    return isinstance(value, Folded) and value.runs[axis] > 1


def as_type(caller: Caller, value: Ref | Folded | Joined, dtype: torch.dtype) -> Any:
    """A value in a dtype; itself if it has that."""
    if caller.recording.spec(first_ref(value)).dtype == dtype:
        return value
    return caller.called(Call(aten.to.dtype, (value, dtype), {}))
