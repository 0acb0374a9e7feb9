"""Matrix products and attention: streamed by rows, by columns or within each matrix, and what they cost.

A product whose matrices stand at every position is one of each position by itself. Where the positions are
rows or columns, the other operand is whole: queries are streamed, keys and values are not.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from streamcnn.graph.costs import Cost, Operand, Operation, Routine, Saves, declare
from streamcnn.graph.ops.reduction_types import ProductSum
from streamcnn.graph.ops.rules import Call, NotStreamable, Sample, Tracer, rule
from streamcnn.graph.program import Access, Ref

aten = torch.ops.aten

declare(
    *(aten.addmm, aten.baddbmm, aten.bmm, aten.matmul, aten.mm),
    cost=Cost(routine=Routine.MATRIX_PRODUCT),
)


@rule(aten.matmul.default, aten.bmm.default)
def product(tracer: Tracer, call: Call) -> Ref | NotStreamable:
    """Matrices at every position, or a map with its channels last times one matrix."""
    first, second = call.args[:2]
    if tracer.axes(second) is None and len(tracer.spec(second).shape) == 2:
        axes = tracer.axes(first)
        assert axes is not None
        if len(tracer.spec(first).shape) - 1 in axes:
            return NotStreamable("it sums over positions")
        return tracer.local(
            torch.matmul,
            (first, second),
            like=tracer.fake(call),
            axes=axes,
            accesses={first.name: Access()},
            heavy=True,
        )
    return _at_every_position(tracer, torch.matmul, (first, second), {}, tracer.fake(call))


def _at_every_position(
    tracer: Tracer, target: Any, operands: tuple[Ref, ...], options: dict[str, Any], like: Tensor
) -> Ref | NotStreamable:
    """Record a call on matrices, the last two axes of each operand, by position."""
    found = {axes for ref in operands if (axes := tracer.axes(ref)) is not None}
    axes = found.pop()
    if found or max(axes) >= like.dim() - 2:
        return NotStreamable("it mixes positions")
    for ref in operands:
        shape = tracer.spec(ref).shape
        if len(shape) != like.dim() or (tracer.axes(ref) is None and any(shape[axis] != 1 for axis in axes)):
            return NotStreamable("its operands have matrices at different places")
    accesses = {ref.name: Access() for ref in operands if tracer.axes(ref) is not None}
    return tracer.local(target, operands, options, like=like, axes=axes, accesses=accesses, heavy=True)


def by_rows(tracer: Tracer, first: Ref, rows: range, second: Ref, like: Tensor) -> Ref:
    """Record a product with a global value, of a map whose axes ``rows`` are seen as those of rows."""
    return _merged(tracer, product_of_rows, first, rows, (second,), like, like.dim() - 2)


def by_columns(tracer: Tracer, first: Ref, second: Ref, columns: range, like: Tensor) -> Ref:
    """Record a product of a global value with a map whose axes ``columns`` are seen as those of columns."""
    return _merged(tracer, product_of_columns, second, columns, (first,), like, like.dim() - 1)


def _merged(
    tracer: Tracer, target: Any, ref: Ref, run: range, others: tuple[Any, ...], like: Tensor, place: int
) -> Ref:
    """Record a call that sees the axes of ``run`` as one, which is axis ``place`` of the result."""
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


def over_positions(tracer: Tracer, first: Ref, second: Ref) -> Ref:
    """Record a product that sums over all positions, of maps (..., H, W, K) and (..., H, W, M)."""
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
    reduction = ProductSum(tracer.spec(joined).shape, axes, False, shape[-1])
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
    """A product and a sum for each result and each of the columns of the first operand."""
    matrix = operation.args[-1]
    shared = matrix.shape[-2] if operation.target is product_of_rows else matrix.shape[-1]
    return 2 * operation.numel * int(shared)


declare(
    product_of_rows,
    product_of_columns,
    cost=Cost(operations=_product_operations, routine=Routine.MATRIX_PRODUCT),
)


@rule(aten.scaled_dot_product_attention.default)
def attention(tracer: Tracer, call: Call) -> Ref | NotStreamable:
    """Attention within the tokens of every position, such as those of a window."""
    query, key, value, mask, dropout, is_causal, scale, groups = call.bind(
        *("query", "key", "value", "attn_mask", "dropout_p", "is_causal", "scale", "enable_gqa")
    )
    if dropout or groups:
        return NotStreamable("it has dropout or groups queries")
    operands = (query, key, value) if mask is None else (query, key, value, mask)
    options = {"is_causal": is_causal, "scale": scale}
    return _at_every_position(tracer, attend, operands, options, tracer.fake(call))


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None = None,
    *,
    is_causal: bool,
    scale: float | None,
) -> Tensor:
    """Attention of (..., L, K) to (..., S, K) and (..., S, V), with any axes in front."""
    lead = query.shape[:-3]

    def batched(x: Tensor) -> Tensor:
        return x.expand(*lead, *x.shape[-3:]).flatten(0, -4)

    result = scaled_dot_product_attention(
        batched(query),
        batched(key),
        batched(value),
        None if mask is None else batched(mask),
        is_causal=is_causal,
        scale=scale,
    )
    return result.reshape(*lead, *result.shape[1:])


def attend_by_rows(
    tracer: Tracer,
    query: Ref,
    rows: range,
    whole: tuple[Ref, Ref],
    mask: Ref | None,
    scale: float | None,
    like: Tensor,
) -> Ref:
    """Record attention to whole keys and values, of a map whose axes ``rows`` are seen as queries.

    A mask is a map whose axes of space are the two before the last.
    """
    arguments = (*whole, mask, scale)
    return _merged(tracer, attention_of_rows, query, rows, arguments, like, like.dim() - 2)


def attention_of_rows(
    x: Tensor,
    rows: tuple[int, int],
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    scale: float | None,
) -> Tensor:
    """Attention of queries ``x`` (N, heads, *rows, K) to (N, heads, S, K or V); mask (..., *rows, S)."""
    start, stop = rows
    if mask is not None:
        mask = mask.flatten(-1 - (stop - start), -2)
    result = scaled_dot_product_attention(x.flatten(start, stop - 1), key, value, mask, scale=scale)
    return result.reshape(*result.shape[:-2], *x.shape[start:stop], result.shape[-1])


def _attention_operations(operation: Operation) -> int:
    """The product of queries and keys, and that with the values."""
    query, value = operation.args[0], operation.args[2 if operation.target is attend else 3]
    queries, keys = int(math.prod(query.shape[:-1])), int(value.shape[-2])
    return 2 * queries * keys * int(query.shape[-1] + value.shape[-1])


def _attention_bytes(operation: Operation) -> int:
    """Bytes of the matrix of queries by keys, where attention is not one kernel that never forms it.

    Strides are not known here: on a CPU the kernel also wants the channels to be dense.
    """
    query, key, value, mask, dropout = operation.bind("query", "key", "value", "attn_mask", "dropout_p")
    is_fused = len(query.shape) == 4 and query.shape[-1] == value.shape[-1]
    if not operation.fuses_attention:
        is_trained = isinstance(mask, Operand) and mask.is_trained
        is_fused = is_fused and not dropout and not is_trained
    if is_fused:
        return 0
    return int(query.tensor.nbytes) // int(query.shape[-1]) * int(key.shape[-2])


def _attention_saved(operation: Operation) -> int:
    """The matrix's softmax and, with dropout, the mask in the same type and what is left."""
    (dropout,) = operation.bind("dropout_p")
    return (3 if dropout else 1) * _attention_bytes(operation)


declare(
    aten.scaled_dot_product_attention.default,
    cost=Cost(saves=Saves(operands=True, beside=_attention_saved), inner=_attention_bytes),
)
declare(attend, attention_of_rows, cost=Cost(operations=_attention_operations))


class _Attention(nn.Module):
    """Every position with every other, by matrix products and by one operator."""

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.flatten(2).transpose(1, 2)
        scores = torch.softmax(torch.bmm(tokens, tokens.transpose(1, 2)) / 7, -1)
        mixed = torch.matmul(scores, tokens)
        heads = mixed.unsqueeze(1)
        attended: Tensor = nn.functional.scaled_dot_product_attention(heads, heads, tokens.unsqueeze(1))
        return attended.mean((1, 2))


SAMPLES = (Sample("attention", lambda: nn.Sequential(nn.Conv2d(3, 4, 3, stride=2), _Attention())),)
