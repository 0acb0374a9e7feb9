"""Entries of an axis at an index that is a tensor, as ``x[:, i]``, whose value the pass alone knows.

Plain PyTorch reads the value of an integer tensor without axes, and gives a view of ``x``. A captured graph
has an operator of our own instead. It gives a view too, so that writes to the entry reach ``x``.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from streamcnn.graph.costs import NOTHING, Cost, declare
from streamcnn.graph.fakes import is_fake

_MASKS = (torch.bool, torch.uint8)


def indexed(x: Tensor, key: Any) -> Tensor:
    """``x[key]``, where ``key`` may hold such indices."""
    x, remaining = _at_entries(x, key)
    return x[remaining] if remaining else x


def assigned(x: Tensor, key: Any, value: Any) -> None:
    """Carry out ``x[key] = value``, where ``key`` may hold such indices."""
    x, remaining = _at_entries(x, key)
    x[remaining or ...] = value


def is_entry(index: object) -> bool:
    """Whether an index is an integer tensor without axes."""
    return (
        isinstance(index, Tensor)
        and not index.dim()
        and not (index.dtype in _MASKS or index.is_floating_point() or index.is_complex())
    )


def _at_entries(x: Tensor, key: Any) -> tuple[Tensor, tuple[Any, ...]]:
    """``x`` at such indices in ``key``, and the other parts of ``key``, which name the axes that remain."""
    parts = key if isinstance(key, tuple) else (key,)
    unnamed = x.dim() - sum(map(_num_axes, parts))
    axis, remaining = 0, []
    for part in parts:
        if is_entry(part):
            # A copy, since the code may change the index before it writes to the entry.
            x = ENTRY(x, axis, part.to(x.device, copy=True))
        else:
            remaining.append(part)
            axis += unnamed if part is Ellipsis else _num_axes(part)
    return x, tuple(remaining)


def _num_axes(part: Any) -> int:
    """The number of axes that a part of an index names; those of ``...`` are not counted."""
    if part is None or part is Ellipsis or isinstance(part, bool):
        return 0
    if isinstance(part, Tensor):
        return part.dim() if part.dtype in _MASKS else 1
    if isinstance(part, np.ndarray):
        return part.ndim if part.dtype == np.bool_ else 1
    depth = 0
    while isinstance(part, list) and part:
        part, depth = part[0], depth + 1
    return depth if isinstance(part, bool) else 1


def _entry(x: Tensor, dim: int, index: Tensor) -> Tensor:
    return x.select(dim, 0 if is_fake(x) else int(index))


torch.library.define("streamcnn::entry", "(Tensor(a) x, int dim, Tensor index) -> Tensor(a)")
torch.library.impl("streamcnn::entry", "CompositeImplicitAutograd", _entry)
ENTRY = torch.ops.streamcnn.entry.default
"""One entry of an axis, as a view; only for tracing, as it reads the index."""


def entry_overwritten(into: Tensor, part: Tensor, dim: int, index: Tensor) -> Tensor:
    """A placeholder for ``into`` with the entry at ``index`` of one axis replaced by ``part``."""
    raise AssertionError("it is lowered to other operators, and not called")


declare(ENTRY, entry_overwritten, cost=Cost(saves=NOTHING))
