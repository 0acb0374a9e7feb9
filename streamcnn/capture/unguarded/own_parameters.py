"""A user's ``autograd.Function`` that gets parameters as arguments and also reads them from their module.

Checkpointing by hand does so: its backward pass runs a layer again and asks for the gradients of the
parameters that it was given, so the layer must hold those. A streamed pass gives the function stand-ins for
parameters. We put them into the module while the function runs, forward and backward. Such a function may
also ask PyTorch whether ``backward()`` was called rather than ``grad()``.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.utils import _pytree as pytree

_Owner = tuple[nn.Module, str]


def caller_of(net: nn.Module, cls: Any, arguments: Any) -> Callable[..., Any]:
    """``cls.apply`` as a function that puts its arguments in the places of parameters of ``net``.

    ``arguments`` (args, kwargs) of the present call tell which of them are parameters."""
    owners: dict[int, list[_Owner]] = {}
    for module in net.modules():
        for name, parameter in module._parameters.items():
            owners.setdefault(id(parameter), []).append((module, name))
    leaves = pytree.tree_leaves(arguments)
    places = [
        (place, owners[id(leaf)])
        for place, leaf in enumerate(leaves)
        if isinstance(leaf, Tensor) and id(leaf) in owners
    ]

    def function(*args: Any, **kwargs: Any) -> Any:
        given = pytree.tree_leaves((args, kwargs)) if places else []
        taken = [(owner, given[place]) for place, found in places for owner in found]
        with _in_place(taken):
            # ``apply`` is looked up when this runs, as it is replaced during capture.
            return _with_own(cls, taken).apply(*args, **kwargs)

    return function


def _with_own(cls: Any, taken: Sequence[tuple[_Owner, Tensor]]) -> Any:
    """``cls`` with a backward pass during which the modules hold the given tensors."""
    name = "backward" if cls.vjp is Function.vjp else "vjp"
    original = getattr(cls, name)

    def backward(ctx: Any, *gradients: Tensor) -> Any:
        with _in_place(taken), _called_by_backward():
            return original(ctx, *gradients)

    return type(cls)(cls.__name__, (cls,), {name: staticmethod(backward)})


@contextmanager
def _in_place(taken: Sequence[tuple[_Owner, Tensor]]) -> Iterator[None]:
    """Put tensors in the places of their modules' parameters, for the block."""
    before = [(module, name, module._parameters[name]) for (module, name), _ in taken]
    try:
        for (module, name), tensor in taken:
            module._parameters[name] = tensor  # type: ignore[assignment]
        yield
    finally:
        for module, name, parameter in before:
            module._parameters[name] = parameter


class _ByBackward:
    """State of the replaced function by which PyTorch tells whether ``backward()`` was called."""

    lock = threading.Lock()
    num_blocks = 0
    """Number of open blocks in all threads."""
    original = staticmethod(torch.autograd._is_checkpoint_valid)
    here = threading.local()


def _is_by_backward() -> bool:
    return getattr(_ByBackward.here, "is_block", False) or _ByBackward.original()


@contextmanager
def _called_by_backward() -> Iterator[None]:
    """Let PyTorch tell this thread, for the block, that ``backward()`` was called.

    A pass differentiates its parts by ``grad()``, whatever the user has called. Unlike captures, passes run
    in parallel, so blocks of several threads may end in any order: the last one restores the original
    function.
    """
    with _ByBackward.lock:
        _ByBackward.num_blocks += 1
        torch.autograd._is_checkpoint_valid = _is_by_backward
    outer, _ByBackward.here.is_block = getattr(_ByBackward.here, "is_block", False), True
    try:
        yield
    finally:
        _ByBackward.here.is_block = outer
        with _ByBackward.lock:
            _ByBackward.num_blocks -= 1
            if not _ByBackward.num_blocks:
                torch.autograd._is_checkpoint_valid = _ByBackward.original
