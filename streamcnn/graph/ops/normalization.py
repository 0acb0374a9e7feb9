"""Batch, instance, group and whole-image layer norm: a barrier for the statistics, then one local pass.

The local pass, by a mean, a scale and a shift, is :mod:`norm_pass`.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from streamcnn.graph.costs import Cost, Operation, Saves, cost_of, declare
from streamcnn.graph.ops import whole_norms
from streamcnn.graph.ops.moments import Moments
from streamcnn.graph.ops.norm_pass import normalize, normalize_images, scale_and_shift
from streamcnn.graph.ops.pointwise import cast, per_position, pointwise, trailing_norm
from streamcnn.graph.ops.reduction_types import statistics_dtype
from streamcnn.graph.ops.rules import Call, NotStreamable, Sample, Tracer, rule
from streamcnn.graph.ops.samples import chain
from streamcnn.graph.program import Access, Ref

aten = torch.ops.aten


def normalized(
    tracer: Tracer, ref: Ref, mean: Ref, variance: Ref, weight: Ref | None, bias: Ref | None, eps: float
) -> Ref:
    like = torch.empty(tracer.spec(ref).shape, dtype=tracer.spec(ref).dtype, device="meta")
    weight, bias = (_as_statistics(tracer, ref, parameter) for parameter in (weight, bias))
    scale, shift = tracer.global_value(scale_and_shift, mean, variance, weight, bias, eps)
    target = normalize if tracer.spec(mean).shape == like.shape[1:2] else normalize_images
    return tracer.local(
        target, (ref, mean, scale, shift), like=like, axes=(2, 3), accesses={ref.name: Access()}
    )


def _as_statistics(tracer: Tracer, ref: Ref, parameter: Ref | None) -> Ref | None:
    """A per-channel value in the dtype of the statistics of ``ref``, which ATen's kernels require.

    It is cast once, as a global value: tiles' gradients are summed in that dtype, and only the sum is
    rounded.
    """
    dtype = statistics_dtype(tracer.spec(ref).dtype)
    if parameter is None or tracer.spec(parameter).dtype == dtype:
        return parameter
    cast: Ref = tracer.global_value(aten.to.dtype, parameter, dtype)
    return cast


def is_of_images(tracer: Tracer, ref: Ref) -> bool:
    """Whether a map has shape (N, C, H, W)."""
    return tracer.axes(ref) == (2, 3) and len(tracer.spec(ref).shape) == 4


def _fixed(tracer: Tracer, call: Call, ref: Ref) -> Ref:
    """A norm by running statistics, which treats every position alike."""
    if is_of_images(tracer, ref):
        *given, eps = call.bind("running_mean", "running_var", "weight", "bias", "eps")
        mean, variance, weight, bias = (_as_statistics(tracer, ref, value) for value in given)
        # A network with no batch statistics has running ones.
        assert mean is not None
        assert variance is not None
        return normalized(tracer, ref, mean, variance, weight, bias, eps)
    values = {p.name: _as_statistics(tracer, ref, p) for p in call.args[1:5] if isinstance(p, Ref)}
    args = (ref, *(values[p.name] if isinstance(p, Ref) else p for p in call.args[1:]))
    # On a tile, too, kernels may misread gradients.
    target = cost_of(call.target).on_whole or call.target
    return per_position(tracer, Call(target, args, call.kwargs), ref)


@rule(aten.batch_norm.default, without_maps=True)
def batch_norm(tracer: Tracer, call: Call) -> Any:
    """Batch norm with the statistics of the whole batch of images, or with running statistics."""
    ref, weight, bias, running_mean, running_var, training, momentum, eps = call.bind(
        "input", "weight", "bias", "running_mean", "running_var", "training", "momentum", "eps"
    )
    if training and tracer.axes(ref) is None:
        return _global_batch_norm(tracer, ref, weight, bias, running_mean, running_var, momentum, eps)
    if tracer.axes(ref) is None:
        return tracer.global_value(call.target, *call.args, **call.kwargs)
    if tracer.axes(ref) == (2, 3) and not training:
        return _fixed(tracer, call, ref)
    if not is_of_images(tracer, ref):
        return NotStreamable("it is not applied to a map of shape (N, C, H, W)")
    moments = Moments(tracer.spec(ref).shape, (0, 2, 3), False)
    mean, variance = tracer.reduce(moments, ref)
    if running_mean is not None:
        rate = _rate(tracer, momentum)
        _update_running(tracer, running_mean, mean, rate, 1.0)
        unbiased = moments.count / max(moments.count - 1, 1)
        _update_running(tracer, running_var, variance, rate, unbiased)
    return normalized(tracer, ref, mean, variance, weight, bias, eps)


def _rate(tracer: Tracer, momentum: float | Ref) -> Any:
    """The weight of the new statistics; for a cumulative average, computed from the module's counter."""
    if not isinstance(momentum, Ref):
        return momentum
    return tracer.global_value(whole_norms.cumulative_rate, momentum)


def _update_running(tracer: Tracer, running: Ref, value: Ref, rate: Any, factor: float) -> None:
    tracer.update(running, tracer.global_value(whole_norms.mixed, running, value, rate, factor))


def _global_batch_norm(
    tracer: Tracer,
    ref: Ref,
    weight: Ref | None,
    bias: Ref | None,
    running_mean: Ref | None,
    running_var: Ref | None,
    momentum: float,
    eps: float,
) -> Ref:
    """Train-mode batch norm of a global value, with its buffers' new values as results."""
    if running_mean is None:
        result: Ref = tracer.global_value(
            aten.batch_norm.default, ref, weight, bias, None, None, True, 0.0, eps, False
        )
        return result
    assert running_var is not None
    rate = _rate(tracer, momentum)
    result, new_mean, new_var = tracer.global_value(
        whole_norms.functional_batch_norm, ref, weight, bias, running_mean, running_var, rate, eps
    )
    tracer.update(running_mean, new_mean)
    tracer.update(running_var, new_var)
    return result


@rule(aten.instance_norm.default, without_maps=True)
def instance_norm(tracer: Tracer, call: Call) -> Any:
    """Instance norm with each image's own statistics, or with running statistics."""
    ref, weight, bias, running_mean, running_var, own_statistics, momentum, eps = call.bind(
        "input", "weight", "bias", "running_mean", "running_var", "use_input_stats", "momentum", "eps"
    )
    if tracer.axes(ref) is None:
        return _whole_instance_norm(tracer, call)
    if tracer.axes(ref) == (2, 3) and not own_statistics:
        return _fixed(tracer, call, ref)
    if not is_of_images(tracer, ref):
        return NotStreamable("it is not applied to a map of shape (N, C, H, W)")
    moments = Moments(tracer.spec(ref).shape, (2, 3), False)
    mean, variance = tracer.reduce(moments, ref)
    if running_mean is not None:
        unbiased = moments.count / max(moments.count - 1, 1)
        _update_running(tracer, running_mean, tracer.global_value(torch.mean, mean, 0), momentum, 1.0)
        _update_running(tracer, running_var, tracer.global_value(torch.mean, variance, 0), momentum, unbiased)
    weight, bias = (_repeated(tracer, ref, parameter) for parameter in (weight, bias))
    mean, variance = (tracer.global_value(torch.flatten, value) for value in (mean, variance))
    return normalized(tracer, ref, mean, variance, weight, bias, eps)


def _repeated(tracer: Tracer, ref: Ref, parameter: Ref | None) -> Any:
    if parameter is None:
        return None
    return tracer.global_value(repeated, _as_statistics(tracer, ref, parameter), tracer.spec(ref).shape[0])


def _whole_instance_norm(tracer: Tracer, call: Call) -> Any:
    """Instance norm of a global value, with its buffers' new values as results."""
    ref, weight, bias, running_mean, running_var, own_statistics, momentum, eps = call.bind(
        "input", "weight", "bias", "running_mean", "running_var", "use_input_stats", "momentum", "eps"
    )
    if not own_statistics or running_mean is None:
        return tracer.global_value(call.target, *call.args, **call.kwargs)
    result, new_mean, new_var = tracer.global_value(
        whole_norms.functional_instance_norm, ref, weight, bias, running_mean, running_var, momentum, eps
    )
    tracer.update(running_mean, new_mean)
    tracer.update(running_var, new_var)
    return result


def repeated(parameter: Tensor, times: int) -> Tensor:
    """A per-channel parameter (C,) for each of ``times`` images, (times * C,)."""
    return parameter.repeat(times)


@rule(aten.group_norm.default)
def group_norm(tracer: Tracer, call: Call) -> Any:
    """Group norm over each image's groups of channels."""
    ref, num_groups, weight, bias, eps = call.bind("input", "num_groups", "weight", "bias", "eps")
    if not is_of_images(tracer, ref):
        return NotStreamable("it is not applied to a map of shape (N, C, H, W)")
    return _grouped(tracer, ref, num_groups, weight, bias, eps)


def _grouped(
    tracer: Tracer, ref: Ref, num_groups: int, weight: Ref | None, bias: Ref | None, eps: float
) -> Ref:
    spec = tracer.spec(ref)
    num_images, channels = spec.shape[:2]
    split = (num_images, num_groups, channels // num_groups, *spec.shape[2:])
    grouped = tracer.local(
        split_channels,
        (ref, num_groups),
        like=torch.empty(split, dtype=spec.dtype, device="meta"),
        axes=(3, 4),
        accesses={ref.name: Access()},
    )
    statistics = tracer.reduce(Moments(split, (2, 3, 4), False), grouped)
    mean, variance = (tracer.global_value(per_channel, value, channels) for value in statistics)
    weight, bias = (_repeated(tracer, ref, parameter) for parameter in (weight, bias))
    return normalized(tracer, ref, mean, variance, weight, bias, eps)


def split_channels(x: Tensor, num_groups: int) -> Tensor:
    """``x`` (N, C, h, w) as (N, G, C/G, h, w)."""
    return x.reshape(x.shape[0], num_groups, -1, *x.shape[2:])


def per_channel(statistic: Tensor, channels: int) -> Tensor:
    """A statistic per group (N, G) as one per channel (N*C,)."""
    return statistic.repeat_interleave(channels // statistic.shape[1], dim=1).flatten()


@rule(aten.layer_norm.default)
def layer_norm(tracer: Tracer, call: Call) -> Any:
    """Layer norm over trailing axes: of each position if they are channels, else of each whole image."""
    ref, shape, weight, bias, eps = call.bind("input", "normalized_shape", "weight", "bias", "eps")
    if not is_of_images(tracer, ref) or len(shape) != 3:
        return trailing_norm(tracer, call)
    dtype = tracer.fake(call).dtype
    result = cast(tracer, ref, statistics_dtype(tracer.spec(ref).dtype))
    result = _grouped(tracer, result, 1, None, None, eps)
    for target, parameter in ((aten.mul.Tensor, weight), (aten.add.Tensor, bias)):
        if parameter is not None:
            parameter = _as_statistics(tracer, ref, parameter)
            result = pointwise(tracer, Call(target, (result, parameter), {}))
    return cast(tracer, result, dtype)


def _statistics_bytes(operation: Operation) -> int:
    """Bytes of the means and deviations."""
    operand, shape = operation.bind("input", "normalized_shape")
    itemsize = statistics_dtype(operand.tensor.dtype).itemsize
    # How many rows there are, elements do not say of a norm over no values.
    return 2 * itemsize * (operation.numel // max(1, int(math.prod(shape))))


declare(
    aten.layer_norm,
    # A dense copy of the operand, or its gradient.
    cost=Cost(workspace=lambda nbytes: nbytes.operands, saves=Saves(operands=True, beside=_statistics_bytes)),
)


def _instance() -> nn.Module:
    return chain(
        nn.Conv2d(3, 4, 3), nn.InstanceNorm2d(4, affine=True, track_running_stats=True), nn.Conv2d(4, 3, 3)
    )


def _batch() -> nn.Module:
    return chain(
        nn.Conv2d(3, 4, 3, bias=False),
        nn.BatchNorm2d(4, momentum=None),
        nn.SiLU(),
        nn.Conv2d(4, 6, 3, stride=2, bias=False),
        nn.BatchNorm2d(6, affine=False),
        nn.Conv2d(6, 4, 1, bias=False),
        nn.BatchNorm2d(4, track_running_stats=False),
    )


SAMPLES = (
    *(Sample(f"batch norm, train={train}", _batch, train=train) for train in (True, False)),
    *(Sample(f"instance norm, train={train}", _instance, train=train) for train in (True, False)),
    Sample("group norm", lambda: chain(nn.Conv2d(3, 6, 3), nn.GroupNorm(3, 6), nn.Conv2d(6, 3, 3))),
    Sample("layer norm over the image", lambda: chain(nn.Conv2d(3, 4, 3), nn.LayerNorm((4, 41, 35)))),
)
