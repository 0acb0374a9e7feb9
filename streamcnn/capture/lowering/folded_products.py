"""Translations of matrix products and attention whose rows, columns or batches are positions."""

from __future__ import annotations

from collections.abc import Sequence
from string import ascii_lowercase
from typing import Any

import torch

from streamcnn.capture.lowering.folded_equations import by_letters
from streamcnn.capture.lowering.folding import (
    TRANSLATIONS,
    Folded,
    FoldingTracer,
    as_folded,
    as_seen,
    is_merged_like,
    parts_of,
    reshaped,
    taken_apart,
    unfolded,
)
from streamcnn.graph.ops import attention, products
from streamcnn.graph.ops.rules import Call, NotStreamable
from streamcnn.graph.program import Ref

aten = torch.ops.aten


def _product(tracer: FoldingTracer, call: Call) -> Any:
    """Translate a product in which positions are rows, columns, or images of a batch.

    Where every row or column meets every position, as queries meet keys, the other operand is gathered whole.
    """
    first, second = (as_folded(tracer, value) for value in call.args[:2])
    if min(len(first.runs), len(second.runs)) < 2:
        return NotStreamable("one of its operands is a vector")
    rows, columns = _place(tracer, first), _place(tracer, second)
    like = tracer.fake_seen(call)
    if rows == -2:
        result = products.by_rows(tracer, first.ref, first.span(-2), _whole(tracer, second), like)
        return as_seen(tracer, result, (1,) * (like.dim() - 2) + (first.runs[-2], 1), like.shape)
    if columns == -1:
        result = products.by_columns(tracer, _whole(tracer, first), second.ref, second.span(-1), like)
        return as_seen(tracer, result, (1,) * (like.dim() - 1) + (second.runs[-1],), like.shape)
    if rows == -1 and columns == -2:
        return _over_positions(tracer, first, second)
    return _by_batch(tracer, call, (first, second))


def _over_positions(tracer: FoldingTracer, first: Folded, second: Folded) -> Any:
    """Translate a product that sums over positions, such as keys by values in linear attention."""
    ndim = len(first.runs)
    turned = (*range(ndim - 2), *first.span(-1), ndim - 2)
    columns = tracer.stream(Call(aten.permute.default, (first.ref, turned), {}))
    shapes = [tracer.spec(ref).shape[:-1] for ref in (columns, second.ref)]
    if len(second.runs) != ndim or shapes[0] != shapes[1] or tracer.axes(columns) != tracer.axes(second.ref):
        return NotStreamable("it sums over all positions of operands that have them in different shapes")
    return products.over_positions(tracer, columns, second.ref, second.span(-2))


def _attention(tracer: FoldingTracer, call: Call) -> Any:
    """Translate attention whose queries are positions, or attention within each image of a batch."""
    query, key, value = (as_folded(tracer, each) for each in call.args[:3])
    (mask,) = call.bind("attn_mask")
    places = [_place(tracer, each) for each in (query, key, value)]
    if any(call.bind("dropout_p", "is_causal", "enable_gqa")):
        return NotStreamable("it has dropout, is causal, or groups queries")
    if places[0] != -2:
        return _by_batch(tracer, call, (query, key, value), mask)
    if mask is not None:
        mask = _rows_of_mask(tracer, mask, query)
    if isinstance(mask, NotStreamable):
        return mask
    whole = (_whole(tracer, key), _whole(tracer, value))
    (scale,) = call.bind("scale")
    like = tracer.fake_seen(call)
    result = attention.attend_by_rows(tracer, query.ref, query.span(-2), whole, mask, scale, like)
    return as_seen(tracer, result, (1,) * (like.dim() - 2) + (query.runs[-2], 1), like.shape)


def _rows_of_mask(tracer: FoldingTracer, mask: Ref | Folded, query: Folded) -> Ref | NotStreamable:
    """A mask whose rows are the queries' positions, as a map; see :func:`_rows_apart` for a global one."""
    if isinstance(mask, Ref) and tracer.axes(mask) is None:
        return _rows_apart(tracer, mask, query)
    value = as_folded(tracer, mask)
    has_rows = _place(tracer, value) == -2 and parts_of(tracer, value, -2) == parts_of(tracer, query, -2)
    if not has_rows or any(run > 1 for run in (*value.runs[:-2], value.runs[-1])):
        return NotStreamable("its mask is computed from maps with other positions")
    return value.ref


def _rows_apart(tracer: FoldingTracer, mask: Ref, query: Folded) -> Ref:
    """A mask with a row for each position as a map; a mask with one row as a global value that broadcasts."""
    extents, before = tracer.spec(query.ref).shape, tracer.spec(mask).shape
    if before[-2] == 1:
        return reshaped(tracer, mask, (*before[:-2], *((1,) * query.runs[-2]), before[-1]))
    rows = [extents[i] for i in query.span(-2)]
    axes = tracer.axes(query.ref)
    assert axes is not None
    start = len(before) - 2 - query.span(-2).start
    apart = reshaped(tracer, mask, (*before[:-2], *rows, before[-1]))
    return tracer.promote(apart, (axes[0] + start, axes[1] + start))


def _by_batch(tracer: FoldingTracer, call: Call, operands: Sequence[Folded], mask: Any = None) -> Any:
    """Translate a product within each image of a batch: spatial axes stay in front of the matrices'."""
    like = tracer.fake_seen(call)
    first = max(operands, key=lambda each: (_place(tracer, each) is not None, len(each.runs)))
    place = _place(tracer, first)
    if place is None or place >= -2 or like.dim() != len(first.runs):
        return _along_lines(tracer, call, operands, mask, like)
    extents = tracer.spec(first.ref).shape
    translated: list[Ref] = []
    for each in operands:
        if _place(tracer, each) is None:
            translated.append(taken_apart(tracer, each.ref, first, extents))
        elif each.runs == first.runs and is_merged_like(tracer, each, first):
            translated.append(each.ref)
        else:
            return NotStreamable("its operands have their axes of space merged differently")
    # ``bmm`` and ``mm`` take exactly three and two axes.
    target = aten.matmul.default if call.target in (aten.bmm.default, aten.mm.default) else call.target
    call = Call(target, (*translated, *call.args[len(translated) :]), call.kwargs)
    if isinstance(mask, Ref) and tracer.axes(mask) is None:
        call = call.replaced("attn_mask", taken_apart(tracer, mask, first, extents))
    elif isinstance(mask, Folded) and mask.runs == first.runs and is_merged_like(tracer, mask, first):
        call = call.replaced("attn_mask", mask.ref)
    elif mask is not None:
        return NotStreamable("its mask has axes of space merged differently")
    return as_seen(tracer, tracer.stream(call), first.runs, like.shape)


def _along_lines(
    tracer: FoldingTracer, call: Call, operands: Sequence[Folded], mask: Any, like: torch.Tensor
) -> Any:
    """Translate a product within each row or column, or within stripes of some.

    One spatial axis is among those of the batch, and one among those of the matrices.
    """
    batch = operands[0].runs[:-2]
    shapes = [tracer.spec(each.ref).shape for each in operands]
    if mask is not None or like.dim() != len(operands[0].runs) or any(x.runs[:-2] != batch for x in operands):
        return NotStreamable("it mixes positions")
    if any(tracer.axes(each.ref) is None for each in operands):
        return NotStreamable("it mixes positions")
    if any(shape[: sum(batch)] != shapes[0][: sum(batch)] for shape in shapes):
        return NotStreamable("its operands have their axes of space merged differently")
    if len(operands) == 2:
        if all(run == 1 for each in operands for run in each.runs[-2:]):
            result = tracer.stream(Call(aten.matmul.default, tuple(each.ref for each in operands), {}))
            return as_seen(tracer, result, (*batch, 1, 1), like.shape)
        letters = ascii_lowercase[: len(batch)]
        return by_letters(tracer, [letters + "XY", letters + "YZ"], letters + "XZ", operands, like)
    query, key, value = operands
    if any(x.runs != query.runs for x in operands) or query.runs[-1] > 1 or call.bind("is_causal")[0]:
        return NotStreamable("it mixes positions")
    (scale,) = call.bind("scale")
    result = attention.attend_along(tracer, (query.ref, key.ref, value.ref), query.runs[-2], scale)
    return as_seen(tracer, result, query.runs, like.shape)


def _place(tracer: FoldingTracer, value: Folded) -> int | None:
    """The axis, as the code sees it, that holds the spatial axes, counted from the end.

    None for a global value, 0 for a map whose spatial axes are apart, or that has other merged axes.
    """
    axes = tracer.axes(value.ref)
    if axes is None:
        return None
    ndim = len(value.runs)
    found = {axis - ndim for axis in range(ndim) for each in axes if each in value.span(axis)}
    others = any(run > 1 for axis, run in enumerate(value.runs) if axis - ndim not in found)
    return 0 if len(found) > 1 or others else found.pop()


def _whole(tracer: FoldingTracer, value: Folded) -> Ref:
    return value.ref if tracer.axes(value.ref) is None else unfolded(tracer, value)


TRANSLATIONS.update(
    {
        products.matrix_product: _product,
        attention.attention: _attention,
    }
)
