"""Passes over a map on a GPU that read and write every element once, and sum in at least float32.

Maps are (N, C, h, w) tensors in channels last, copied first if they have gaps; per-channel values are (C,),
in the dtype of the map's statistics. The operators that these functions replace take several passes, or a
float32 tensor as large as the map, or start one block for each channel, which leaves most of a GPU idle if
there are few channels.

Where Triton works, which comes with PyTorch for CUDA, the passes are kernels of streamcnn's own; elsewhere
they are ATen's kernels for synchronised batch norm.
"""

from __future__ import annotations

import os
import warnings
from functools import lru_cache
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor

from streamcnn.geometry.windows import dense, layout
from streamcnn.graph.ops.activations import IDENTITY, RELU, Activation
from streamcnn.graph.ops.constants import filled, is_traced

VARIABLE = "STREAMCNN_TRITON"
"""The environment variable that selects ATen's kernels if it is ``0``."""
_MAX_ELEMENTS = 2**31
"""Positions are 32-bit numbers in the kernels."""


def fits(x: Tensor) -> bool:
    """Whether the functions of this module can be called with ``x``."""
    is_suited = x.is_cuda and x.is_floating_point() and x.numel() < _MAX_ELEMENTS
    return is_suited and is_channels_last(x) and not is_traced(x)


def has_host_moments(x: Tensor) -> bool:
    """Whether :func:`moments` can be called with ``x`` although it is on a CPU."""
    is_suited = x.device.type == "cpu" and x.dtype in (torch.float32, torch.float64) and x.is_contiguous()
    # The kernel has no meta form: PyTorch would run it on as many zeros.
    return is_suited and not is_traced(x)


def is_channels_last(x: Tensor) -> bool:
    """Whether ``x`` is in channels last; it may be a crop of a map."""
    return layout(x) is torch.channels_last


def takes_activations(x: Tensor) -> bool:
    """Whether a norm of ``x``, which :func:`fits`, can be fused with the operators after it."""
    return _own(x) is not None


def moments(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and biased variance (C,) of each channel; on a GPU by Welford's algorithm.

    On a CPU, for an ``x`` that :func:`has_host_moments`, ATen reads ``x`` twice and allocates no tensor of
    its size.
    """
    own = _own(x)
    if own is None:
        return torch.batch_norm_update_stats(dense(x), None, None, 0.0)
    mean, variance = own.moments(dense(x))
    return mean, variance


def normalised(
    x: Tensor,
    mean: Tensor,
    scale: Tensor,
    shift: Tensor,
    activation: Activation = IDENTITY,
    summand: Tensor | None = None,
) -> Tensor:
    """``activation((x - mean) * scale + shift + summand)``, rounded once to the dtype of ``x``.

    A summand, which is dense, and an activation are allowed only if ``x`` :func:`takes_activations`.
    """
    own = _own(x)
    if own is None:
        assert activation is IDENTITY
        assert summand is None
        return torch.batch_norm_elemt(dense(x), None, shift, mean, scale, 0.0)
    found: Tensor = own.normalised(dense(x), mean, scale, shift, activation, summand)
    return found


def gradients(
    x: Tensor, gradient: Tensor, mean: Tensor, scale: Tensor, shift: Tensor, activation: Activation = IDENTITY
) -> tuple[Tensor, Tensor, Tensor]:
    """The backward pass of :func:`normalised` without a summand, given the gradient of its result.

    An activation is allowed only if ``x`` :func:`takes_activations`.

    Returns
    -------
    tuple of Tensor
        The gradients of ``x``, of the shift (C,) and of the scale (C,).
    """
    own = _own(x)
    if own is not None:
        found, total, product = own.gradients(dense(x), _beside(gradient), mean, scale, shift, activation)
        return found, total, product
    assert activation is IDENTITY
    gradient = _beside(gradient.to(x.dtype))
    # The kernel's sums do not contain the inverse deviation, in whose place we pass the scale.
    total, product, _, _ = torch.batch_norm_backward_reduce(
        gradient, dense(x), mean, scale, None, True, False, False
    )
    return torch.batch_norm_elemt(gradient, None, None, filled(0, scale), scale, 0.0), total, product


class Line(NamedTuple):
    """The function that :func:`plus_line` adds."""

    mean: Tensor
    slope: Tensor
    offset: Tensor
    one: Tensor
    """Ones, (C,)."""
    minus_one: Tensor
    """The count that ATen's kernel divides by before it subtracts sums of gradients; -1 makes it add."""


def line(mean: Tensor, slope: Tensor, offset: Tensor) -> Line:
    """``slope * (x - mean) + offset``, for any number of tiles ``x``."""
    minus_one = filled(-1, mean.new_empty(1, dtype=torch.int32))
    return Line(mean, slope, offset, filled(1, mean), minus_one)


def plus_line(total: Tensor, x: Tensor, line: Line) -> Tensor:
    """``total + slope * (x - mean) + offset`` in the type of ``x``."""
    mean, slope, offset, one, count = line
    own = _own(x)
    if own is not None:
        found: Tensor = own.plus_line(_beside(total), dense(x), mean, slope, offset)
        return found
    total = _beside(total.to(x.dtype))
    return torch.batch_norm_backward_elemt(total, dense(x), mean, one, None, offset, slope, count)


def _beside(value: Tensor) -> Tensor:
    """``value`` as a dense map in channels last."""
    return value.contiguous(memory_format=torch.channels_last)


def _own(x: Tensor) -> ModuleType | None:
    """Streamcnn's own passes for a map like ``x``; ``None`` if ATen's are to be called."""
    return _passes(x.device, x.dtype) if x.is_cuda else None


@lru_cache
def _passes(device: torch.device, dtype: torch.dtype) -> ModuleType | None:
    """The module of streamcnn's passes, if they agree with plain operators for this device and dtype."""
    if os.environ.get(VARIABLE) == "0":
        return None
    try:
        from streamcnn.graph.ops import triton_passes
    except ImportError:
        # This PyTorch was built without Triton.
        return None
    if device.type == "cuda" and triton_passes.IS_INTERPRETED:
        # The user debugs kernels of their own; a pass under the interpreter would take hours.
        return None
    try:
        wrong = _differing(triton_passes, device, dtype)
    except Exception as error:
        if "out of memory" in str(error):
            # Out of memory, by the allocator, the driver or Triton: there may be enough the next time.
            raise
        # A compiler, its drivers and its tools may raise anything.
        wrong = str(error).strip().partition("\n")[0] or type(error).__name__
    if not wrong:
        return triton_passes
    warnings.warn(
        f"streamcnn's own kernels for batch norm do not work for {dtype} on {device}: {wrong}. PyTorch's are "
        f"used, with the same results and more time; {VARIABLE}=0 in the environment leaves this check out",
        stacklevel=2,
    )
    return None


def _differing(passes: ModuleType, device: torch.device, dtype: torch.dtype) -> str:
    """Compare the passes with plain operators on a small map; a text on what differs, empty if nothing does.

    The map's values are computed without the caller's random numbers.
    """
    statistics = torch.promote_types(dtype, torch.float32)
    values = torch.arange(2 * 64 * 5 * 7, device=device, dtype=torch.float64)
    x, gradient, summand = (
        _beside((values * factor).sin().reshape(2, 64, 5, 7).to(dtype)) for factor in (0.7, 1.3, 2.9)
    )
    mean, scale, shift = ((values[:64] * factor).cos().to(statistics) for factor in (0.3, 0.9, 1.7))
    a, b, c = (value.double()[:, None, None] for value in (mean, scale, shift))
    centred = x.double() - a
    sent = torch.where(centred * b + c > 0, gradient.double(), 0)
    variance, middle = torch.var_mean(x.double(), (0, 2, 3), correction=0)
    found = (
        *passes.moments(x),
        passes.normalised(x, mean, scale, shift, RELU, summand),
        *passes.gradients(x, gradient, mean, scale, shift, RELU),
        passes.plus_line(gradient, x, mean, scale, shift),
    )
    expected = (
        *(middle, variance),
        (centred * b + c + summand.double()).relu(),
        *(sent * b, sent.sum((0, 2, 3)), (sent * centred).sum((0, 2, 3))),
        gradient.double() + b * centred + c,
    )
    names = ("mean", "variance", "norm", "gradient", "sum", "product", "line")
    # One synchronisation for all passes.
    errors = torch.stack(
        [(f - e).abs().max() / e.abs().max().clamp_min(1) for f, e in zip(found, expected, strict=True)]
    ).tolist()
    allowed = (16 * torch.finfo(value.dtype).eps for value in found)
    off = [name for name, error, most in zip(names, errors, allowed, strict=True) if not error <= most]
    return f"{', '.join(off)} differ from plain operators'" if off else ""
