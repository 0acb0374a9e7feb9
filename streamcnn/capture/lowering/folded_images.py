"""Translations of operators on images (N, C, ...), where the code has merged spatial axes into one of theirs.

If they are merged into one axis of positions, as in tokens (N, C, H * W), the map is the image. If they are
merged into the batch, as in a batch of windows, every position of the map holds an image of its own.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch

from streamcnn.capture.lowering.folding import (
    TRANSLATIONS,
    Folded,
    FoldingTracer,
    as_folded,
    as_seen,
    reshaped,
    stream_folded,
    values_of,
)
from streamcnn.graph.ops import (
    adaptive_pooling,
    convolution,
    images,
    normalization,
    padding,
    pooling,
    resampling,
    sliding_blocks,
)
from streamcnn.graph.ops.rules import Call, NotStreamable, rule_for
from streamcnn.graph.program import Ref

aten = torch.ops.aten

_NO_IMAGES = NotStreamable("it is not applied to images or tokens")


def _by_image(tracer: FoldingTracer, call: Call) -> Any:
    """Translate an operator on images that lie at the map's positions, to one on each image by itself."""
    value = _first_of(tracer, call)
    if isinstance(value, NotStreamable):
        return value
    if not _lies_in_batch(tracer, value):
        return NotStreamable("it works along merged axes of space")
    like = tracer.fake_seen(call)
    result = images.each_by_itself(tracer, call, value.ref, value.runs[0], like)
    if isinstance(result, NotStreamable):
        return result
    return as_seen(tracer, result, (value.runs[0],) + (1,) * (like.dim() - 1), like.shape)


def _along_one_axis(tracer: FoldingTracer, call: Call) -> Any:
    """Translate an operator on (N, C, L): a convolution, the mean of all tokens, or one on each image."""
    if call.target in (aten.conv1d.default, aten.conv1d.padding):
        return _convolution(tracer, call)
    value = as_folded(tracer, call.args[0])
    means = call.target is aten.adaptive_avg_pool1d.default and call.args[1] == [1]
    if means and not _lies_in_batch(tracer, value):
        return stream_folded(tracer, Call(aten.mean.dim, (value, [-1], True), {}))
    return _by_image(tracer, call)


def _convolution(tracer: FoldingTracer, call: Call) -> Any:
    """Translate a convolution of each image by itself, of stripes, or one whose kernel has one position."""
    value = _first_of(tracer, call)
    if isinstance(value, NotStreamable) or _lies_in_batch(tracer, value):
        return _by_image(tracer, call)
    weight, bias, stride, padding, groups = call.bind("weight", "bias", "stride", "padding", "groups")
    kernel = tracer.spec(weight).shape
    if any(extent != 1 for extent in kernel[2:]) or any(step != 1 for step in stride) or _pads(padding):
        across = [axis for axis in tracer.axes(value.ref) or () if axis in value.span(0)]
        if len(across) == 1 and all(run == 1 for run in value.runs[1:]):
            return _of_stripes(tracer, call, value, across[0])
        return NotStreamable("it works along merged axes of space")
    matrices = reshaped(tracer, weight, (*kernel[:2], 1, 1))
    return _as_image(
        tracer,
        call,
        value,
        lambda image: Call(aten.conv2d.default, (image, matrices, bias, [1, 1], [0, 0], [1, 1], groups), {}),
    )


def _of_stripes(tracer: FoldingTracer, call: Call, value: Folded, across: int) -> Any:
    """Translate a convolution along one spatial axis: add the other one, with one position of the kernel.

    The images are stripes of a map, or its rows or columns. They lie in the batch, among whose axes is the
    other spatial axis, ``across``.
    """
    weight, bias, stride, padding, dilation, groups = call.bind(
        "weight", "bias", "stride", "padding", "dilation", "groups"
    )
    axes, kernel, channels = tracer.axes(value.ref), tracer.spec(weight).shape, value.starts[1]
    assert axes is not None
    # A single image may come without a batch.
    if channels in axes or len(kernel) != len(value.runs):
        return _NO_IMAGES
    image = list(value.starts[2:])
    # Images have their rows before their columns.
    places = [across, *image] if len(image) == 2 else list(axes)
    place = places.index(across)

    def with_one(numbers: Sequence[int], own: int) -> list[int]:
        each = [*numbers] * (len(image) // len(numbers))
        return [*each[:place], own, *each[place:]]

    packet = (aten.conv2d, aten.conv3d)[len(image) - 1]
    target = packet.padding if isinstance(padding, str) else packet.default
    around = padding if isinstance(padding, str) else with_one(padding, 0)
    matrices = reshaped(tracer, weight, (*kernel[:2], *with_one(kernel[2:], 1)))
    lead = [axis for axis in value.span(0) if axis != across]
    order = [*lead, channels, *places]
    turned = tracer.stream(Call(aten.permute.default, (value.ref, order), {}))
    before = tracer.spec(turned).shape
    batch = before[: len(lead)]
    joined = tracer.stream(Call(aten.reshape.default, (turned, (math.prod(batch), *before[len(lead) :])), {}))
    options = (with_one(stride, 1), around, with_one(dilation, 1), groups)
    result = tracer.stream(Call(target, (joined, matrices, bias, *options), {}))
    if isinstance(result, NotStreamable):
        return result
    apart = (*batch, *tracer.spec(result).shape[1:])
    result = tracer.stream(Call(aten.reshape.default, (result, apart), {}))
    back = [order.index(axis) for axis in range(len(order))]
    result = tracer.stream(Call(aten.permute.default, (result, back), {}))
    return as_seen(tracer, result, value.runs, tracer.fake_seen(call).shape)


def _pads(padding: Any) -> bool:
    """Whether a convolution pads whose kernel has one position; "same" and "valid" do not pad it."""
    return not isinstance(padding, str) and any(padding)


def _norm(tracer: FoldingTracer, call: Call) -> Any:
    """Translate norms of each channel, over the whole batch or over each image."""
    value = _first_of(tracer, call)
    if isinstance(value, NotStreamable):
        return value
    rule = rule_for(call.target)
    over_batch = _normalises_over_batch(call)
    if not over_batch and _lies_in_batch(tracer, value):
        moves = rule is normalization.instance_norm and call.bind("running_mean")[0]
        return _NO_IMAGES if moves else _by_image(tracer, call)
    if over_batch:
        return _as_image(
            tracer, call, value, lambda image: Call(call.target, (image, *call.args[1:]), call.kwargs)
        )
    axes = tracer.axes(value.ref)
    assert axes is not None
    beside = [i for axis in range(2, len(value.runs)) for i in value.span(axis) if i not in axes]
    times = math.prod(tracer.spec(value.ref).shape[axis] for axis in beside)
    if not set(axes).isdisjoint(value.span(0)):
        return _NO_IMAGES
    if times > 1 and rule is normalization.instance_norm:
        if call.bind("running_mean")[0] is not None:
            return _NO_IMAGES
        # Of scores of positions for keys, say; each channel is a group of as many channels.
        channels = tracer.fake_seen(call).shape[1]
        call = Call(aten.group_norm.default, (value, channels, *call.bind("weight", "bias", "eps")), {})

    def normalised(image: Ref) -> Call:
        repeated = Call(call.target, (image, *call.args[1:]), call.kwargs)
        for name in ("weight", "bias"):
            (parameter,) = call.bind(name)
            if parameter is not None and times > 1:
                parameter = tracer.global_value(torch.repeat_interleave, parameter, times)
                repeated = repeated.replaced(name, parameter)
        return repeated

    return _as_image(tracer, call, value, normalised, beside)


def _normalises_over_batch(call: Call) -> bool:
    """Whether a norm has the same statistics for all images."""
    rule = rule_for(call.target)
    if rule is normalization.instance_norm:
        return not call.bind("use_input_stats")[0]
    return rule is normalization.batch_norm


def _pad(tracer: FoldingTracer, call: Call) -> Any:
    """Translate padding of axes that are not merged, such as a column of ones beside each token's values."""
    value, pads = call.bind("self", "pad")
    constant = call.target is aten.constant_pad_nd.default or call.bind("mode")[0] == "constant"
    if not constant:
        return _by_image(tracer, call)
    apart: list[int] = []
    for index, run in zip(range(len(pads) // 2), reversed(value.runs), strict=False):
        around = pads[2 * index : 2 * index + 2]
        if any(around) and run > 1:
            return NotStreamable("it works along merged axes of space")
        apart += (*around, *(0, 0) * (run - 1))
    translated = Call(call.target, (value.ref, *call.args[1:]), call.kwargs).replaced("pad", apart)
    return as_seen(tracer, tracer.stream(translated), value.runs, tracer.fake_seen(call).shape)


def _blocks(tracer: FoldingTracer, call: Call) -> Any:
    """Translate ``unfold``: the blocks of a map, with their positions as one axis."""
    ref = call.args[0]
    if isinstance(ref, Folded):
        return _by_image(tracer, call)
    if tracer.axes(ref) != (2, 3):
        return NotStreamable("it is not applied to a map of shape (N, C, H, W)")
    found = sliding_blocks.record_blocks(tracer, call, ref)
    return as_seen(tracer, found, (1, 1, 2), tracer.fake_seen(call).shape)


def _sum_of_blocks(tracer: FoldingTracer, call: Call) -> Any:
    value: Folded = call.args[0]
    if value.runs != (1, 1, 2):
        return _by_image(tracer, call)
    return sliding_blocks.record_sum_of_blocks(tracer, call, value.ref)


# --- shared -------------------------------------------------------------------------------------------


def _first_of(tracer: FoldingTracer, call: Call) -> Folded | NotStreamable:
    """The first operand, if it is the only map; else the reason why the call cannot be streamed."""
    first, *others = (as_folded(tracer, each) for each in values_of(call))
    if tracer.axes(first.ref) is None or any(tracer.axes(each.ref) is not None for each in others):
        return NotStreamable("its parameters depend on the position")
    return first


def _lies_in_batch(tracer: FoldingTracer, value: Folded) -> bool:
    """Whether the spatial axes are merged into the batch, so that every position holds images of its own."""
    axes = tracer.axes(value.ref)
    return axes is not None and set(axes) <= set(value.span(0))


def _as_image(
    tracer: FoldingTracer,
    call: Call,
    value: Folded,
    translated: Callable[[Ref], Call],
    beside: Sequence[int] = (),
) -> Any:
    """Carry out a call on the map as images (N, C, H, W).

    The axes ``beside`` are merged into the channels, behind them; all other axes are merged into the batch.
    """
    axes, ndim, channels = tracer.axes(value.ref), sum(value.runs), value.starts[1]
    assert axes is not None
    if value.runs[1] > 1 or channels in axes:
        return _NO_IMAGES
    last = (channels, *beside, *axes)
    order = [*(axis for axis in range(ndim) if axis not in last), *last]
    turned = tracer.stream(Call(aten.permute.default, (value.ref, order), {}))
    shape = tracer.spec(turned).shape
    lead = ndim - len(last)
    image = (math.prod(shape[:lead]), math.prod(shape[lead:-2]), *shape[-2:])
    result = tracer.stream(translated(tracer.stream(Call(aten.reshape.default, (turned, image), {}))))
    if isinstance(result, NotStreamable):
        return result
    apart = (*shape[:lead], -1, *shape[lead + 1 :])
    result = tracer.stream(Call(aten.reshape.default, (result, apart), {}))
    back = [order.index(axis) for axis in range(ndim)]
    result = tracer.stream(Call(aten.permute.default, (result, back), {}))
    return as_seen(tracer, result, value.runs, tracer.fake_seen(call).shape)


TRANSLATIONS.update(
    {
        convolution.conv2d: _convolution,
        images.along_one_axis: _along_one_axis,
        **dict.fromkeys(
            (normalization.batch_norm, normalization.instance_norm, normalization.group_norm), _norm
        ),
        **dict.fromkeys((convolution.conv_transpose2d, pooling.max_pool2d, pooling.avg_pool2d), _by_image),
        **dict.fromkeys((resampling.upsample_nearest, resampling.upsample_bilinear), _by_image),
        **dict.fromkeys((resampling.upsample_bicubic, resampling.upsample_antialiased), _by_image),
        adaptive_pooling.adaptive_pool: _by_image,
        **dict.fromkeys((resampling.pixel_shuffle, resampling.pixel_unshuffle), _by_image),
        padding.pad: _pad,
        sliding_blocks.blocks: _blocks,
        sliding_blocks.sum_of_blocks: _sum_of_blocks,
    }
)
