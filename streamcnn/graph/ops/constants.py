"""Numbers that an operator's code works out for a tile, as tensors beside the tile."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor
from torch._subclasses.functional_tensor import FunctionalTensor

from streamcnn.graph.fakes import is_fake


def numbers(values: Sequence[float], dtype: torch.dtype, beside: Tensor) -> Tensor:
    """``values`` as a tensor of shape (n,) on the device of ``beside``, for which the host does not wait.

    From memory that is not pinned it would wait until the device has done all that it was given before.
    """
    if not beside.is_cuda or is_traced(beside):
        return torch.tensor(values, dtype=dtype, device=beside.device)
    return brought(torch.tensor(values, dtype=dtype), beside.device)


def brought(values: Tensor, device: torch.device) -> Tensor:
    """A few values of the host's on ``device``, for which the host does not wait either."""
    if device.type != "cuda" or is_traced(values):
        return values.to(device)
    return values.pin_memory().to(device, non_blocking=True)


def filled(value: float, like: Tensor) -> Tensor:
    """A tensor of ``like``'s shape, type and device that is ``value`` everywhere; not to be written to.

    On a GPU it is made once, as it costs as much to ask for as a pass over a small map.
    """
    if not like.is_cuda or is_traced(like):
        return torch.full_like(like, value)
    return _kept(value, like.shape, like.dtype, like.device)


@lru_cache(1024)
def _kept(value: float, shape: torch.Size, dtype: torch.dtype, device: torch.device) -> Tensor:
    with torch.inference_mode(False):
        made = torch.full(shape, value, dtype=dtype, device=device)
    # It is there for whatever stream asks next.
    torch.cuda.synchronize(device)
    return made


def is_traced(values: Tensor) -> bool:
    """Whether what is done with ``values`` is recorded: pinned memory is nothing that can be compiled."""
    return is_fake(values) or isinstance(values, FunctionalTensor)
