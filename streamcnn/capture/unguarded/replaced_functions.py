"""Replacements for PyTorch functions while a forward pass runs on fake tensors.

The user's ``autograd.Function`` is recorded whole, since it defines its own backward pass. Calls under
activation checkpointing are recorded as ordinary calls. Functions that cannot be followed are refused.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from itertools import takewhile
from typing import Any
from weakref import WeakSet

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import graph as autograd_graph
from torch.autograd.function import FunctionCtx
from torch.autograd.graph import saved_tensors_hooks
from torch.fx import Graph
from torch.fx import traceback as fx_traceback
from torch.fx.experimental.proxy_tensor import disable_proxy_modes_tracing, get_proxy_mode
from torch.utils import _pytree as pytree
from torch.utils import checkpoint
from torch.utils._python_dispatch import TorchDispatchMode

from streamcnn.capture.lines import called_by_user
from streamcnn.capture.refused_functions import refuse_address, refuse_multi_grad_hook
from streamcnn.capture.replacing import replaced_here
from streamcnn.capture.unguarded.blind import gaussian_nll_loss, observers_blind
from streamcnn.capture.unguarded.function_effects import nothing_changed
from streamcnn.capture.unguarded.own_parameters import caller_of
from streamcnn.capture.unguarded.whole_calls import called_whole
from streamcnn.errors import UnsupportedModel
from streamcnn.graph.fakes import is_fake
from streamcnn.graph.flattening import DEFAULTS, RECOMPUTED, SEEDED, SEEDING
from streamcnn.graph.whole import beside_the_trace
from streamcnn.support.sizes import is_size


@contextmanager
def functions_replaced(
    net: nn.Module,
    traced: Callable[[Tensor], Tensor],
    noting: Callable[[Callable[..., Any]], Callable[..., Any]],
    forget: Callable[[Exception], None],
) -> Iterator[None]:
    """Replace them for this thread and the block, in which ``net`` is traced.

    ``traced`` gives the stand-in for a tensor, also for one from outside. ``noting`` wraps functions that may
    refuse a call, and ``forget`` is called with errors to ignore.
    """
    with (
        replaced_here(torch.autograd.Function, "apply", noting(partial(_apply, net, traced))),
        replaced_here(FunctionCtx, "mark_dirty", noting(_refuse_dirty)),
        replaced_here(F, "gaussian_nll_loss", gaussian_nll_loss),
        observers_blind(forget),
        replaced_here(nn.Module, "_apply", noting(_change_layer)),
        replaced_here(torch, "from_numpy", _from_numpy),
        replaced_here(Tensor, "as_subclass", _as_subclass),
        replaced_here(saved_tensors_hooks, "__enter__", noting(_enter_saved_tensors_hooks)),
        replaced_here(TorchDispatchMode, "__enter__", noting(_enter_dispatch_mode)),
        replaced_here(autograd_graph, "register_multi_grad_hook", noting(refuse_multi_grad_hook)),
        replaced_here(checkpoint, "_checkpoint_without_reentrant_generator", _without_reentry),
        replaced_here(torch.UntypedStorage, "data_ptr", noting(_address)),
        replaced_here(torch.TypedStorage, "data_ptr", noting(_address_of_typed)),
        ExitStack() as functions,
    ):
        for module in (torch, torch.random):
            for name in SEEDING:
                functions.enter_context(replaced_here(module, name, noting(_refuse_seed)))
        for name in DEFAULTS:
            functions.enter_context(replaced_here(torch, name, noting(_refuse_default)))
        yield


_ADDRESS = torch.UntypedStorage.data_ptr


def _address(storage: torch.UntypedStorage) -> int:
    """``storage.data_ptr()``, which of all that is traced is 0."""
    if storage.device.type == "meta" and called_by_user():
        refuse_address()
    return _ADDRESS(storage)


def _address_of_typed(storage: torch.TypedStorage) -> int:
    return _address(storage._untyped_storage)


def _refuse_seed(*args: Any, **kwargs: Any) -> None:
    raise UnsupportedModel(SEEDED)


def _refuse_default(*args: Any) -> None:
    """Operators run after capture, with the default dtype of that time, so the pass cannot change it."""
    raise UnsupportedModel(
        "the forward pass sets the default dtype (set_default_dtype): set it outside, or give dtype= where "
        "tensors are made"
    )


_ENTER = saved_tensors_hooks.__enter__


def _enter_saved_tensors_hooks(hooks: saved_tensors_hooks) -> None:
    """Enter a block of hooks on saved tensors if they are PyTorch's own, which return what they get."""
    if not type(hooks).__module__.startswith("torch.") or type(hooks) is saved_tensors_hooks:
        raise UnsupportedModel(
            "the forward pass sets hooks on what autograd saves (saved_tensors_hooks), and a streamed pass "
            "saves other things: use an autograd.Function for a gradient that is computed from other values; "
            "streaming keeps no activations that need to be packed"
        )
    _ENTER(hooks)


_ENTER_MODE = TorchDispatchMode.__enter__


def _enter_dispatch_mode(mode: TorchDispatchMode) -> Any:
    """Enter a mode that sees operators if it is PyTorch's own; the user's would see those of the trace."""
    kind = type(mode)
    if kind.__module__.partition(".")[0] != torch.__name__:
        raise UnsupportedModel(
            f"the forward pass enters {kind.__name__}, a TorchDispatchMode, which would see the operators of "
            "a trace: enter it around the call of the model"
        )
    return _ENTER_MODE(mode)  # type: ignore[no-untyped-call]


_CHANGE_LAYER = nn.Module._apply


def _change_layer(layer: nn.Module, change: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
    """``layer.to()`` and the like if they change nothing; else they would leave it with fake tensors."""
    for tensor in (*layer.parameters(), *layer.buffers()):
        changed = change(tensor)
        if (changed.dtype, changed.device) != (tensor.dtype, tensor.device):
            raise UnsupportedModel(
                "the forward pass makes or moves layers with parameters (Module.to): do so outside of it"
            )
    changed_layer: nn.Module = _CHANGE_LAYER(layer, change, recurse)  # type: ignore[no-untyped-call]
    return changed_layer


_FROM_NUMPY = torch.from_numpy


def _from_numpy(array: Any) -> Tensor:
    """``torch.from_numpy`` beside the trace, so that its result shares the array's memory."""
    with beside_the_trace():
        return _FROM_NUMPY(array)


_AS_SUBCLASS = Tensor.as_subclass


def _as_subclass(tensor: Tensor, cls: type[Tensor]) -> Tensor:
    """``tensor.as_subclass(cls)``; as a plain tensor, a view of the same memory."""
    if cls is not Tensor or not is_fake(tensor):
        return _AS_SUBCLASS(tensor, cls)
    viewed: Tensor = torch.ops.aten.alias.default(tensor)
    return viewed


def _refuse_dirty(ctx: Any, *tensors: Tensor) -> None:
    raise UnsupportedModel(
        f"{type(ctx)._forward_cls.__name__} changes its input in place (mark_dirty): "
        "return a new tensor instead"
    )


_APPLY = vars(torch.autograd.Function)["apply"]
_inner: WeakSet[type[torch.autograd.Function]] = WeakSet()
"""Functions that differentiate custom operators; the operators themselves are recorded."""


def refuse_bound(values: Any) -> None:
    """Refuse results of an ``apply`` that the code bound before the pass, which bypasses our own."""
    for leaf in pytree.tree_leaves(values):
        cls = getattr(leaf.grad_fn, "_forward_cls", None) if isinstance(leaf, Tensor) else None
        if cls is not None and cls not in _inner:
            raise UnsupportedModel(
                f"the forward pass calls the apply of {cls.__name__} by another name, and holds code that "
                "can only be captured without values: write .apply(...) where it is called"
            )


def _apply(net: nn.Module, traced: Callable[[Tensor], Tensor], cls: Any, *args: Any, **kwargs: Any) -> Any:
    """``autograd.Function.apply`` while tracing: record one call that runs the function whole."""
    if cls is checkpoint.CheckpointFunction:
        run, _, *operands = args
        with _recomputed():
            return run(*operands)
    original = _APPLY.__get__(None, cls)
    mode = get_proxy_mode()
    if mode is None:
        _inner.add(cls)
        return original(*args, **kwargs)
    refuse_bound((args, kwargs))
    args, kwargs = pytree.tree_map_only(Tensor, traced, (args, kwargs), is_leaf=is_size)
    unrecorded = _nothing_recorded(mode.tracer.graph)
    with unrecorded, disable_proxy_modes_tracing(), nothing_changed(net, cls):
        like = original(*args, **kwargs)
    return called_whole(cls.__name__, caller_of(net, cls, (args, kwargs)), args, kwargs, like)


@contextmanager
def _nothing_recorded(graph: Graph) -> Iterator[None]:
    """Remove from ``graph`` what is recorded in the block: entering and leaving of ``no_grad`` and the like.

    These are recorded even when operators are not. Leaving ``no_grad`` in a Function's forward, where
    gradients are off already, would leave them off for the rest of the pass.
    """
    last = next(iter(reversed(graph.nodes)))
    yield
    for node in list(takewhile(lambda node: node is not last, reversed(graph.nodes))):
        graph.erase_node(node)


@contextmanager
def _recomputed() -> Iterator[None]:
    """Mark each call recorded in the block as one that activation checkpointing would run twice."""
    before = fx_traceback.current_meta.get("custom")
    fx_traceback.current_meta["custom"] = {RECOMPUTED: True}
    try:
        yield
    finally:
        fx_traceback.current_meta["custom"] = before


def _without_reentry(*args: Any, **kwargs: Any) -> Iterator[None]:
    """PyTorch's checkpointing without its recomputation."""
    with _recomputed():
        yield
