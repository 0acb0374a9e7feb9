"""Matrix products: streamed at each position, by rows or by columns; with their costs.

If every position holds matrices, each position is a product by itself. If positions are the rows or columns
of a matrix, the other operand is whole, or is read along one spatial axis alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from string import ascii_letters
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from streamcnn.geometry.axis_maps import All, Broadcast, Same
from streamcnn.graph.costs import FACTORS, Cost, Operand, Operation, Routine, Saves, counted, declare
from streamcnn.graph.ops.reduction_types import ProductSum
from streamcnn.graph.ops.rules import Call, NotStreamable, Pair, Sample, Tracer, rule
from streamcnn.graph.ops.samples import chain
from streamcnn.graph.program import Access, Ref

aten = torch.ops.aten

Labels = Sequence[str]
"""A name for each axis, as in an equation of ``einsum``; axes of the same name have the same index."""
Names = tuple[str, str]
"""The names of the rows and of the columns."""


@rule(aten.matmul.default, aten.bmm.default, aten.mm.default)
def matrix_product(tracer: Tracer, call: Call) -> Ref | NotStreamable:
    """A product over an axis that is not spatial, or matrices at each position."""
    first, second = call.args
    ndims = [len(tracer.spec(ref).shape) for ref in (first, second)]
    if min(ndims) < 2:
        return NotStreamable("one of its operands is a vector")
    batch = _batch(max(ndims) - 2)
    labels = [
        (*batch[max(ndims) - ndim :], *matrix) for ndim, matrix in zip(ndims, ("ik", "kj"), strict=True)
    ]
    operands, result = [(first, labels[0]), (second, labels[1])], (*batch, *"ij")
    positions = _positions(tracer, operands, result)
    if isinstance(positions, NotStreamable):
        return positions
    return _product(tracer, call, operands, result, positions)


@rule(aten.einsum.default)
def einsum(tracer: Tracer, call: Call) -> Ref | NotStreamable:
    """A product of any operands over axes that are not spatial."""
    equation, refs = call.bind("equation", "tensors")
    named = terms_of(equation, [len(tracer.spec(ref).shape) for ref in refs])
    if isinstance(named, NotStreamable):
        return named
    *terms, result = named
    operands = list(zip(refs, terms, strict=True))
    positions = _positions(tracer, operands, result)
    if isinstance(positions, NotStreamable):
        return positions
    lifted = [_with_positions(tracer, *pair, positions) for pair in operands]
    if lifted != operands:
        equation = f"{','.join(term for _, term in lifted)}->{result}"
        call = Call(call.target, (equation, [ref for ref, _ in lifted]), {})
    return _product(tracer, call, lifted, result, positions)


def _with_positions(tracer: Tracer, ref: Ref, term: str, positions: Names) -> tuple[Ref, str]:
    """A global operand of ``einsum`` as a map if it has an axis of positions, as a table of distances has.

    An axis of positions that it lacks is put in front, with one position.
    """
    rows, cols = positions
    extents = dict(zip(term, tracer.spec(ref).shape, strict=True))
    has_positions = extents.get(rows, 1) > 1 or extents.get(cols, 1) > 1
    if tracer.axes(ref) is not None or not has_positions or len(extents) < len(term):
        return ref, term
    lacking = [name for name in (rows, cols) if name not in term]
    if lacking:
        shape = (1,) * len(lacking) + tracer.spec(ref).shape
        ref = tracer.global_value(torch.Tensor.reshape, ref, shape)
        term = "".join(lacking) + term
    return tracer.promote(ref, (term.index(rows), term.index(cols))), term


@rule(aten.tensordot.default)
def tensordot(tracer: Tracer, call: Call) -> Ref | NotStreamable:
    """A product of two operands over listed axes."""
    ndims = [len(tracer.spec(ref).shape) for ref in call.bind("self", "other")]
    result: Ref | NotStreamable = einsum(tracer, by_equation(call, ndims))
    return result


def by_equation(call: Call, ndims: Sequence[int]) -> Call:
    """A ``tensordot`` of operands of so many axes, as ``einsum``."""
    first, second, *listed = call.bind("self", "other", "dims_self", "dims_other")
    names = iter(ascii_letters)
    terms = [[next(names) for _ in range(ndim)] for ndim in ndims]
    for axis, other in zip(*listed, strict=True):
        terms[1][other] = terms[0][axis]
    left, right = ("".join(term) for term in terms)
    result = "".join(letter for letter in left + right if (left + right).count(letter) == 1)
    return Call(aten.einsum.default, (f"{left},{right}->{result}", [first, second]), {})


def terms_of(equation: str, ndims: Sequence[int]) -> list[str] | NotStreamable:
    """The letters of the axes of each operand of an ``einsum``, and last those of the result.

    Axes that ``...`` stands for get letters that the equation does not have.
    """
    left, arrow, right = equation.replace(" ", "").partition("->")
    terms = left.split(",")
    if not set(equation) <= {*ascii_letters, *" ,.->"} or len(terms) != len(ndims):
        return NotStreamable(f"its equation '{equation}' cannot be read")
    if not arrow:
        # Those that stand once, in the order of the alphabet.
        letters = left.replace(",", "").replace(".", "")
        right = "..." * ("." in left) + "".join(sorted(x for x in set(letters) if letters.count(x) == 1))
    counts = [ndim - len(term.replace("...", "")) for term, ndim in zip(terms, ndims, strict=True)]
    unused = sorted(set(ascii_letters) - set(equation))[: max(0, *counts)]
    apart = [
        term.replace("...", "".join(unused[len(unused) - count :]))
        for term, count in zip(terms, counts, strict=True)
    ]
    return [*apart, right.replace("...", "".join(unused))]


def _batch(count: int) -> Labels:
    return [f"batch {index}" for index in range(count)]


def _positions(
    tracer: Tracer, operands: Sequence[tuple[Ref, Labels]], result: Labels
) -> Names | NotStreamable:
    """The names of the result's spatial axes, which are those of one of the maps."""
    maps = [(labels, axes) for ref, labels in operands if (axes := tracer.axes(ref)) is not None]
    places = [(labels[rows], labels[cols]) for labels, (rows, cols) in maps]
    positions = next((place for place in places if set(place) <= set(result)), places[0])
    if any(labels.count(name) > 1 for _, labels in operands for name in positions):
        return NotStreamable("it takes a diagonal of positions")
    return positions if set(positions) <= set(result) else NotStreamable("it mixes positions")


def _product(
    tracer: Tracer, call: Call, operands: Sequence[tuple[Ref, Labels]], result: Labels, positions: Names
) -> Ref | NotStreamable:
    """Record a call that sums over axes of ``operands`` that ``result`` lacks."""
    axes = (result.index(positions[0]), result.index(positions[1]))
    like = tracer.fake(call)
    accesses = _accesses(tracer, operands, positions, (like.shape[axes[0]], like.shape[axes[1]]))
    if isinstance(accesses, NotStreamable):
        return accesses
    return tracer.local(
        call.target, call.args, call.kwargs, like=like, axes=axes, accesses=accesses, heavy=True
    )


def _accesses(
    tracer: Tracer, operands: Sequence[tuple[Ref, Labels]], positions: Names, extents: Pair
) -> dict[str, Access] | NotStreamable:
    """How a product, with these names and extents of its rows and columns, reads the maps it is given."""
    accesses: dict[str, Access] = {}
    for ref, labels in operands:
        axes, shape = tracer.axes(ref), tracer.spec(ref).shape
        own = dict(zip(labels, shape, strict=True))
        for name, extent in zip(positions, extents, strict=True):
            if own.get(name, 1) not in ((1,) if axes is None else (1, extent)):
                return NotStreamable("its operands have different positions")
        if axes is None:
            continue
        place = (labels[axes[0]], labels[axes[1]])
        access = _along_one_axis(place, positions, (own[place[0]], own[place[1]]), extents)
        if access is None or accesses.setdefault(ref.name, access) != access:
            return NotStreamable("its operands have their spatial axes at different places")
    return accesses


def _along_one_axis(place: Names, wanted: Names, before: Pair, after: Pair) -> Access | None:
    """How a map is read whose rows and columns have the names ``place``, where the result's have ``wanted``.

    If only its rows are the result's, each of them meets all of its columns, and likewise for columns; if
    neither are, there is no such access. ``before`` and ``after`` are the extents of both.
    """
    has_rows, has_cols = place[0] == wanted[0], place[1] == wanted[1]
    if not (has_rows or has_cols):
        return None
    rows, cols = (
        All(own) if not is_same else Same() if own == extent else Broadcast()
        for is_same, own, extent in zip((has_rows, has_cols), before, after, strict=True)
    )
    return Access(rows, cols)


declare(
    *(aten.addmm, aten.baddbmm, aten.bmm, aten.matmul, aten.mm),
    cost=Cost(operations=counted, saves=FACTORS, routine=Routine.MATRIX_PRODUCT),
)


def _operand_bytes(operation: Operation) -> int:
    """Bytes of all tensor operands of a call."""
    leaves = tree_leaves((operation.args, dict(operation.kwargs)))
    return sum(spec.nbytes for leaf in leaves if isinstance(leaf, Operand) for spec in leaf.specs)


# It copies its operands to reorder their axes.
_REORDERING = Cost(
    operations=counted,
    workspace=lambda nbytes: nbytes.operands,
    backward_workspace=lambda nbytes: 0,
    saves=Saves(factors=True, beside=_operand_bytes),
    routine=Routine.MATRIX_PRODUCT,
)
declare(aten.einsum, aten.tensordot, cost=_REORDERING)


def by_rows(tracer: Tracer, first: Ref, rows: range, second: Ref, like: Tensor) -> Ref:
    """Record the product of a map, whose axes ``rows`` are the matrix's rows, with a global value."""
    return merged_rows(tracer, product_of_rows, first, rows, (second,), like, like.dim() - 2)


def by_columns(tracer: Tracer, first: Ref, second: Ref, columns: range, like: Tensor) -> Ref:
    """Record the product of a global value with a map, whose axes ``columns`` are the matrix's columns."""
    return merged_rows(tracer, product_of_columns, second, columns, (first,), like, like.dim() - 1)


def merged_rows(
    tracer: Tracer, target: Any, ref: Ref, run: range, others: tuple[Any, ...], like: Tensor, place: int
) -> Ref:
    """Record a call for which the axes of ``run`` are one axis, axis ``place`` of the result."""
    axes, shape = tracer.axes(ref), tracer.spec(ref).shape
    assert axes is not None
    assert set(axes) <= set(run)
    extents = (*like.shape[:place], *(shape[axis] for axis in run), *like.shape[place + 1 :])
    rows, cols = (axis - run.start + place for axis in axes)
    return tracer.local(
        target,
        (ref, (run.start, run.stop), *others),
        like=torch.empty(extents, dtype=like.dtype, device=like.device),
        axes=(rows, cols),
        accesses={each.name: Access() for each in (ref, *others) if _is_map(tracer, each)},
        heavy=True,
    )


def _is_map(tracer: Tracer, value: Any) -> bool:
    return isinstance(value, Ref) and tracer.axes(value) is not None


def over_positions(tracer: Tracer, first: Ref, second: Ref, positions: range) -> Ref:
    """Record a product of maps (..., H, W, K) and (..., H, W, M) that sums over the axes ``positions``.

    These include both spatial axes, in either order, and may include others.
    """
    shape, axes = tracer.spec(first).shape, tracer.axes(first)
    assert axes is not None
    beside = Call(aten.cat.default, ([first, second], -1), {})
    joined = tracer.local(
        beside.target,
        beside.args,
        like=tracer.fake(beside),
        axes=axes,
        accesses={first.name: Access(), second.name: Access()},
    )
    reduction = ProductSum(tracer.spec(joined).shape, tuple(positions), False, shape[-1])
    result: Ref = tracer.reduce(reduction, joined)[0]
    return result


def product_of_rows(x: Tensor, rows: tuple[int, int], matrix: Tensor) -> Tensor:
    """``x`` (..., *rows, K) times ``matrix`` (..., K, M)."""
    if matrix.dim() == 2:
        return torch.matmul(x, matrix)
    start, stop = rows
    result = torch.matmul(x.flatten(start, stop - 1), matrix)
    return result.reshape(*result.shape[:-2], *x.shape[start:stop], result.shape[-1])


def product_of_columns(x: Tensor, columns: tuple[int, int], matrix: Tensor) -> Tensor:
    """``matrix`` (..., M, K) times ``x`` (..., K, *columns)."""
    start, stop = columns
    result = torch.matmul(matrix, x.flatten(start, stop - 1))
    return result.reshape(*result.shape[:-1], *x.shape[start:stop])


def _product_operations(operation: Operation) -> int:
    """A product and a sum for each element of the result and each column of the first operand."""
    matrix = operation.args[-1]
    shared = matrix.shape[-2] if operation.target is product_of_rows else matrix.shape[-1]
    return 2 * operation.numel * int(shared)


declare(product_of_rows, cost=Cost(operations=_product_operations, routine=Routine.MATRIX_PRODUCT))
# It is computed with rows and columns exchanged, in copies.
declare(product_of_columns, cost=replace(_REORDERING, operations=_product_operations))


class _Mixed(nn.Module):
    """Channels mixed by products, and attention among each position's channels."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.linspace(-1, 1, 24).reshape(4, 6))

    def forward(self, x: Tensor) -> Tensor:
        last = torch.matmul(x.movedim(1, -1), self.weight)
        heads = torch.unflatten(last, -1, (1, 3, 2))
        products = torch.einsum("nhwabc,nhwadc->nhwbd", heads, heads.sin())
        mixed = torch.unflatten(torch.einsum("nchw,cd->nhwd", x, self.weight), -1, (3, 2))
        attended: Tensor = nn.functional.scaled_dot_product_attention(
            heads[..., 0, :, :], mixed, products @ mixed
        )
        return attended.flatten(-2).movedim(-1, 1)


SAMPLES = (Sample("products at each position", lambda: chain(nn.Conv2d(3, 4, 3), _Mixed())),)
