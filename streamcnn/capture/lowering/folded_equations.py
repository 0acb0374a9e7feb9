"""``einsum`` and ``tensordot`` of maps with merged spatial axes, and of maps whose positions are mixed.

A product that does not treat each position separately becomes a matrix product, in which positions are rows,
columns or summed over. Examples are attention, and the product of keys and values in linear attention.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from string import ascii_letters
from typing import Any

import torch

from streamcnn.capture.lowering.folding import (
    TRANSLATIONS,
    Folded,
    FoldingTracer,
    as_folded,
    as_seen,
    is_folded,
    is_global,
    parts_of,
    reshaped,
    stream_folded,
    values_of,
)
from streamcnn.graph.ops import products
from streamcnn.graph.ops.rules import Call, NotStreamable
from streamcnn.graph.program import Ref

aten = torch.ops.aten

Value = Ref | Folded
Extents = tuple[int, ...]

_MIXING = NotStreamable("it mixes positions")


def _einsum(tracer: FoldingTracer, call: Call) -> Any:
    """Translate ``einsum``, with a letter for each axis that the user's code sees."""
    equation, operands = call.bind("equation", "tensors")
    shapes = [_seen(tracer, value) for value in operands]
    named = products.terms_of(equation, [len(shape) for shape in shapes])
    if isinstance(named, NotStreamable):
        return named
    *terms, right = named
    # Without merged axes, the operator's own rule has refused it already.
    result = _MIXING
    if is_folded(call):
        result = by_letters(tracer, terms, right, operands, tracer.fake_seen(call))
    if not isinstance(result, NotStreamable):
        return result
    extents: dict[str, int] = {}
    for term, shape in zip(terms, shapes, strict=True):
        if len(set(term)) < len(term) or any(
            extents.setdefault(*pair) != pair[1] for pair in zip(term, shape, strict=True)
        ):
            # A diagonal, or an axis of one position that is repeated.
            return result
    if len(terms) > 2:
        return result
    # Axes of one operand alone that the result lacks are summed first.
    summed = [
        _summed(tracer, value, term, right + "".join(terms[:index] + terms[index + 1 :]))
        for index, (value, term) in enumerate(zip(operands, terms, strict=True))
    ]
    if any(isinstance(value, NotStreamable) for value, _ in summed):
        return result
    if len(summed) == 1:
        ((value, term),) = summed
        return _permuted(tracer, value, term, right)
    product = _as_matrices(tracer, summed[0], summed[1], right, extents)
    return result if isinstance(product, NotStreamable) else product


def by_letters(
    tracer: FoldingTracer, terms: Sequence[str], right: str, operands: Sequence[Value], like: torch.Tensor
) -> Any:
    """Translate a product at each position or along lines, with a letter for each of the maps' own axes.

    An axis that is merged in one operand is cut in the others as it is there. ``like`` is the result as the
    code sees it.
    """
    values = [as_folded(tracer, value) for value in operands]
    parts: dict[str, Extents] = {}
    for term, value in zip(terms, values, strict=True):
        for axis, letter in enumerate(term):
            part = parts_of(tracer, value, axis)
            parts[letter] = max(parts.get(letter, part), part, key=_fineness)
    unused = iter(sorted(set(ascii_letters) - set("".join(terms))))
    letters = {letter: letter + "".join(next(unused) for _ in part[1:]) for letter, part in parts.items()}
    refs: list[Ref] = []
    for term, value in zip(terms, values, strict=True):
        cut = [_cut(parts_of(tracer, value, axis), parts[letter]) for axis, letter in enumerate(term)]
        ref = (
            None if None in cut else _apart(tracer, value.ref, [each for part in cut for each in part or ()])
        )
        if not isinstance(ref, Ref):
            return NotStreamable("its operands have their axes of space merged differently")
        refs.append(ref)
    *finer, result_term = ("".join(letters[each] for each in term) for term in (*terms, right))
    result = tracer.stream(Call(aten.einsum.default, (f"{','.join(finer)}->{result_term}", refs), {}))
    if isinstance(result, NotStreamable):
        return result
    runs = tuple(len(parts[letter]) for letter in right)
    return _joined(tracer, Folded(result, runs), like.shape)


def _fineness(part: Extents) -> tuple[bool, int]:
    """The order of parts of an axis: one position, which is repeated, comes before any others."""
    return math.prod(part) > 1, len(part)


def _cut(own: Extents, part: Extents) -> Extents | None:
    """The extents of an operand's axis once it is cut into as many as ``part`` has; None if it cannot be."""
    if own == part or (len(own) == 1 and own[0] == math.prod(part)):
        return part
    return (1,) * len(part) if math.prod(own) == 1 else None


def _apart(tracer: FoldingTracer, ref: Ref, extents: Sequence[int]) -> Ref | NotStreamable:
    """A value with some of its axes, other than spatial ones, cut or merged."""
    if tracer.axes(ref) is None:
        return reshaped(tracer, ref, tuple(extents))
    if tracer.spec(ref).shape == tuple(extents):
        return ref
    result: Ref | NotStreamable = tracer.stream(Call(aten.reshape.default, (ref, tuple(extents)), {}))
    return result


def _joined(tracer: FoldingTracer, value: Folded, shape: Sequence[int]) -> Any:
    """A map whose merged axes without positions, such as all those of a line, are one axis again."""
    axes = tracer.axes(value.ref) or ()
    extents: list[int] = []
    runs: list[int] = []
    for axis, extent in enumerate(shape):
        is_merged = value.runs[axis] > 1 and not set(value.span(axis)).isdisjoint(axes)
        extents += parts_of(tracer, value, axis) if is_merged else (extent,)
        runs.append(value.runs[axis] if is_merged else 1)
    return as_seen(tracer, _apart(tracer, value.ref, extents), tuple(runs), shape)


def _as_matrices(
    tracer: FoldingTracer,
    first: tuple[Value, str],
    second: tuple[Value, str],
    right: str,
    extents: dict[str, int],
) -> Any:
    """Compute a product of two operands with these letters as a batched matrix product."""
    (left_value, left), (right_value, other) = first, second
    batch = [each for each in right if each in left and each in other]
    rows = [each for each in right if each in left and each not in other]
    columns = [each for each in right if each in other and each not in left]
    shared = [each for each in left if each in other and each not in right]

    def matrices(value: Value, term: str, *groups: Sequence[str]) -> Any:
        turned = _permuted(tracer, value, term, "".join([*batch, *groups[0], *groups[1]]))
        sizes = [math.prod(extents[each] for each in group) for group in groups]
        return _reshaped(tracer, turned, (*(extents[each] for each in batch), *sizes))

    operands = matrices(left_value, left, rows, shared), matrices(right_value, other, shared, columns)
    if any(isinstance(each, NotStreamable) for each in operands):
        return _MIXING
    product = _applied(tracer, Call(aten.matmul.default, operands, {}))
    apart = _reshaped(tracer, product, tuple(extents[each] for each in (*batch, *rows, *columns)))
    return _permuted(tracer, apart, "".join([*batch, *rows, *columns]), right)


def _summed(tracer: FoldingTracer, value: Value, term: str, kept: str) -> tuple[Any, str]:
    """Sum an operand over the axes whose letters are not in ``kept``; the result and its letters."""
    dims = [axis for axis, letter in enumerate(term) if letter not in kept]
    if not dims:
        return value, term
    total = _applied(tracer, Call(aten.sum.dim_IntList, (value, dims), {}))
    return total, "".join(letter for letter in term if letter in kept)


def _permuted(tracer: FoldingTracer, value: Any, term: str, wanted: str) -> Any:
    if isinstance(value, NotStreamable) or term == wanted:
        return value
    return _applied(tracer, Call(aten.permute.default, (value, [term.index(each) for each in wanted]), {}))


def _reshaped(tracer: FoldingTracer, value: Any, shape: tuple[int, ...]) -> Any:
    if isinstance(value, NotStreamable) or _seen(tracer, value) == shape:
        return value
    return _applied(tracer, Call(aten.reshape.default, (value, shape), {}))


def _applied(tracer: FoldingTracer, call: Call) -> Any:
    """The result of a call on maps as the user's code sees them, or on global values alone."""
    if all(is_global(tracer, value) for value in values_of(call)):
        return tracer.global_value(call.target, *call.args, **call.kwargs)
    result = NotStreamable("") if is_folded(call) else tracer.stream(call)
    return stream_folded(tracer, call) if isinstance(result, NotStreamable) else result


def _seen(tracer: FoldingTracer, value: Value) -> tuple[int, ...]:
    """The shape that the user's code sees."""
    if isinstance(value, Folded):
        return value.seen(tracer.spec(value.ref).shape)
    return tracer.spec(value).shape


def _tensordot(tracer: FoldingTracer, call: Call) -> Any:
    """Translate ``tensordot`` as an equation of ``einsum``."""
    shapes = [_seen(tracer, value) for value in call.bind("self", "other")]
    return _einsum(tracer, products.by_equation(call, [len(shape) for shape in shapes]))


TRANSLATIONS.update({products.einsum: _einsum, products.tensordot: _tensordot})
