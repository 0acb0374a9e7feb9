"""Tensors with a part replaced by other values, differentiable for complex values too.

PyTorch differentiates ``slice_scatter`` and ``select_scatter`` for real values alone, although an assignment
to a slice of a complex tensor has a gradient, as layers in Fourier space need it.
"""

from __future__ import annotations

import torch
from torch import Tensor


def slice_replaced(into: Tensor, part: Tensor, dim: int, start: int, stop: int, step: int) -> Tensor:
    """``into`` with the positions ``start:stop:step`` of one axis replaced by ``part``, of the same type."""
    if not into.is_complex():
        return torch.slice_scatter(into, part, dim, start, stop, step)
    # Real and imaginary parts are a further axis, the last one.
    pairs = torch.slice_scatter(_pairs(into), _pairs(part), dim % into.dim(), start, stop, step)
    return torch.view_as_complex(pairs)


def entry_replaced(into: Tensor, part: Tensor, dim: int, index: int) -> Tensor:
    """``into`` with entry ``index`` of one axis replaced by ``part``, which lacks that axis."""
    dim = dim % into.dim()
    start = index % into.shape[dim]
    return slice_replaced(into, part.unsqueeze(dim), dim, start, start + 1, 1)


def real_replaced(into: Tensor, part: Tensor) -> Tensor:
    """Complex ``into`` with the real values ``part``, of the same shape, for its real part."""
    return torch.complex(part, into.imag)


def imag_replaced(into: Tensor, part: Tensor) -> Tensor:
    """Complex ``into`` with the real values ``part``, of the same shape, for its imaginary part."""
    return torch.complex(into.real, part)


def _pairs(values: Tensor) -> Tensor:
    return torch.view_as_real(values.resolve_conj())
