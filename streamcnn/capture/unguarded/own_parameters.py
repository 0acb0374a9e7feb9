"""A user's ``autograd.Function`` that is given parameters which it reads from their module as well.

Checkpointing by hand does so: its backward pass runs a layer again and asks for the gradients of the
parameters that were given, so these must be the ones that the layer holds. A streamed pass gives what stands
in for parameters; they take the parameters' places in the module while the function runs, either way.
Such a function may also ask PyTorch whether ``backward()`` was called, and not ``grad()``.
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
    """``cls.apply`` as a function, for calls with these ``arguments`` (args, kwargs), now in ``net``."""
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
            # Looked up when it runs: here it is another function's.
            return _with_own(cls, taken).apply(*args, **kwargs)

    return function


def _with_own(cls: Any, taken: Sequence[tuple[_Owner, Tensor]]) -> Any:
    """``cls`` with a backward pass during which what was given is in the module."""
    name = "backward" if cls.vjp is Function.vjp else "vjp"
    original = getattr(cls, name)

    def backward(ctx: Any, *gradients: Tensor) -> Any:
        with _in_place(taken), _called_by_backward():
            return original(ctx, *gradients)

    return type(cls)(cls.__name__, (cls,), {name: staticmethod(backward)})


@contextmanager
def _in_place(taken: Sequence[tuple[_Owner, Tensor]]) -> Iterator[None]:
    """A block in which tensors are in the places of their modules' parameters."""
    before = [(module, name, module._parameters[name]) for (module, name), _ in taken]
    try:
        for (module, name), tensor in taken:
            module._parameters[name] = tensor  # type: ignore[assignment]
        yield
    finally:
        for module, name, parameter in before:
            module._parameters[name] = parameter


class _ByBackward:
    """What PyTorch answers to functions that ask whether ``backward()`` was called."""

    lock = threading.Lock()
    num_blocks = 0
    """Blocks that are open in all threads."""
    original = staticmethod(torch.autograd._is_checkpoint_valid)
    here = threading.local()


def _is_by_backward() -> bool:
    return getattr(_ByBackward.here, "is_block", False) or _ByBackward.original()


@contextmanager
def _called_by_backward() -> Iterator[None]:
    """A block in which PyTorch says that ``backward()`` was called, to this thread.

    A pass differentiates its parts by ``grad()``, whatever the user has called. Passes run beside each other,
    unlike captures, so blocks of several threads may end in any order: the last one puts back what was there.
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
