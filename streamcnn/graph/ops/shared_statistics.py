"""Batch norm with the statistics of several processes' images, as ``torch.nn.SyncBatchNorm`` has it.

Each process computes the moments of its own images in tiles, as for any batch norm; then the processes
exchange them. The exchange is an operator on a few values, and the rest of the norm is local as ever.
Processes may have images of different sizes and so different plans, but must make all exchanges in one order.
So each exchange takes a value that the one before has returned, and no plan can change the order. That value
has no gradient, so a norm whose result has none gives none to its parameters. Backward, exchanges run in the
opposite order, since levels are visited from the last to the first, and autograd visits values computed later
first.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch import distributed as dist

from streamcnn.graph.costs import Cost, declare
from streamcnn.graph.ops.moments import Moments
from streamcnn.graph.ops.norm_pass import normalize, scale_and_shift
from streamcnn.graph.ops.normalization import is_of_images, normalized
from streamcnn.graph.ops.reduction_types import statistics_dtype
from streamcnn.graph.ops.rules import Call, NotStreamable, Sample, Tracer, rule
from streamcnn.graph.ops.whole_norms import cumulative_rate, mixed

_SCHEMA = (
    "(Tensor input, Tensor? weight, Tensor? bias, float eps, str group, Tensor? after=None)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor)"
)


def _group(name: str) -> Any:
    """The process group of this name, as PyTorch's functional collectives find it."""
    return dist.distributed_c10d._resolve_process_group(name)  # type: ignore[attr-defined, arg-type]


@torch.library.custom_op("streamcnn::shared_moments", mutates_args=())
def shared_moments(
    mean: Tensor, variance: Tensor, count: int, group: str, after: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Mean and biased variance (C,) over all processes' values, given this process's over ``count`` values.

    Parameters
    ----------
    group
        Name of the process group; all its processes have to call this equally often.
    after
        The last result of the previous call, which fixes the order.

    Returns
    -------
    tuple
        Mean, variance, the number of values behind each as float64 (), and ``after`` for the next call.
    """
    processes = _group(group)
    own = torch.cat([mean.new_full((1,), count, dtype=torch.float64), mean.double(), variance.double()])
    everyone = own.new_empty(dist.get_world_size(processes), own.numel())
    dist.all_gather(list(everyone.unbind()), own, group=processes)
    counts, means, variances = torch.split(everyone, [1, mean.numel(), mean.numel()], dim=1)
    shares = counts / counts.sum()
    # By the formula of Chan, Golub and LeVeque, as tiles' moments are merged.
    together = (shares * means).sum(0)
    spread = (shares * ((means - together).square() + variances)).sum(0)
    return (
        together.to(mean.dtype),
        spread.to(variance.dtype),
        counts.sum(),
        mean.new_zeros((), dtype=torch.int64),
    )


@shared_moments.register_fake
def _(
    mean: Tensor, variance: Tensor, count: int, group: str, after: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    total = mean.new_empty((), dtype=torch.float64)
    return torch.empty_like(mean), torch.empty_like(variance), total, mean.new_empty((), dtype=torch.int64)


def _remember(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    mean, _, count, group, _ = inputs
    together, _, total, _ = output
    ctx.save_for_backward(mean, together, total)
    ctx.count, ctx.group = count, group


def _gradient(
    ctx: Any, grad_mean: Tensor, grad_variance: Tensor, *_: Tensor | None
) -> tuple[Tensor | None, ...]:
    """Sum the gradients of all processes, and take this process's share, by its number of values."""
    mean, together, total = ctx.saved_tensors
    everyone = torch.stack([grad_mean.double(), grad_variance.double()])
    dist.all_reduce(everyone, group=_group(ctx.group))
    grad_mean, grad_variance = everyone * (ctx.count / total)
    grad_mean = grad_mean + 2 * (mean.double() - together) * grad_variance
    return grad_mean.to(mean.dtype), grad_variance.to(mean.dtype), None, None, None


shared_moments.register_autograd(_gradient, setup_context=_remember)


def _on_whole(
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    group: str,
    after: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The norm of whole values (N, C, ...), and the results of `shared_moments`."""
    dims = [0, *range(2, input.dim())]
    dtype = statistics_dtype(input.dtype)
    variance, mean = torch.var_mean(input.to(dtype), dims, correction=0)
    count = input.numel() // input.shape[1]
    mean, variance, total, after = shared_moments(mean, variance, count, group, after)
    weight, bias = (None if value is None else value.to(dtype) for value in (weight, bias))
    scale, shift = scale_and_shift(mean, variance, weight, bias, eps)
    return normalize(input, mean, scale, shift), mean, variance, total, after


torch.library.define("streamcnn::synchronised_batch_norm", _SCHEMA)
torch.library.impl("streamcnn::synchronised_batch_norm", "CompositeImplicitAutograd", _on_whole)
SYNCHRONISED = torch.ops.streamcnn.synchronised_batch_norm.default
"""``(result, mean, variance, count, after)`` of a map or any values (N, C, ...); see `shared_moments`."""
SHARED = torch.ops.streamcnn.shared_moments.default
AFTER = 4
"""Index among these results of ``after`` for the next call."""


declare(SYNCHRONISED, SHARED, cost=Cost(meets_others=True))


@rule(SYNCHRONISED)
def synchronised_batch_norm(tracer: Tracer, call: Call) -> Any:
    """Batch norm with the statistics of all processes of a group."""
    ref, weight, bias, eps, group, after = call.bind("input", "weight", "bias", "eps", "group", "after")
    if not is_of_images(tracer, ref):
        return NotStreamable("it is not applied to a map of shape (N, C, H, W)")
    moments = Moments(tracer.spec(ref).shape, (0, 2, 3), False)
    own_mean, own_variance = tracer.reduce(moments, ref)
    mean, variance, total, after = tracer.global_value(
        SHARED, own_mean, own_variance, moments.count, group, after
    )
    return normalized(tracer, ref, mean, variance, weight, bias, eps), mean, variance, total, after


def normalised_together(norm: nn.SyncBatchNorm, input: Tensor, group: str) -> Tensor:
    """The result of ``norm`` in train mode; its running statistics are updated."""
    normalise = torch.ops.streamcnn.synchronised_batch_norm
    result: Tensor
    result, mean, variance, count, _ = normalise(input, norm.weight, norm.bias, norm.eps, group)
    if not norm.track_running_stats:
        return result
    assert norm.num_batches_tracked is not None
    with torch.no_grad():
        norm.num_batches_tracked.add_(1)
        rate = cumulative_rate(norm.num_batches_tracked) if norm.momentum is None else norm.momentum
        unbiased = variance * (count / (count - 1).clamp(min=1))
        for running, value in ((norm.running_mean, mean), (norm.running_var, unbiased)):
            assert running is not None
            running.copy_(mixed(running, value, rate, 1.0))
    return result


SAMPLES: tuple[Sample, ...] = ()
"""None, since a sample runs in one process."""
