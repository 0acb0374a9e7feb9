"""Parameters and buffers of subclasses of Tensor.

To autograd, an ``nn.Parameter`` of a subclass is a view, and a buffer may be one. After ``.double()`` or
``tensor.data = other`` such a tensor has memory of its own, but still counts as a view of its former base.
PyTorch then fails to make a fake tensor of it. While a call is captured, it does not count as a view.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from streamcnn.errors import UnsupportedModel
from streamcnn.support.processes import all_processes

_IS_VIEW = Tensor._is_view


def has_own_functions(kind: type[Tensor]) -> bool:
    """Whether a subclass of Tensor overrides what PyTorch's functions do with it."""
    found: Any = kind.__torch_function__
    default: Any = Tensor.__torch_function__
    return found is not torch._C._disabled_torch_function_impl and (
        getattr(found, "__func__", None) is not default.__func__
    )


def refuse_own_functions(states: Mapping[str, Tensor]) -> None:
    """Refuse parameters and buffers, given by name, of a class that overrides PyTorch's functions.

    In plain PyTorch results are of that class too; in a captured forward pass they would not be. Wrappers
    around other tensors are allowed, as their results are not of their class.

    Raises
    ------
    UnsupportedModel
        If there are any.
    """
    for name, state in states.items():
        if has_own_functions(type(state)) and not is_traceable_wrapper_subclass(state):
            plain = f"{name.rpartition('.')[2]}.detach().as_subclass(torch.Tensor)"
            kind, plain = (
                ("parameter", f"nn.Parameter({plain})")
                if isinstance(state, nn.Parameter)
                else ("buffer", plain)
            )
            raise UnsupportedModel(
                f"{kind} '{name}' is of class {type(state).__name__}, whose __torch_function__ may change "
                "what any operator does with it or with a result of it: allowed are tensors of torch.Tensor "
                f"and of subclasses without one; put {plain} in its place, and what the class does into the "
                "forward pass"
            )


def refuse_without_shape(states: Mapping[str, Tensor]) -> None:
    """Refuse parameters and buffers of lazy modules that have not met an image; the error names the first.

    Plain PyTorch makes them within its first call, out of sight of whatever captures that call.

    Raises
    ------
    UnsupportedModel
        If there are any.
    """
    lazy = next((name for name, state in states.items() if is_lazy(state)), None)
    if lazy is not None:
        raise UnsupportedModel(
            f"'{lazy}' belongs to a lazy module and has no shape yet: allowed are modules whose tensors have "
            "one; call the plain module once on a small image, as in net(torch.rand(1, 3, 64, 64)), and make "
            "the optimiser after that"
        )


def refuse_shards(states: Mapping[str, Tensor]) -> None:
    """Refuse parameters that are divided among processes; the error names the first.

    Raises
    ------
    UnsupportedModel
        If there are any.
    """
    if all_processes() is None:
        return
    from torch.distributed.tensor import DTensor

    sharded = next((name for name, state in states.items() if isinstance(state, DTensor)), None)
    if sharded is not None:
        raise UnsupportedModel(
            f"'{sharded}' is a DTensor, of which each process has a part: allowed are modules with whole "
            "tensors; divide the streamed model, which has them whole while it runs, as in "
            "fully_shard(StreamingModel(net))"
        )


def without_left_bases(tensors: Iterable[Tensor]) -> AbstractContextManager[Any]:
    """Let tensors that no longer share memory with their base not count as views, for the block."""
    if not any(map(_has_left, tensors)):
        return nullcontext()
    here = threading.get_ident()

    def is_view(tensor: Tensor) -> bool:
        return _IS_VIEW(tensor) and not (threading.get_ident() == here and _has_left(tensor))

    return patch.object(Tensor, "_is_view", is_view)


def _has_left(tensor: Tensor) -> bool:
    """Whether a view has other memory than its base."""
    with torch._C.DisableTorchFunctionSubclass():
        base = tensor._base if _IS_VIEW(tensor) else None
        if base is None or {tensor.layout, base.layout} != {torch.strided}:
            return False
        return bool(tensor.untyped_storage()._cdata != base.untyped_storage()._cdata)
