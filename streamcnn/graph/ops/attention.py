"""Attention: streamed at each position, along lines of a map, or by queries; with its costs.

At every position of a map there may be tokens of their own, such as those of a window. Or positions are the
tokens: then queries are streamed, and keys and values are whole, or those of the same row or column.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from streamcnn.geometry.axis_maps import All, Same
from streamcnn.graph.costs import Cost, Operand, Operation, Saves, counted, declare
from streamcnn.graph.ops.pointwise import pointwise
from streamcnn.graph.ops.products import merged_rows
from streamcnn.graph.ops.rules import Call, NotStreamable, Sample, Tracer, rule
from streamcnn.graph.program import Access, Ref

aten = torch.ops.aten


def _with_axes(tracer: Tracer, ref: Ref, ndim: int) -> Ref:
    """A global value with axes of extent 1 in front, so that it has ``ndim`` axes."""
    shape = tracer.spec(ref).shape
    if tracer.axes(ref) is not None or len(shape) >= ndim:
        return ref
    lifted: Ref = tracer.global_value(torch.Tensor.reshape, ref, (1,) * (ndim - len(shape)) + shape)
    return lifted


def _at_every_position(
    tracer: Tracer, target: Any, operands: tuple[Ref, ...], options: dict[str, Any], like: Tensor
) -> Ref | NotStreamable:
    """Record a call on matrices, the last two axes of each operand, at each position."""
    found = {axes for ref in operands if (axes := tracer.axes(ref)) is not None}
    axes = found.pop()
    if found or max(axes) >= like.dim() - 2:
        return NotStreamable("it mixes positions")
    operands = tuple(_with_axes(tracer, ref, like.dim()) for ref in operands)
    for ref in operands:
        shape = tracer.spec(ref).shape
        if len(shape) != like.dim() or (tracer.axes(ref) is None and any(shape[axis] != 1 for axis in axes)):
            return NotStreamable("its operands have matrices at different places")
    accesses = {ref.name: Access() for ref in operands if tracer.axes(ref) is not None}
    return tracer.local(target, operands, options, like=like, axes=axes, accesses=accesses, heavy=True)


def attend_along(
    tracer: Tracer, operands: tuple[Ref, Ref, Ref], run: int, scale: float | None
) -> Ref | NotStreamable:
    """Record attention among the tokens of each row or column, of maps (..., *tokens, K) of equal shapes.

    One spatial axis is among the ``run`` axes of the tokens, which may have others; the other one is not.
    """
    query, key, value = operands
    axes, shapes = tracer.axes(query), [tracer.spec(ref).shape for ref in operands]
    tokens = range(len(shapes[0]) - 1 - run, len(shapes[0]) - 1)
    if axes is None or sum(axis in tokens for axis in axes) != 1:
        return NotStreamable("it mixes positions")
    if any(tracer.axes(ref) != axes for ref in operands) or any(s[:-1] != shapes[0][:-1] for s in shapes):
        return NotStreamable("its operands have their spatial axes at different places")
    if query.name in (key.name, value.name):
        # A map is read in one way by each operator.
        query = pointwise(tracer, Call(aten.alias.default, (query,), {}))
    rows, cols = (All(shapes[0][axis]) if axis in tokens else Same() for axis in axes)
    return tracer.local(
        attention_along,
        (query, key, value, run, scale),
        like=tracer.fake(Call(attention_along, (query, key, value, run, scale), {})),
        axes=axes,
        accesses={key.name: Access(rows, cols), value.name: Access(rows, cols), query.name: Access()},
        heavy=True,
    )


def attention_along(query: Tensor, key: Tensor, value: Tensor, run: int, scale: float | None) -> Tensor:
    """Attention of queries (..., *tokens, K) to keys and values, each of ``run`` axes of tokens."""
    flat = [x.flatten(-1 - run, -2) for x in (query, key, value)]
    result = attend(*flat, is_causal=False, scale=scale)
    return result.reshape(*query.shape[:-1], value.shape[-1])


@rule(aten.scaled_dot_product_attention.default)
def attention(tracer: Tracer, call: Call) -> Ref | NotStreamable:
    """Attention among the tokens at each position, such as those of a window, or of each row or column."""
    query, key, value, mask, dropout, is_causal, scale, groups = call.bind(
        *("query", "key", "value", "attn_mask", "dropout_p", "is_causal", "scale", "enable_gqa")
    )
    if dropout or groups:
        return NotStreamable("it has dropout or groups queries")
    operands = (query, key, value) if mask is None else (query, key, value, mask)
    options = {"is_causal": is_causal, "scale": scale}
    like = tracer.fake(call)
    if mask is None and not is_causal and like.dim() - 2 in (tracer.axes(query) or ()):
        return attend_along(tracer, (query, key, value), 1, scale)
    return _at_every_position(tracer, attend, operands, options, like)


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None = None,
    *,
    is_causal: bool,
    scale: float | None,
) -> Tensor:
    """Attention of queries (..., L, K) to keys (..., S, K) and values (..., S, V)."""
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
    """Record attention to whole keys and values, of a map whose axes ``rows`` are the queries.

    A mask is a map whose spatial axes are the two before the last.
    """
    arguments = (*whole, mask, scale)
    return merged_rows(tracer, attention_of_rows, query, rows, arguments, like, like.dim() - 2)


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
    """Operations of the product of queries and keys, and of its product with the values."""
    query, value = operation.args[0], operation.args[3 if operation.target is attention_of_rows else 2]
    run = operation.args[3] if operation.target is attention_along else 1
    queries, keys = int(math.prod(query.shape[:-1])), int(math.prod(value.shape[-1 - run : -1]))
    return 2 * queries * keys * int(query.shape[-1] + value.shape[-1])


_FUSED_AXES = (3, 4) if torch.__version__ >= "2.14" else (4,)
"""Numbers of operands' axes for which attention may be one kernel; before PyTorch 2.14 only with heads."""


def _attention_bytes(operation: Operation) -> int:
    """Bytes of the matrix of queries by keys; 0 where attention is one kernel that never forms it.

    On a CPU the kernel also requires dense channels, which is not checked, as strides are not known here.
    """
    query, key, value, mask, dropout = operation.bind("query", "key", "value", "attn_mask", "dropout_p")
    is_fused = len(query.shape) in _FUSED_AXES and query.shape[-1] == value.shape[-1]
    if not operation.fuses_attention:
        is_trained = isinstance(mask, Operand) and mask.is_trained
        is_fused = is_fused and not dropout and not is_trained
    if is_fused:
        return 0
    return int(query.tensor.nbytes) // int(query.shape[-1]) * int(key.shape[-2])


def _attention_saved(operation: Operation) -> int:
    """Bytes of the matrix's softmax, its dropout's mask and result if any, and the scaled operands.

    A single kernel saves one number for each query instead.
    """
    query, key, dropout = operation.bind("query", "key", "dropout_p")
    matrix = _attention_bytes(operation)
    if not matrix:
        num_queries = int(query.tensor.numel) // int(query.shape[-1])
        return num_queries * max(4, int(query.tensor.dtype.itemsize))
    return (3 if dropout else 1) * matrix + int(query.tensor.nbytes + key.tensor.nbytes)


declare(
    aten.scaled_dot_product_attention.default,
    cost=Cost(
        operations=counted,
        saves=Saves(operands=True, result=True, beside=_attention_saved),
        inner=_attention_bytes,
    ),
)
declare(
    attend,
    attention_along,
    attention_of_rows,
    # Dense copies of the operands, and the result in another order of axes.
    cost=Cost(operations=_attention_operations, workspace=lambda nbytes: nbytes.operands + nbytes.result),
)


class _Attention(nn.Module):
    """Attention of all positions, by matrix products and by one operator."""

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.flatten(2).transpose(1, 2)
        scores = torch.softmax(torch.bmm(tokens, tokens.transpose(1, 2)) / 7, -1)
        mixed = torch.matmul(scores, tokens)
        heads = mixed.unsqueeze(1)
        attended: Tensor = nn.functional.scaled_dot_product_attention(heads, heads, tokens.unsqueeze(1))
        return attended.mean((1, 2))


SAMPLES = (Sample("attention", lambda: nn.Sequential(nn.Conv2d(3, 4, 3, stride=2), _Attention())),)
