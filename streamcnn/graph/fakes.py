"""Fake tensors: those of a trace, which have shapes and types and no memory."""

from __future__ import annotations

from threading import RLock

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

TRACING = RLock()
"""Held while something is captured or compiled: that changes functions and settings of PyTorch's for all
threads, and the modes under which it traces above autograd are one stack for all of them, which calls on fake
tensors set aside for a moment. So they are made with it held too."""


def is_fake(value: object) -> bool:
    """Whether ``value`` is a tensor without memory, made while tracing."""
    return isinstance(value, FakeTensor)


def memory_of(tensor: Tensor) -> int | None:
    """Which memory a tensor is in; ``None`` for one that is in several pieces, as sparse ones are."""
    return tensor.untyped_storage()._cdata if tensor.layout is torch.strided else None


def let_go(mode: FakeTensorMode) -> None:
    """Have a mode whose fake tensors are not needed any more forget what they stand for.

    Its weak references to parameters would keep :func:`torch.utils.swap_tensors` from exchanging them, and it
    may stay itself until the collector runs, or for ever: that does not see from a view to its base.
    """
    described = mode.fake_tensor_converter.meta_converter.describer
    described.lookup_tensor.clear()
    described.lookup_storage.clear()
    if mode.shape_env is not None:
        mode.shape_env.tracked_fakes = None


_MOST_FAKES = 2**15
"""Results of calls on fake tensors that PyTorch may keep, 2 kB each."""


def bound_known_fakes() -> None:
    """Have PyTorch forget what calls on fake tensors give, once that is much: each size adds to it."""
    if len(FakeTensorMode.cache) > _MOST_FAKES:
        FakeTensorMode.cache_clear()
