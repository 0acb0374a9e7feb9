"""Calls that a trace records whole: the pass carries them out as they are, on whole values."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import disable_proxy_modes_tracing
from torch.utils import _pytree as pytree

from streamcnn.graph.whole import Whole, record_whole
from streamcnn.support.sizes import is_size


def called_whole(
    name: str, function: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any], like: Any
) -> Any:
    """Record ``function(*args, **kwargs)`` as one call; return fake results like ``like``."""
    with disable_proxy_modes_tracing(), torch._C.DisableTorchFunction():
        like = pytree.tree_map_only(Tensor, Tensor.detach, like, is_leaf=is_size)
    leaves, spec = pytree.tree_flatten((args, dict(kwargs)), is_leaf=is_size)
    is_tensor = [isinstance(leaf, Tensor) for leaf in leaves]
    rest = [None if tensor else leaf for tensor, leaf in zip(is_tensor, leaves, strict=True)]

    def run_whole(*tensors: Tensor) -> Any:
        given = iter(tensors)
        filled: list[Any] = [
            next(given) if tensor else leaf for tensor, leaf in zip(is_tensor, rest, strict=True)
        ]
        run_args, run_kwargs = pytree.tree_unflatten(filled, spec)
        return _tensors_of(function(*run_args, **run_kwargs))

    given = tuple(leaf for leaf in leaves if isinstance(leaf, Tensor))
    recorded = record_whole(Whole(name, run_whole), given, _tensors_of(like))
    tensors = iter(pytree.tree_leaves(recorded))
    return pytree.tree_map_only(Tensor, lambda _: next(tensors), like, is_leaf=is_size)


def _tensors_of(results: Any) -> Any:
    """The tensors among a function's results, without numbers and texts."""
    leaves = pytree.tree_leaves(results)
    tensors = tuple(leaf for leaf in leaves if isinstance(leaf, Tensor))
    if len(tensors) == len(leaves):
        return results
    return tensors if len(tensors) != 1 else tensors[0]
