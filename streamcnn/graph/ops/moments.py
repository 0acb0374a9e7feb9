"""Mean and variance of every channel, or over other axes: the statistics that norms need."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import get_proxy_mode

from streamcnn.geometry.regions import Region
from streamcnn.geometry.windows import dense
from streamcnn.graph.ops import channel_kernels
from streamcnn.graph.ops.constants import brought, is_traced
from streamcnn.graph.ops.reduction_types import Partials, Reduction, stacked, statistics_dtype


@dataclass(frozen=True, slots=True)
class Moments(Reduction):
    """Mean and biased variance, merged by the formula of Chan, Golub and LeVeque (1979).

    Squares are summed only after subtracting the tile's own mean, since ``E[x^2] - E[x]^2`` loses all
    precision where the mean is large against the deviation.
    """

    def partial(self, x: Tensor, region: Region) -> Partials:
        dtype = statistics_dtype(x.dtype)
        num_values = math.prod(x.shape[dim] for dim in self.dims)
        # On the CPU, where it needs no kernel.
        count = torch.tensor(float(num_values), dtype=torch.float64)
        if self._is_per_channel and channel_kernels.fits(x):
            return (count, *channel_kernels.moments(x))
        if self._is_per_channel and channel_kernels.has_host_moments(x):
            return (count, *self._exact_where_equal(x, *channel_kernels.moments(x)))
        mean = x.mean(self.dims, keepdim=True, dtype=dtype)
        deviation = torch.linalg.vector_norm(x - mean, 2, self.dims, dtype=dtype)
        # Squared last: the sum of squares may exceed the range of float32.
        deviation = deviation / math.sqrt(num_values)
        return (count, *self._exact_where_equal(x, mean.reshape(deviation.shape), deviation.square()))

    def _exact_where_equal(self, x: Tensor, mean: Tensor, variance: Tensor) -> tuple[Tensor, Tensor]:
        """``mean`` and ``variance``, exact where all of a tile's values are equal: that value and 0.

        A sum divided by a count is off by a rounding there, and so is the variance. Welford's algorithm,
        which ATen uses, is exact; and the deviation's gradient is 0 only where the deviation is exactly 0.
        """
        if x.device.type == "cpu" and not is_traced(x) and get_proxy_mode() is None:
            # Rarely true; the test saves another read of the tile. Not when traced, as it branches on values.
            even = variance <= (math.sqrt(torch.finfo(mean.dtype).eps) * mean).abs().square()
            if not even.any():
                return mean, variance
        first = x
        for dim in self.dims:
            first = first.narrow(dim, 0, 1)
        equal = (x == first).all(self.dims)
        return torch.where(equal, first.reshape(mean.shape), mean), torch.where(equal, 0, variance)

    def merge(self, parts: Sequence[Partials]) -> Partials:
        counts, means, variances = stacked(parts)
        count = counts.sum()
        # Everything combined with these weights becomes float64.
        weights = brought(counts / count, means.device).reshape(-1, *[1] * (means.dim() - 1))
        # Relative to the first tile's mean, so that equal values have exactly that mean and variance 0.
        mean = means[0] + (weights * (means - means[0])).sum(0)
        return (count, mean, (weights * (_squared(means - mean) + variances)).sum(0))

    def finish(self, parts: Partials, dtype: torch.dtype) -> tuple[Tensor, ...]:
        _, mean, variance = parts
        mean_dtype = statistics_dtype(dtype)
        return (self._result(mean, mean_dtype), self._result(variance, mean_dtype.to_real()))

    def gradient_terms(
        self, results: Sequence[Tensor], grads: Sequence[Tensor | None], dtype: torch.dtype
    ) -> tuple[Tensor, ...]:
        mean = results[0]
        grad_mean, grad_variance = (
            torch.zeros_like(mean) if grad is None else grad.to(mean.dtype) for grad in grads
        )
        line = (mean, grad_variance * (2 / self.count), grad_mean / self.count)
        if self._is_per_channel and not dtype.is_complex:
            return channel_kernels.line(*(value.flatten() for value in line))
        return tuple(self._broadcast(value, mean.dtype) for value in line)

    def gradient(self, x: Tensor, region: Region, terms: Sequence[Tensor]) -> Tensor:
        if self._is_per_channel and not x.is_complex():
            # One fused pass: batch norm in eval mode is slope * (x - mean) + offset.
            mean, slope, offset, one, _ = terms
            enabled = torch.backends.cudnn.enabled
            return torch.batch_norm(dense(x), slope, offset, mean, one, False, 0.0, 0.0, enabled)
        mean, slope, offset = terms
        return ((x - mean) * slope + offset).to(x.dtype)

    def added_gradient(self, total: Tensor, x: Tensor, region: Region, terms: Sequence[Tensor]) -> Tensor:
        if self._is_per_channel and channel_kernels.fits(x):
            return channel_kernels.plus_line(total, x, channel_kernels.Line(*terms))
        # Not `super()`: a dataclass with slots is not the class in whose body this is written.
        return Reduction.added_gradient(self, total, x, region, terms)

    @property
    def _is_per_channel(self) -> bool:
        return self.dims == (0, 2, 3)


def _squared(value: Tensor) -> Tensor:
    """The squared absolute value, which is real."""
    return value.abs().square() if value.is_complex() else value.square()
