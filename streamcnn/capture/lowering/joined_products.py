"""Products and attention of tokens of a map that are joined with others."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from streamcnn.capture.lowering.folding import is_global
from streamcnn.capture.lowering.joined import HANDLERS, MEET, Caller, Joined, shape_seen, sizes_of
from streamcnn.capture.lowering.joined_calls import added, beside, each_part
from streamcnn.graph.ops import attention, products
from streamcnn.graph.ops.rules import Call, NotStreamable

aten = torch.ops.aten


def _product(caller: Caller, call: Call, terms: Sequence[str], right: str, operands: Sequence[Any]) -> Any:
    """A product of operands whose axes have these letters: part by part along the tokens of the first."""
    first, term = next((x, term) for x, term in zip(operands, terms, strict=True) if isinstance(x, Joined))
    letter = term[first.axis]
    sizes = sizes_of(caller.recording, first)
    chosen: list[Any] = []
    for value, names in zip(operands, terms, strict=True):
        if letter not in names:
            chosen.append(caller.whole(value) if isinstance(value, Joined) else value)
        elif not isinstance(value, Joined) or names[value.axis] != letter or names.count(letter) > 1:
            return MEET
        elif sizes_of(caller.recording, value) != sizes:
            return MEET
        else:
            chosen.append(value)
    found: list[Any] = []
    for index in range(len(sizes)):
        parts = [value.parts[index] if isinstance(value, Joined) else value for value in chosen]
        args = (call.args[0], parts) if call.target is aten.einsum.default else tuple(parts)
        found.append(caller.called(Call(call.target, args, call.kwargs)))
    if letter not in right:
        return added(caller, found)
    return beside(caller, found, tuple(caller.recording.fake_seen(call).shape))


def _matrix_product(caller: Caller, call: Call) -> Any:
    ndims = [len(shape_seen(caller.recording, value)) for value in call.args[:2]]
    if min(ndims) < 2:
        return MEET
    batch = "abcdefgh"[: max(ndims) - 2]
    terms = [batch[max(ndims) - ndim :] + own for ndim, own in zip(ndims, ("XY", "YZ"), strict=True)]
    return _product(caller, call, terms, batch + "XZ", call.args[:2])


def _einsum(caller: Caller, call: Call) -> Any:
    equation, operands = call.bind("equation", "tensors")
    ndims = [len(shape_seen(caller.recording, value)) for value in operands]
    named = products.terms_of(equation, ndims)
    return (
        named if isinstance(named, NotStreamable) else _product(caller, call, named[:-1], named[-1], operands)
    )


def _attention(caller: Caller, call: Call) -> Any:
    """Attention by the queries' parts, or of queries without positions to keys and values in parts."""
    query, key, value = call.args[:3]
    if any(call.bind("attn_mask", "dropout_p", "is_causal", "enable_gqa")):
        return MEET
    tracer = caller.recording
    if isinstance(query, Joined) or not is_global(tracer, query):
        if isinstance(query, Joined) and query.axis != len(shape_seen(tracer, query)) - 2:
            return each_part(caller, call)
        others = [caller.whole(each) if isinstance(each, Joined) else each for each in (key, value)]
        queries = query.parts if isinstance(query, Joined) else (query,)
        found = [
            caller.called(Call(call.target, (each, *others, *call.args[3:]), call.kwargs)) for each in queries
        ]
        return found[0] if len(found) == 1 else beside(caller, found, tuple(tracer.fake_seen(call).shape))
    (scale,) = call.bind("scale")
    scale = shape_seen(tracer, query)[-1] ** -0.5 if scale is None else scale
    scaled = caller.called(Call(aten.mul.Tensor, (query, scale), {}))
    turned = _permuted(caller, key)
    scores = caller.called(Call(aten.matmul.default, (scaled, turned), {}))
    shares = caller.called(Call(aten.softmax.int, (scores, -1), {}))
    return caller.called(Call(aten.matmul.default, (shares, value), {}))


def _permuted(caller: Caller, value: Any) -> Any:
    return caller.called(Call(aten.transpose.int, (value, -2, -1), {}))


HANDLERS.update(
    {
        products.matrix_product: _matrix_product,
        products.einsum: _einsum,
        attention.attention: _attention,
    }
)
