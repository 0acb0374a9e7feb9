"""Fake tensors of a trace, which have shapes and dtypes but no memory."""

from __future__ import annotations

from threading import RLock

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

TRACING = RLock()
"""Held during capture and compilation, which change functions and settings of PyTorch for all threads. All
threads also share one stack of the modes for tracing above autograd, which calls on fake tensors set aside
for a moment. So those calls hold it too."""


def is_fake(value: object) -> bool:
    """Whether ``value`` is a tensor without memory, made while tracing."""
    return isinstance(value, FakeTensor)


def memory_of(tensor: Tensor) -> int | None:
    """An identifier of a tensor's memory; ``None`` for tensors of several pieces, such as sparse ones."""
    return tensor.untyped_storage()._cdata if tensor.layout is torch.strided else None


def let_go(mode: FakeTensorMode) -> None:
    """Drop a mode's references to real tensors, once its fake tensors are no longer needed.

    Its weak references would keep :func:`torch.utils.swap_tensors` from exchanging parameters. The mode
    itself may live until the collector runs, or forever, as the collector does not see the link from a view
    to its base.
    """
    described = mode.fake_tensor_converter.meta_converter.describer
    described.lookup_tensor.clear()
    described.lookup_storage.clear()
    if mode.shape_env is not None:
        mode.shape_env.tracked_fakes = None


_MOST_FAKES = 2**15
"""Results of calls on fake tensors that PyTorch may keep, 2 kB each."""


def bound_known_fakes() -> None:
    """Clear PyTorch's cache of results on fake tensors if it is large: each image size adds to it."""
    if len(FakeTensorMode.cache) > _MOST_FAKES:
        FakeTensorMode.cache_clear()
