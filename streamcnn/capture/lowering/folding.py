"""Axes of space that a reshape has merged: tokens, and windows as a longer batch.

Transformers treat a map (N, C, H, W) as tokens (N, H * W, C), or its windows as images of their own. That
moves no value, so the map keeps its axes, and we record how many of them make up each axis that the code
sees. A call on the merged axes is translated to a call on the map, which the operators' rules stream like any
other. The modules ``folded_*`` hold the translations, one module for each family of operators.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, Protocol

import torch
from torch.utils import _pytree as pytree

from streamcnn.graph.ops import (
    attention,
    convolution,
    images,
    normalization,
    products,
    recurrent,
    shape,
    sliding_blocks,
)
from streamcnn.graph.ops.rules import Call, NotStreamable, Tracer, rule_for
from streamcnn.graph.program import Ref

Runs = tuple[int, ...]
"""For each axis that the code sees, the number of consecutive axes of the map that make it up."""


@dataclass(frozen=True, slots=True)
class Folded:
    """A map with merged axes, as the code sees it."""

    ref: Ref
    runs: Runs

    @property
    def starts(self) -> tuple[int, ...]:
        """For each axis that the code sees, the first of the map's axes that make it up."""
        return tuple(accumulate(self.runs, initial=0))[:-1]

    def span(self, axis: int) -> range:
        """The map's axes that make up one axis that the code sees."""
        start = self.starts[axis]
        return range(start, start + self.runs[axis])

    def seen(self, extents: Sequence[int]) -> tuple[int, ...]:
        """The shape that the code sees of a map, or of a tile, with these extents."""
        return tuple(math.prod(extents[i] for i in self.span(axis)) for axis in range(len(self.runs)))


class FoldingTracer(Tracer, Protocol):
    """The tracer's interface for translations, beyond that for rules."""

    def stream(self, call: Call) -> Any:
        """The result of the operator's rule for a call."""

    def gather(self, ref: Ref) -> Ref:
        """The whole of a map as a global value, recorded once."""

    def cut_off(self, values: Iterable[Ref], kept: Ref) -> None:
        """Note values from which code kept only ``kept``: autograd gives them gradients of zero."""

    def fake_seen(self, call: Call) -> Any:
        """The call's result on fake tensors as the code sees it."""


Translation = Callable[[FoldingTracer, Call], Any]

TRANSLATIONS: dict[Any, Translation] = {}
"""The translation of a call, by its operator's rule."""

MERGING = (
    shape.reshape,
    products.matrix_product,
    products.einsum,
    products.tensordot,
    attention.attention,
    sliding_blocks.blocks,
    # Of lines (H, C, W), as those of a single image are, and of volumes.
    images.along_one_axis,
    # Of stripes of a single image.
    convolution.conv2d,
    normalization.batch_norm,
    normalization.group_norm,
    normalization.instance_norm,
    recurrent.recurrent_layer,
)
"""Rules of operators of which translations stream some calls on plain maps that the rule refuses."""


def is_folded(call: Call) -> bool:
    """Whether an operand has merged axes."""
    return any(isinstance(leaf, Folded) for leaf in pytree.tree_leaves((call.args, dict(call.kwargs))))


def is_global(tracer: Tracer, value: Ref | Folded) -> bool:
    """Whether a value is none of a map's."""
    return isinstance(value, Ref) and tracer.axes(value) is None


def stream_folded(tracer: FoldingTracer, call: Call) -> Any:
    """Record a call that merges spatial axes, or whose operands have merged ones, on the map itself.

    The result is a ref, a :class:`Folded` ref, a tuple of those, or :class:`NotStreamable`.
    """
    translate = TRANSLATIONS.get(rule_for(call.target))
    if translate is None:
        return NotStreamable("it has no rule for axes of space that are merged")
    return translate(tracer, call)


def unfolded(tracer: FoldingTracer, value: Folded) -> Ref:
    """The whole map as a global value, in the shape that the code sees."""
    whole = tracer.gather(value.ref)
    return reshaped(tracer, whole, value.seen(tracer.spec(value.ref).shape))


# --- what translations share ----------------------------------------------------------------------------


def as_folded(tracer: FoldingTracer, value: Ref | Folded) -> Folded:
    """``value`` as a :class:`Folded` ref, with runs of one axis if none are merged."""
    return value if isinstance(value, Folded) else Folded(value, (1,) * len(tracer.spec(value).shape))


def as_seen(tracer: FoldingTracer, result: Any, runs: Runs, shape: Sequence[int]) -> Any:
    """A map with ``runs``, or a global value with ``shape``, as the code sees it; a refusal stays one."""
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
    """Whether ``value`` has the same axes merged as ``first``, of the same extents or of one position.

    Equally many positions may have other extents, as those of a transposed map.
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
    """The extents of the map's axes that make up one axis that the code sees."""
    extents = tracer.spec(value.ref).shape
    return tuple(extents[i] for i in value.span(axis))


def taken_apart(tracer: FoldingTracer, ref: Ref, beside: Folded, extents: Sequence[int]) -> Ref:
    """Reshape a global value so that it broadcasts with ``beside``, a map of these ``extents``, unmerged."""
    before = tracer.spec(ref).shape
    after: list[int] = []
    for axis, extent in zip(reversed(range(len(beside.runs))), reversed(before), strict=False):
        run = [extents[i] for i in beside.span(axis)] if beside.runs[axis] > 1 else [extent]
        after[:0] = run if extent > 1 else [1] * len(run)
    return reshaped(tracer, ref, tuple(after))
