"""Numbers that an operator computes for a tile, as tensors on the tile's device."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor
from torch._subclasses.functional_tensor import FunctionalTensor

from streamcnn.graph.fakes import is_fake


def numbers(values: Sequence[float], dtype: torch.dtype, beside: Tensor) -> Tensor:
    """``values`` as a tensor of shape (n,) on the device of ``beside``, copied asynchronously.

    A copy from memory that is not pinned would wait until the device has finished all earlier work.
    """
    if not beside.is_cuda or is_traced(beside):
        return torch.tensor(values, dtype=dtype, device=beside.device)
    return brought(torch.tensor(values, dtype=dtype), beside.device)


def brought(values: Tensor, device: torch.device) -> Tensor:
    """A small tensor on the host as a tensor on ``device``, copied asynchronously."""
    if device.type != "cuda" or is_traced(values):
        return values.to(device)
    return values.pin_memory().to(device, non_blocking=True)


def filled(value: float, like: Tensor) -> Tensor:
    """A read-only tensor of ``like``'s shape, dtype and device that is ``value`` everywhere.

    On a GPU it is cached, as launching its kernel costs as much as a pass over a small map.
    """
    if not like.is_cuda or is_traced(like):
        return torch.full_like(like, value)
    return _kept(value, like.shape, like.dtype, like.device)


@lru_cache(1024)
def _kept(value: float, shape: torch.Size, dtype: torch.dtype, device: torch.device) -> Tensor:
    with torch.inference_mode(False):
        made = torch.full(shape, value, dtype=dtype, device=device)
    # The tensor is then ready for any stream.
    torch.cuda.synchronize(device)
    return made


def is_traced(values: Tensor) -> bool:
    """Whether operations on ``values`` are traced; pinned memory cannot be compiled."""
    return is_fake(values) or isinstance(values, FunctionalTensor)
