"""Calls that are lowered to others: entries at an index that is a tensor, entries of a table, one value
written where a mask is true, attention with dropout, products with a bias, pooling of whole maps, images
without a batch axis, ``take_along_dim``."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from streamcnn.capture.lowering.folded_indices import known_places
from streamcnn.capture.lowering.folding import Folded, is_global
from streamcnn.capture.lowering.joined import Caller, Handler, Joined, as_type, first_ref, shape_seen
from streamcnn.graph.costs import NOTHING, Cost, declare
from streamcnn.graph.entries import ENTRY, entry_overwritten
from streamcnn.graph.ops.lookup import looked_up
from streamcnn.graph.ops.reduction_types import statistics_dtype
from streamcnn.graph.ops.rules import Call, as_pair
from streamcnn.graph.program import Ref

aten = torch.ops.aten


def _entry(caller: Caller, call: Call) -> Any:
    """``x[:, index]``."""
    value, dim, index = call.args
    places = caller.called(Call(known_places, (index, shape_seen(caller.recording, value)[dim], True), {}))
    line = caller.called(Call(aten.reshape.default, (places, [1]), {}))
    taken = caller.called(Call(aten.index_select.default, (value, dim, line), {}))
    axes = caller.recording.axes(taken) if isinstance(taken, Ref) else None
    if axes is not None and dim in axes and caller.recording.spec(taken).dtype.is_floating_point:
        # A map of one row or column, whose sum has no such axis.
        return caller.called(Call(aten.sum.dim_IntList, (taken, [dim], False), {}))
    return caller.called(Call(aten.squeeze.dim, (taken, dim), {}))


def _entry_overwritten(caller: Caller, call: Call) -> Any:
    """``x[:, index] = part``."""
    into, part, dim, index = call.args
    extents = shape_seen(caller.recording, into)
    places = caller.called(Call(known_places, (index, extents[dim], True), {}))
    is_there = caller.called(Call(is_place, (places, extents[dim], len(extents) - dim - 1), {}))
    values = caller.called(Call(aten.unsqueeze.default, (part, dim), {}))
    return caller.called(Call(aten.where.self, (is_there, values, into), {}))


def is_place(place: Tensor, total: int, num_after: int) -> Tensor:
    """Whether each of ``total`` positions is ``place``: truth values (total, 1, ...)."""
    found = torch.arange(total, device=place.device) == place
    return found.reshape(total, *(1,) * num_after)


declare(is_place, cost=Cost(saves=NOTHING, detaches=True))


def _looked_up(caller: Caller, call: Call) -> Any:
    """``table[index]``, if the index is a map and the table is none."""
    table, indices = call.bind("self", "indices")
    tracer = caller.recording
    if len(indices) != 1 or any(isinstance(each, Joined) for each in (table, indices[0])):
        return NotImplemented
    if not is_global(tracer, table) or is_global(tracer, indices[0]):
        return NotImplemented
    if tracer.spec(first_ref(indices[0])).dtype not in (torch.int64, torch.int32):
        return NotImplemented
    return caller.called(Call(looked_up, (table, indices[0]), {}))


def _written_by_mask(caller: Caller, call: Call) -> Any:
    """``x[mask] = value``, if the value is the same wherever the mask is true: a choice at each position."""
    into, indices, values, accumulate = call.bind("self", "indices", "values", "accumulate")
    *before, mask = indices
    tracer = caller.recording
    if accumulate or mask is None or any(index is not None for index in before):
        return NotImplemented
    if not _have_map(caller, into, mask) or tracer.spec(first_ref(mask)).dtype != torch.bool:
        return NotImplemented
    ndim, num_masked = len(shape_seen(tracer, into)), len(shape_seen(tracer, mask))
    num_after = ndim - len(before) - num_masked
    given = shape_seen(tracer, values)
    if len(given) > num_after:
        # The axis of all places where the mask is true.
        place = len(given) - num_after - 1
        if given[place] != 1:
            return NotImplemented
        extents = [*given[:place], *(1,) * num_masked, *given[place + 1 :]]
        values = caller.called(Call(aten.reshape.default, (values, extents), {}))
    for _ in range(num_after):
        mask = caller.called(Call(aten.unsqueeze.default, (mask, -1), {}))
    return caller.called(Call(aten.where.self, (mask, values, into), {}))


def _have_map(caller: Caller, *values: Any) -> bool:
    """Whether one of some values is a map's."""
    return any(isinstance(each, Joined) or not is_global(caller.recording, each) for each in values)


def _attention_with_dropout(caller: Caller, call: Call) -> Any:
    """Attention whose weights are dropped in part, as ATen computes it: by products."""
    query, key, value, mask, probability, is_causal, scale, groups = call.bind(
        *("query", "key", "value", "attn_mask", "dropout_p", "is_causal", "scale", "enable_gqa")
    )
    is_of_maps = any(
        not isinstance(each, Ref) or caller.recording.is_of_maps(each) for each in (query, key, value)
    )
    if not probability or is_causal or groups or not is_of_maps:
        return NotImplemented

    def called(target: Any, *args: Any) -> Any:
        return caller.called(Call(target, args, {}))

    like = caller.recording.fake_seen(call)
    # As ATen does with half precision.
    dtype = statistics_dtype(like.dtype)
    query, key, value = (as_type(caller, each, dtype) for each in (query, key, value))
    scaled = called(
        aten.mul.Tensor, query, shape_seen(caller.recording, query)[-1] ** -0.5 if scale is None else scale
    )
    weights = called(aten.matmul.default, scaled, called(aten.transpose.int, key, -2, -1))
    weights = _softmax(called, weights, mask, caller)
    dropped = called(aten.dropout.default, weights, probability, True)
    return as_type(caller, called(aten.matmul.default, dropped, value), like.dtype)


def _softmax(called: Callable[..., Any], scores: Any, mask: Any, caller: Caller) -> Any:
    """Softmax of scores along the last axis; of a row that the mask hides, weights and gradients are zero."""
    if mask is None:
        return called(aten.softmax.int, scores, -1)
    if caller.recording.spec(first_ref(mask)).dtype == torch.bool:
        scores = called(aten.masked_fill.Scalar, scores, called(aten.logical_not.default, mask), -math.inf)
    else:
        scores = called(aten.add.Tensor, scores, mask)
    is_hidden = called(aten.eq.Scalar, called(aten.amax.default, scores, [-1], True), -math.inf)
    weights = called(aten.softmax.int, called(aten.masked_fill.Scalar, scores, is_hidden, 0), -1)
    return called(aten.masked_fill.Scalar, weights, is_hidden, 0)


def _product_with_bias(caller: Caller, call: Call) -> Any:
    """``baddbmm``, such as the scores of ``nn.MultiheadAttention`` with a mask: a product and a sum."""
    bias, first, second, beta, alpha = call.bind("self", "batch1", "batch2", "beta", "alpha")
    if not _have_map(caller, bias, first, second):
        return NotImplemented
    product = caller.called(Call(aten.bmm.default, (first, second), {}))
    if alpha != 1:
        product = caller.called(Call(aten.mul.Scalar, (product, alpha), {}))
    if beta == 0:
        return product
    if beta != 1:
        bias = caller.called(Call(aten.mul.Scalar, (bias, beta), {}))
    if _is_mask_of_keys(bias, product):
        bias = caller.whole(bias)
    return caller.called(Call(aten.add.Tensor, (product, bias), {}))


def _is_mask_of_keys(bias: Any, product: Any) -> bool:
    """Whether the columns of ``bias`` are positions, all of which each row of ``product``, a query, needs."""
    are_folded = isinstance(bias, Folded) and isinstance(product, Folded)
    return are_folded and bias.runs[-1] > 1 and product.runs[-2] > 1


def _averaged(caller: Caller, call: Call) -> Any:
    """``avg_pool2d`` of windows that are as long as the map, a mean along one or both of its axes."""
    image = call.args[0]
    kernel, stride, padding, divisor = call.bind("kernel_size", "stride", "padding", "divisor_override")
    axes = _whole_axes(caller, image, kernel, stride, padding)
    if not axes or divisor is not None or not caller.recording.spec(image).dtype.is_floating_point:
        return _of_one_image(caller, call)
    return caller.called(Call(aten.mean.dim, (image, axes, True), {}))


def _maximum(caller: Caller, call: Call) -> Any:
    """``max_pool2d`` of one window that is the map."""
    image = call.args[0]
    kernel, stride, padding = call.bind("kernel_size", "stride", "padding")
    if len(_whole_axes(caller, image, kernel, stride, padding)) < 2:
        return _of_one_image(caller, call)
    found = caller.called(Call(aten.adaptive_max_pool2d.default, (image, [1, 1]), {}))
    return found if call.target is aten.max_pool2d_with_indices.default else found[0]


def _whole_axes(caller: Caller, image: Any, kernel: Any, stride: Any, padding: Any) -> list[int]:
    """The spatial axes of a map that a window covers, if it has one position along the others."""
    if not isinstance(image, Ref) or is_global(caller.recording, image):
        return []
    sides = list(zip((-2, -1), *map(as_pair, (kernel, stride or kernel, padding)), strict=True))
    shape = shape_seen(caller.recording, image)
    whole = [axis for axis, size, _, pad in sides if size == shape[axis] > 1 and pad == 0]
    rest = [(size, step, pad) for axis, size, step, pad in sides if axis not in whole]
    return whole if all(side == (1, 1, 0) for side in rest) else []


def _of_one_image(caller: Caller, call: Call) -> Any:
    """A convolution or pooling of an image (C, H, W) without a batch axis, which is added and removed."""
    image = call.args[0]
    if isinstance(image, Joined) or is_global(caller.recording, image):
        return NotImplemented
    if len(shape_seen(caller.recording, image)) != 3:
        return NotImplemented
    batch = caller.called(Call(aten.unsqueeze.default, (image, 0), {}))
    found = caller.called(Call(call.target, (batch, *call.args[1:]), call.kwargs))
    results = found if isinstance(found, tuple) else (found,)
    images = tuple(caller.called(Call(aten.squeeze.dim, (each, 0), {})) for each in results)
    return images if isinstance(found, tuple) else images[0]


def _taken_along(caller: Caller, call: Call) -> Any:
    """``take_along_dim``: ``gather`` with indices that are repeated along other axes."""
    value, index, dim = call.bind("self", "indices", "dim")
    tracer = caller.recording
    if dim is None or (is_global(tracer, value) and is_global(tracer, index)):
        return NotImplemented
    shape, given = shape_seen(tracer, value), shape_seen(tracer, index)
    dim %= len(shape)
    wanted = (*shape[:dim], given[dim], *shape[dim + 1 :])
    if any(own not in (1, extent) for own, extent in zip(given, wanted, strict=True)):
        return NotImplemented
    repeated = caller.called(Call(aten.expand.default, (index, list(wanted)), {}))
    return caller.called(Call(aten.gather.default, (value, dim, repeated), {}))


_OF_IMAGES = (
    aten.adaptive_avg_pool2d.default,
    aten.adaptive_max_pool2d.default,
    aten.conv2d.default,
    aten.conv2d.padding,
    aten.conv_transpose2d.input,
)

COMPOSED: dict[Any, Handler] = {
    **dict.fromkeys(_OF_IMAGES, _of_one_image),
    aten.avg_pool2d.default: _averaged,
    aten.max_pool2d.default: _maximum,
    aten.max_pool2d_with_indices.default: _maximum,
    aten.take_along_dim.default: _taken_along,
    ENTRY: _entry,
    entry_overwritten: _entry_overwritten,
    aten.baddbmm.default: _product_with_bias,
    aten.index.Tensor: _looked_up,
    aten.index_put.default: _written_by_mask,
    aten.scaled_dot_product_attention.default: _attention_with_dropout,
}
"""What carries out such calls, by their targets; ``NotImplemented`` for those that stay whole."""
