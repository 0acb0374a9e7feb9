"""Matrix products and attention: streamed at each position by itself, resident where they mix positions."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from streamcnn.graph.costs import Cost, Operand, Operation, Routine, Saves, counted, declare
from streamcnn.graph.ops.convolution import chain
from streamcnn.graph.ops.pointwise import per_position, pointwise
from streamcnn.graph.ops.rules import Call, NotStreamable, Sample, Tracer, rule
from streamcnn.graph.ops.shape import permute
from streamcnn.graph.program import Access, Axes, Ref

aten = torch.ops.aten

Labels = Sequence[str]
"""A name for each axis, as in an equation of ``einsum``: axes of a name are one, and run side by side."""


@rule(aten.matmul.default, aten.bmm.default)
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
    return _product(tracer, call, [(first, labels[0]), (second, labels[1])], (*batch, *"ij"))


@rule(aten.einsum.default)
def einsum(tracer: Tracer, call: Call) -> Ref | NotStreamable:
    """A product of any operands over axes that are not spatial."""
    equation, refs = call.bind("equation", "tensors")
    left, arrow, right = equation.replace(" ", "").partition("->")
    if not arrow or "." in equation:
        return NotStreamable(f"its equation '{equation}' leaves axes unnamed")
    return _product(tracer, call, list(zip(refs, left.split(","), strict=True)), right)


@rule(aten.scaled_dot_product_attention.default)
def attention(tracer: Tracer, call: Call) -> Ref | NotStreamable:
    """Attention among the entries of an axis that is not spatial, at each position by itself.

    It is recorded as the products that it is made of, so that the matrix of queries by keys is planned for.
    """
    query, key, value, mask = call.bind("query", "key", "value", "attn_mask")
    dropout, causal, scale, grouped = call.bind("dropout_p", "is_causal", "scale", "enable_gqa")
    if dropout or causal or grouped or (mask is not None and tracer.spec(mask).dtype is torch.bool):
        return NotStreamable("its options are not streamed: allowed are a mask that is added and a scale")
    ndim = tracer.fake(call).dim()
    batch = _batch(ndim - 2)
    refs = (query, key, value, *(() if mask is None else (mask,)))
    operands = [
        (ref, (*batch[ndim - len(tracer.spec(ref).shape) :], *matrix))
        for ref, matrix in zip(refs, ("qe", "ke", "kf", "qk"), strict=False)
    ]
    axes = _axes_of_product(tracer, call, operands, (*batch, *"qf"))
    if isinstance(axes, NotStreamable) or ndim - 2 in axes or tracer.axes(query) is None:
        return NotStreamable("it mixes positions")
    scale = scale or 1 / math.sqrt(tracer.spec(query).shape[-1])

    def record(target: Any, *args: Any) -> Ref:
        ref: Ref = pointwise(tracer, Call(target, args, {}))
        return ref

    if tracer.axes(key) is None:
        keys: Ref = tracer.global_value(aten.transpose.int, key, -2, -1)
    else:
        keys = permute(tracer, Call(aten.transpose.int, (key, -2, -1), {}))
    scores = matrix_product(
        tracer, Call(aten.matmul.default, (record(aten.mul.Tensor, query, scale), keys), {})
    )
    assert isinstance(scores, Ref)
    if mask is not None:
        scores = record(aten.add.Tensor, scores, mask)
    weights = per_position(tracer, Call(aten.softmax.int, (scores, -1), {}), scores)
    attended: Ref | NotStreamable = matrix_product(tracer, Call(aten.matmul.default, (weights, value), {}))
    return attended


def _batch(count: int) -> Labels:
    return [f"batch {index}" for index in range(count)]


def _product(
    tracer: Tracer, call: Call, operands: Sequence[tuple[Ref, Labels]], result: Labels
) -> Ref | NotStreamable:
    """Record a call that sums over axes of ``operands`` that ``result`` lacks."""
    axes = _axes_of_product(tracer, call, operands, result)
    if isinstance(axes, NotStreamable):
        return axes
    accesses = {ref.name: Access() for ref, _ in operands if tracer.axes(ref) is not None}
    like = tracer.fake(call)
    return tracer.local(
        call.target, call.args, call.kwargs, like=like, axes=axes, accesses=accesses, heavy=True
    )


def _axes_of_product(
    tracer: Tracer, call: Call, operands: Sequence[tuple[Ref, Labels]], result: Labels
) -> Axes | NotStreamable:
    """Where the result has the spatial axes, if all maps have them under the same names."""
    maps = [(ref, labels, axes) for ref, labels in operands if (axes := tracer.axes(ref)) is not None]
    places = {(labels[rows], labels[cols]) for _, labels, (rows, cols) in maps}
    if len(places) != 1:
        return NotStreamable("its operands have their spatial axes at different places")
    ((rows, cols),) = places
    if not {rows, cols} <= set(result):
        return NotStreamable("it mixes positions")
    axes = (result.index(rows), result.index(cols))
    shape = tracer.fake(call).shape
    for ref, labels in operands:
        extents = dict(zip(labels, tracer.spec(ref).shape, strict=True))
        wanted = (1, 1) if tracer.axes(ref) is None else tuple(shape[axis] for axis in axes)
        if any(
            extents.get(name, extent) != extent for name, extent in zip((rows, cols), wanted, strict=True)
        ):
            return NotStreamable("its operands have different positions")
    return axes


declare(
    *(aten.addmm, aten.baddbmm, aten.bmm, aten.einsum, aten.matmul, aten.mm),
    cost=Cost(operations=counted, routine=Routine.MATRIX_PRODUCT),
)


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
    cost=Cost(
        operations=counted, saves=Saves(operands=True, beside=_attention_saved), inner=_attention_bytes
    ),
)


class _Attention(nn.Module):
    """Every position with every other, by matrix products and by one operator."""

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.flatten(2).transpose(1, 2)
        scores = torch.softmax(torch.bmm(tokens, tokens.transpose(1, 2)) / 7, -1)
        mixed = torch.matmul(scores, tokens)
        heads = mixed.unsqueeze(1)
        attended: Tensor = nn.functional.scaled_dot_product_attention(heads, heads, tokens.unsqueeze(1))
        return attended.mean((1, 2))


class _Mixed(nn.Module):
    """Channels mixed by products, and attention among the channels of each position."""

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


SAMPLES = (
    Sample("attention", lambda: nn.Sequential(nn.Conv2d(3, 4, 3, stride=2), _Attention()), resident=True),
    Sample("products at each position", lambda: chain(nn.Conv2d(3, 4, 3), _Mixed())),
)
