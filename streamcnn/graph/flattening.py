"""Flattening: the calls of a forward pass as one flat graph of ATen operators.

The operators are recorded above autograd and autocast, so that a convolution is one call, a
``no_grad`` or ``autocast`` block is a pair of calls, and nothing is cast yet. Code that must stay
together (a user's ``autograd.Function``, ``torch.cond``, a hook on a gradient, a region under ``vmap``)
becomes one call of a :class:`Whole`.
"""

from __future__ import annotations

import linecache
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch._ops import HigherOrderOperator
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.amp.autocast_mode import _enter_autocast, _exit_autocast
from torch.autograd.grad_mode import _enter_inference_mode, _exit_inference_mode
from torch.fx import GraphModule, Interpreter
from torch.fx import Node as FxNode
from torch.fx import node as fx_node
from torch.fx import traceback as fx_traceback
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.graph_module import _loader

from streamcnn.errors import UnsupportedModel
from streamcnn.graph.func_stretches import nesting, with_stretches_folded
from streamcnn.graph.monkeypatches import is_replaced_method, under_its_own_name
from streamcnn.graph.recorded_function import RecordedFunction, num_results_wanted, with_first_results
from streamcnn.graph.schemas import names_a_collective
from streamcnn.graph.whole import Whole, hook_set, outline_of, record_whole

_INLINED = frozenset(
    {"tag_activation_checkpoint", "wrap_activation_checkpoint", "wrap", "hints_wrapper", "invoke_subgraph"}
)
"""Higher-order operators whose body is part of the forward pass: streaming decides itself what it keeps."""


SEEDING = ("manual_seed", "set_rng_state", "seed")
"""Functions of ``torch`` that set its generators."""
SEEDED = (
    "the forward pass sets PyTorch's random state (manual_seed, fork_rng): draw with the generators as they "
    "are, or seed outside of it"
)

DEFAULTS = ("set_default_dtype", "set_default_tensor_type")
"""Functions of ``torch`` that set the default dtype."""

RECOMPUTED = "recomputed"


class CannotFlatten(Exception):
    """The graph cannot represent everything that the forward pass does."""


def flatten(
    function: Callable[..., Any], inputs: Sequence[Tensor], mode: FakeTensorMode, *, grad: bool
) -> GraphModule:
    """Trace ``function`` of the fake tensors ``inputs`` into a flat graph; nothing is computed.

    ``grad`` says whether gradients are enabled at its start.
    """
    traced = make_fx(function, pre_dispatch=True, _allow_non_fake_inputs=True)
    with mode, fx_traceback.preserve_node_meta(), torch.set_grad_enabled(grad), _kept_if_unread():
        graph: GraphModule = traced(*inputs)
    _forget_source(graph)
    return graph


def _forget_source(module: GraphModule) -> None:
    """Drop the source of a graph's Python code, which is not run.

    torch.fx keeps it until the process ends, and some code is captured anew in each pass.
    """
    name = module.forward.__code__.co_filename
    _loader.eval_cache.pop(name, None)
    linecache.cache.pop(name, None)


UPDATING = frozenset({torch.ops.aten.batch_norm.default, torch.ops.aten.instance_norm.default})
"""Operators that update running statistics, which their schemas do not say."""


@contextmanager
def _kept_if_unread() -> Iterator[None]:
    """Keep calls with side effects in the graph, even if nothing reads their results."""
    added = (UPDATING | {hook_set}) - fx_node._side_effectful_functions
    fx_node._side_effectful_functions.update(added)
    try:
        yield
    finally:
        fx_node._side_effectful_functions.difference_update(added)


class Inliner(Interpreter):
    """Runs a captured graph, inlining bodies that are part of it and recording others whole."""

    def __init__(self, module: GraphModule, through: Callable[..., Any] | None = None) -> None:
        super().__init__(with_stretches_folded(module), garbage_collect_values=False)
        self._through = through
        """A function that returns its argument, which the capture itself calls."""
        self._node: FxNode | None = None

    def run_node(self, n: FxNode) -> Any:
        """Carry out one node."""
        self._node = n
        return super().run_node(n)

    def call_method(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Carry out a call of a tensor's method."""
        if is_replaced_method(str(target)):
            raise CannotFlatten(f"Tensor.{target} has been replaced")
        if target == "random_" and len(args) == 3 and not kwargs:
            return drawn_between(*args)
        return super().call_method(target, args, kwargs)

    def call_function(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Carry out a call: as it is, inlined, or recorded whole."""
        if target is self._through:
            return args[0]
        if target is torch._C._autograd._get_data_attr:  # type: ignore[attr-defined]
            return args[0].detach()
        if target in (_enter_inference_mode, _exit_inference_mode):
            return _inference_mode(target, args[0])
        if target in (_enter_autocast, _exit_autocast):
            return _autocast(target, *args)
        if getattr(target, "__name__", "") in SEEDING:
            raise UnsupportedModel(SEEDED)
        if getattr(target, "__name__", "") in DEFAULTS:
            raise CannotFlatten("operators are carried out under another default")
        if isinstance(target, Whole):
            assert self._node is not None
            return record_whole(target, args, self._node.meta["example_value"])
        if isinstance(target, HigherOrderOperator):
            return self._higher_order(target, args, kwargs)
        with under_its_own_name(target):
            return super().call_function(target, args, kwargs)

    def _higher_order(
        self, target: HigherOrderOperator, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        name, node = str(target), self._node
        assert node is not None
        if name in _INLINED:
            operands = args[2:] if name == "invoke_subgraph" else args[1:]
            if "checkpoint" in name:
                mark_recomputed(args[0])
            return Inliner(args[0], self._through).run(*operands)
        if name == "register_hook" or kwargs.get("dirty_idx"):
            raise CannotFlatten(f"{name}: its side effects are in no graph")
        bodies = tuple(arg for arg in args if isinstance(arg, GraphModule))
        if any(names_a_collective(outline_of(body)) for body in bodies):
            raise CannotFlatten(f"{name}: processes meet in it, and not all that it does backward is in it")
        operands = tuple(arg for arg in args if not isinstance(arg, GraphModule))
        if name == "autograd_function_apply":
            return _function(bodies, kwargs["non_differentiable_idx"], operands, node)
        is_body = tuple(isinstance(arg, GraphModule) for arg in args)
        whole = Whole(name, _bound(target, is_body, bodies, kwargs), bodies)
        return record_whole(whole, operands, node.meta["example_value"])


def drawn_between(tensor: Tensor, low: int, high: int) -> Tensor:
    """Replace ``tensor.random_(low, high)`` by operators that draw the same numbers.

    Its own overload is ``random_.from``, a name that generated code cannot have.
    """
    return tensor.copy_(torch.randint(low, high, tensor.shape, dtype=tensor.dtype, device=tensor.device))


def _inference_mode(target: Any, argument: Any) -> Any:
    """Record a block in inference mode as ``no_grad``, since its tensors are used outside."""
    before = torch.is_grad_enabled()
    torch._C._set_grad_enabled(not argument if target is _enter_inference_mode else argument)
    return before


def _autocast(target: Any, *args: Any) -> Any:
    """Enter an autocast block as the user does, so that it is both recorded and in force."""
    if target is _exit_autocast:
        args[0].__exit__(None, None, None)
        return None
    device, dtype, enabled, *_ = args
    block = torch.autocast(device, dtype=dtype, enabled=enabled, cache_enabled=False)
    block.__enter__()  # type: ignore[no-untyped-call]
    return block


def mark_recomputed(body: GraphModule) -> None:
    """Mark the calls of ``body`` as ones that activation checkpointing would run twice."""
    for node in body.graph.nodes:
        node.meta["custom"] = {**(node.meta.get("custom") or {}), RECOMPUTED: True}


def is_recomputed(node: FxNode) -> bool:
    """Whether activation checkpointing would run a call twice."""
    return bool((node.meta.get("custom") or {}).get(RECOMPUTED))


def _function(
    bodies: tuple[GraphModule, ...], constant: Sequence[int], operands: tuple[Any, ...], node: FxNode
) -> Any:
    """Record a call of the user's ``autograd.Function``; of its results, ``constant`` have no gradient."""
    forward, backward = bodies
    pair, like = (forward, backward), node.meta["example_value"]
    count = num_results_wanted(pair, node)
    if count is not None:
        pair, like = with_first_results(pair, count), like[:count]
        constant = [index for index in constant if index < count]
    whole = Whole("autograd_function_apply", partial(RecordedFunction.apply, pair, constant), pair)
    return record_whole(whole, operands, like)


def _bound(
    target: Callable[..., Any],
    is_body: tuple[bool, ...],
    bodies: tuple[GraphModule, ...],
    kwargs: dict[str, Any],
) -> Callable[..., Any]:
    """``target`` with its bodies bound, as a function of the other operands."""
    if str(target) == "cond":
        # The operator itself would be traced; this is its meaning.
        def cond(predicate: Any, operands: Any) -> Any:
            return bodies[0 if bool(predicate) else 1](*operands)

        return cond

    def run(*operands: Any) -> Any:
        remaining, given = iter(operands), iter(bodies)
        return target(*(next(given) if body else next(remaining) for body in is_body), **kwargs)

    return run


def is_plain(module: GraphModule) -> bool:
    """Whether no call of a captured graph has to be recorded whole."""
    has_bodies = any(isinstance(child, GraphModule) for child in module.children())
    return not has_bodies and not any(
        isinstance(node.target, Whole) or nesting(node) for node in module.graph.nodes
    )


def reads_values(target: object) -> bool:
    """Whether a call turns a tensor into a Python number: its value or its version."""
    values = (torch.ops.aten.item.default, torch.ops.aten._local_scalar_dense.default)
    # Registered when Dynamo first sees it.
    return target in values or str(target) == "prims._tensor_version.default"
