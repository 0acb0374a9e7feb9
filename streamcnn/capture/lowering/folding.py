"""Axes of space that a reshape has merged: tokens, and windows as a longer batch.

Transformers see a map (N, C, H, W) as tokens (N, H * W, C), or windows of it as images of their own. No value
moves by that, so the map keeps its axes; what is remembered is how many of them each axis that the code sees
is made of. A call on what the code sees is translated to one on the map, which the rules of the operators
then stream like any other. Modules ``folded_*`` say how, one for each family of operators.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, Protocol

import torch
from torch.utils import _pytree as pytree

from streamcnn.graph.ops import products, shape, sliding_blocks
from streamcnn.graph.ops.rules import Call, NotStreamable, Tracer, rule_for
from streamcnn.graph.program import Ref

Runs = tuple[int, ...]
"""By axis that the code sees: how many consecutive axes of the map it is made of."""


@dataclass(frozen=True, slots=True)
class Folded:
    """A map as the code sees it."""

    ref: Ref
    runs: Runs

    @property
    def starts(self) -> tuple[int, ...]:
        """By axis that the code sees: the first of the map's axes."""
        return tuple(accumulate(self.runs, initial=0))[:-1]

    def span(self, axis: int) -> range:
        """The map's axes behind one that the code sees."""
        start = self.starts[axis]
        return range(start, start + self.runs[axis])

    def seen(self, extents: Sequence[int]) -> tuple[int, ...]:
        """The shape that the code sees, of a map or a tile of these extents."""
        return tuple(math.prod(extents[i] for i in self.span(axis)) for axis in range(len(self.runs)))


class FoldingTracer(Tracer, Protocol):
    """What is asked of the tracer here besides what rules may ask."""

    def stream(self, call: Call) -> Any:
        """What the call's rule answers."""

    def gather(self, ref: Ref) -> Ref:
        """The whole of a map as a global value, recorded once."""

    def fake_seen(self, call: Call) -> Any:
        """The call's result on fake tensors as the code sees it."""


Translation = Callable[[FoldingTracer, Call], Any]

TRANSLATIONS: dict[Any, Translation] = {}
"""How a call is translated, by the rule that its operator has."""

MERGING = (shape.reshape, products.matrix_product, products.attention, sliding_blocks.blocks)
"""Rules of operators whose operands are whole maps, and that stream more than their rule does here."""


def is_folded(call: Call) -> bool:
    """Whether an operand has merged axes."""
    return any(isinstance(leaf, Folded) for leaf in pytree.tree_leaves((call.args, dict(call.kwargs))))


def stream_folded(tracer: FoldingTracer, call: Call) -> Any:
    """Carry out a call that merges axes of space, or whose operands have merged ones, on the map itself.

    The result is a ref, a :class:`Folded` one, a tuple of those, or :class:`NotStreamable`.
    """
    translate = TRANSLATIONS.get(rule_for(call.target))
    if translate is None:
        return NotStreamable("it has no rule for axes of space that are merged")
    return translate(tracer, call)


def unfolded(tracer: FoldingTracer, value: Folded) -> Ref:
    """The whole of a map as a global value, as the code sees it."""
    whole = tracer.gather(value.ref)
    return reshaped(tracer, whole, value.seen(tracer.spec(value.ref).shape))


# --- what translations share ----------------------------------------------------------------------------


def as_folded(tracer: FoldingTracer, value: Ref | Folded) -> Folded:
    """A value as one with merged axes, if only in runs of one."""
    return value if isinstance(value, Folded) else Folded(value, (1,) * len(tracer.spec(value).shape))


def as_seen(tracer: FoldingTracer, result: Any, runs: Runs, shape: Sequence[int]) -> Any:
    """A map or a global value as the code sees it, or why there is none."""
    if isinstance(result, NotStreamable):
        return result
    if tracer.axes(result) is None:
        return reshaped(tracer, result, tuple(shape))
    folded = Folded(result, runs)
    extents = tracer.spec(result).shape
    assert sum(runs) == len(extents), (runs, extents)
    assert folded.seen(extents) == tuple(shape), (runs, extents, shape)
    return folded if any(run > 1 for run in runs) else result


def reshaped(tracer: FoldingTracer, ref: Ref, after: tuple[int, ...]) -> Ref:
    if tracer.spec(ref).shape == after:
        return ref
    result: Ref = tracer.global_value(torch.Tensor.reshape, ref, after)
    return result


def values_of(call: Call) -> list[Ref | Folded]:
    leaves = pytree.tree_leaves((call.args, dict(call.kwargs)))
    return [leaf for leaf in leaves if isinstance(leaf, (Ref, Folded))]


def is_merged_like(tracer: FoldingTracer, value: Folded, first: Folded) -> bool:
    """Whether a map has the axes merged that ``first`` has, of the same extents or of one position.

    As many positions can be of other extents: those of a map that was turned.
    """
    before = len(first.runs) - len(value.runs)
    pairs = [
        (parts_of(tracer, value, axis), parts_of(tracer, first, axis + before))
        for axis in range(len(value.runs))
    ]
    return all(
        len(own) == len(others) and (len(own) == 1 or own == others or 1 in map(math.prod, (own, others)))
        for own, others in pairs
    )


def parts_of(tracer: FoldingTracer, value: Folded, axis: int) -> tuple[int, ...]:
    """The extents of the map's axes behind one that the code sees."""
    extents = tracer.spec(value.ref).shape
    return tuple(extents[i] for i in value.span(axis))


def taken_apart(tracer: FoldingTracer, ref: Ref, beside: Folded, extents: Sequence[int]) -> Ref:
    """A global value that meets a map of these extents, with the axes apart that are merged there."""
    before = tracer.spec(ref).shape
    after: list[int] = []
    for axis, extent in zip(reversed(range(len(beside.runs))), reversed(before), strict=False):
        run = [extents[i] for i in beside.span(axis)] if beside.runs[axis] > 1 else [extent]
        after[:0] = run if extent > 1 else [1] * len(run)
    return reshaped(tracer, ref, tuple(after))
