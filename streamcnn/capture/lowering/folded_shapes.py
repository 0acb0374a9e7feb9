"""Translations of operators that merge, split and permute spatial axes."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any

import torch

from streamcnn.capture.lowering.folding import TRANSLATIONS, Folded, FoldingTracer, Runs, as_folded, as_seen
from streamcnn.graph.ops import shape
from streamcnn.graph.ops.rules import Call, NotStreamable
from streamcnn.graph.program import Axes
from streamcnn.graph.schemas import places_of_axes

aten = torch.ops.aten


def _reshape(tracer: FoldingTracer, call: Call) -> Any:
    value = as_folded(tracer, call.args[0])
    axes = tracer.axes(value.ref)
    if axes is None:
        return NotStreamable("it gives a global value the shape of a map")
    after = tuple(tracer.fake_seen(call).shape)
    if call.target in (aten.expand.default, aten.broadcast_to.default):
        return _expand(tracer, value, after)
    found = regrouping(tracer.spec(value.ref).shape, axes, after)
    if found is None:
        return NotStreamable("it splits a spatial axis unevenly or merges it with another in parts")
    extents, runs = found
    ref = value.ref
    if extents != tracer.spec(ref).shape:
        ref = tracer.stream(Call(aten.reshape.default, (ref, extents), {}))
    return ref if isinstance(ref, NotStreamable) else as_seen(tracer, ref, runs, after)


def regrouping(
    before: Sequence[int], axes: Axes, after: Sequence[int]
) -> tuple[tuple[int, ...], Runs] | None:
    """The extents and runs of a map after a reshape of its shape ``before`` to ``after``; None if impossible.

    Both shapes are cut into the shortest groups of axes with equally many elements. A group without spatial
    axes takes the new axes. A group whose spatial axes become one axis with others stays, as a run. A spatial
    axis that is split, or merged with axes after it, is left to the rule of reshape.
    """
    groups = _groups(before, axes, after)
    if groups is None:
        return None
    extents: list[int] = []
    runs: list[int] = []
    for old, new in groups:
        spatial = [axis - old.start for axis in axes if old.start <= axis < old.stop]
        found = _of_group(before[old], after[new], spatial)
        if found is None:
            return None
        extents += found[0]
        runs += found[1]
    return tuple(extents), tuple(runs)


def _groups(before: Sequence[int], axes: Axes, after: Sequence[int]) -> list[tuple[slice, slice]] | None:
    """The groups of axes of both shapes, in order; None if the shapes have other numbers of elements."""
    found: list[tuple[slice, slice]] = []
    i = k = 0
    while i < len(before) or k < len(after):
        first, start = i, k
        if k < len(after) and after[k] == 1 and (i == len(before) or before[i] != 1):
            k += 1  # insert an axis of one position
        elif i < len(before) and before[i] == 1 and i not in axes and (k == len(after) or after[k] != 1):
            i += 1  # or remove one
        elif i == len(before) or k == len(after):
            return None
        else:
            i, k = i + 1, k + 1
            while (held := math.prod(before[first:i])) != (holds := math.prod(after[start:k])):
                if held < holds and i < len(before):
                    i += 1
                elif holds < held and k < len(after):
                    k += 1
                else:
                    return None
        found.append((slice(first, i), slice(start, k)))
    return found


def _of_group(
    before: Sequence[int], after: Sequence[int], spatial: Sequence[int]
) -> tuple[Sequence[int], Sequence[int]] | None:
    """Extents and runs of one group, whose axes ``spatial`` are spatial; None if impossible."""
    if not spatial or spatial == [0]:
        return after, [1] * len(after)
    if len(after) == 1:
        return before, [len(before)]
    parts = _parts(before, after, spatial)
    if parts is not None:
        return [extent for part in parts for extent in part], [len(part) for part in parts]
    *outer, last = before
    inner = math.prod(after[1:])
    if spatial != [len(outer)] or last % inner:
        return None
    # The outer part is merged with the axes before it; the inner part becomes other axes.
    return (*outer, last // inner, *after[1:]), [len(before)] + [1] * (len(after) - 1)


def _parts(before: Sequence[int], after: Sequence[int], spatial: Sequence[int]) -> list[list[int]] | None:
    """The extents of the parts of which each axis of ``after`` is made; None if axes in ``spatial`` are cut.

    These are parts of ``before``, too: channels may be cut into heads, for example. What has no spatial axis
    is one part.
    """
    sizes = sorted({math.prod(x[axis:]) for x in (before, after) for axis in range(len(x) + 1)}, reverse=True)
    begins = {math.prod(before[axis:]) for axis in spatial}

    def parts(shape: Sequence[int], axis: int) -> list[int] | None:
        largest, least = math.prod(shape[axis:]), math.prod(shape[axis + 1 :])
        pairs = list(itertools.pairwise(size for size in sizes if largest >= size >= least))
        if any(outer % inner for outer, inner in pairs):
            return None
        cut = [outer // inner for outer, inner in pairs]
        return cut if any(outer in begins for outer, _ in pairs) else [shape[axis]]

    # An axis of one position is no part.
    if any(before[axis] == 1 or parts(before, axis) != [before[axis]] for axis in spatial):
        return None
    found = [parts(after, axis) for axis in range(len(after))]
    return None if None in found else found  # type: ignore[return-value]


def _expand(tracer: FoldingTracer, value: Folded, after: tuple[int, ...]) -> Any:
    extents = tracer.spec(value.ref).shape
    before = value.seen(extents)
    added = len(after) - len(before)
    wanted = list(after[:added])
    for axis, extent in enumerate(after[added:]):
        if value.runs[axis] > 1 and extent != before[axis]:
            return NotStreamable("it repeats merged axes of space")
        wanted += [extents[i] for i in value.span(axis)] if value.runs[axis] > 1 else [extent]
    result = tracer.stream(Call(aten.expand.default, (value.ref, wanted), {}))
    return as_seen(tracer, result, (1,) * added + value.runs, after)


def _permute(tracer: FoldingTracer, call: Call) -> Any:
    value = as_folded(tracer, call.args[0])
    places = places_of_axes(call.target, len(value.runs), call.args[1:], call.kwargs)
    order = sorted(range(len(places)), key=places.__getitem__)
    axes = [i for axis in order for i in value.span(axis)]
    result = tracer.stream(Call(aten.permute.default, (value.ref, axes), {}))
    return as_seen(tracer, result, tuple(value.runs[axis] for axis in order), tracer.fake_seen(call).shape)


TRANSLATIONS.update({shape.reshape: _reshape, shape.permute: _permute})
