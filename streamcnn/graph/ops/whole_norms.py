"""Batch and instance norm of whole values, by ATen's own operators.

For one image, kernels on a CPU misread a gradient in channels last, such as that of tokens, as one in the
layout of an operand that is not, or the reverse: its strides allow both readings. So the gradient is laid out
as the operand here.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from streamcnn.geometry.windows import layout
from streamcnn.graph.costs import Cost, declare

aten = torch.ops.aten


class _InFormat(torch.autograd.Function):
    """A value whose gradient is brought to a memory format."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, format: torch.memory_format) -> Tensor:
        ctx.format = format
        return value.detach()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0].contiguous(memory_format=ctx.format), None


def _may_be_misread(x: Tensor) -> bool:
    return x.dim() in (4, 5) and x.device.type == "cpu"


def batch_norm(x: Tensor, *args: Any) -> Tensor:
    """``torch.batch_norm``."""
    if not _may_be_misread(x) or x.shape[0] != 1:
        return torch.batch_norm(x, *args)
    # `layout` knows no volumes in channels last.
    x = x.contiguous() if x.dim() == 5 else x
    result: Tensor = _InFormat.apply(torch.batch_norm(x, *args), layout(x))  # type: ignore[no-untyped-call]
    return result


def instance_norm(x: Tensor, *args: Any) -> Tensor:
    """``torch.instance_norm``."""
    result = torch.instance_norm(x, *args)
    if _may_be_misread(x):
        # To ATen, the channels of all images are those of one, in the order of their axes.
        result = _InFormat.apply(result, torch.contiguous_format)  # type: ignore[no-untyped-call]
    return result


class NormsDifferentiatedRight(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """While it is entered, plain PyTorch's backward passes read gradients of norms in their own layout."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.was_wrong = False
        """Whether a gradient was misread, but for this mode."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        found = func(*args, **(kwargs or {}))
        if func is not aten.native_batch_norm_backward.default or not _may_be_misread(args[1]):
            return found
        right = func(*(each.contiguous() for each in args[:2]), *args[2:], **(kwargs or {}))
        self.was_wrong |= not torch.allclose(found[0], right[0], rtol=1e-3, atol=0, equal_nan=True)
        return right


declare(aten.batch_norm, cost=Cost(on_whole=batch_norm))
declare(aten.instance_norm, cost=Cost(on_whole=instance_norm))


def cumulative_rate(counter: Tensor) -> Tensor:
    """One over the number of batches seen, including this one."""
    return counter.double().reciprocal()


def mixed(running: Tensor, value: Tensor, rate: float | Tensor, factor: float) -> Tensor:
    """``(1 - rate) * running + rate * factor * value``, rounded once to the running value's dtype.

    It has no gradient.
    """
    dtype = torch.promote_types(running.dtype, value.dtype)
    mean = running.detach().to(dtype) * (1 - rate)
    new = value.detach().to(dtype)
    # As few small kernels as possible.
    mean = mean + new * (factor * rate) if isinstance(rate, Tensor) else mean.add_(new, alpha=factor * rate)
    return mean.to(running.dtype)


def _mixed_together(
    running: list[Tensor], values: list[Tensor], rates: list[float], factors: list[float]
) -> list[Tensor]:
    """:func:`mixed` of each running value, in a launch for each operation."""
    dtype = torch.promote_types(running[0].dtype, values[0].dtype)
    means = torch._foreach_mul([value.detach().to(dtype) for value in running], [1 - rate for rate in rates])
    weights = [rate * factor for rate, factor in zip(rates, factors, strict=True)]
    torch._foreach_add_(means, torch._foreach_mul([value.detach().to(dtype) for value in values], weights))
    return [mean.to(value.dtype) for mean, value in zip(means, running, strict=True)]


declare(mixed, cost=Cost(together=_mixed_together))


def functional_batch_norm(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor,
    running_var: Tensor,
    rate: float | Tensor,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Train-mode batch norm that returns the new running statistics, and writes to nothing.

    No running statistics get a gradient; those given may come from an earlier use of the same norm.
    """
    running_mean, running_var = running_mean.detach(), running_var.detach()
    enabled = torch.backends.cudnn.enabled
    if not isinstance(rate, Tensor):
        mean, variance = running_mean.clone(), running_var.clone()
        y = batch_norm(x, weight, bias, mean, variance, True, rate, eps, enabled)
        return y, mean, variance
    # If the rate is a tensor, mix the batch's own statistics, which a rate of 1 gives.
    mean, variance = torch.zeros_like(running_mean), torch.zeros_like(running_var)
    y = batch_norm(x, weight, bias, mean, variance, True, 1.0, eps, enabled)
    return y, mixed(running_mean, mean, rate, 1.0), mixed(running_var, variance, rate, 1.0)


def functional_instance_norm(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor,
    running_var: Tensor,
    momentum: float,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Instance norm that returns the new running statistics, without gradients, and writes to nothing."""
    mean, var = running_mean.detach().clone(), running_var.detach().clone()
    enabled = torch.backends.cudnn.enabled
    return instance_norm(x, weight, bias, mean, var, True, momentum, eps, enabled), mean, var
