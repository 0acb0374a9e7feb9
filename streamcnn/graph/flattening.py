"""Flattening: the calls of a forward pass as one flat graph of ATen operators.

The operators are recorded above autograd and autocast, so that a convolution is one call, a
``no_grad`` or ``autocast`` block is a pair of calls, and nothing is cast yet. What has a body of its own
that must stay together (a user's ``autograd.Function``, ``torch.cond``, a hook on a gradient, a region
under ``vmap``) becomes one call of a :class:`Whole`.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from threading import RLock
from typing import Any

import torch
from torch import Tensor
from torch._ops import HigherOrderOperator
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.amp.autocast_mode import _enter_autocast, _exit_autocast
from torch.autograd import forward_ad
from torch.autograd.grad_mode import _enter_inference_mode, _exit_inference_mode
from torch.fx import GraphModule, Interpreter
from torch.fx import Node as FxNode
from torch.fx import node as fx_node
from torch.fx import traceback as fx_traceback
from torch.fx.experimental.proxy_tensor import (
    disable_proxy_modes_tracing,
    get_proxy_mode,
    get_proxy_slot,
    make_fx,
    track_tensor_tree,
)
from torch.utils import _pytree as pytree

from streamcnn.errors import UnsupportedModel
from streamcnn.graph.func_stretches import leaves_stretch, nesting, stretches_of
from streamcnn.graph.schemas import names_a_collective

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
"""Functions of ``torch`` that say which type tensors get that are made without one."""

RECOMPUTED = "recomputed"

TRACING = RLock()
"""Held while something is captured or compiled: that changes functions and settings of PyTorch's for all
threads, and the modes under which it traces above autograd are one stack for all of them, which calls on fake
tensors set aside for a moment. So they are made with it held too."""


class CannotFlatten(Exception):
    """A graph does not hold all that the forward pass does."""


class Whole:
    """A call that is carried out as it is, on whole values, with the gradient that it defines itself."""

    def __init__(self, name: str, run: Callable[..., Any], bodies: tuple[GraphModule, ...] = ()) -> None:
        self.name = name
        self.run = run
        self.bodies = bodies
        self.like: Any = None
        """What it returned while tracing, on the meta device."""
        self.__name__ = name

    def __call__(self, *args: Any) -> Any:
        return self.run(*args)

    def __repr__(self) -> str:
        return self.name

    @property
    def outline(self) -> str:
        """What plans depend on: kinds of results, and the code of bodies but for values of numbers in it."""
        made = [f"{leaf.dtype}{tuple(leaf.shape)}" for leaf in pytree.tree_leaves(self.like)]
        return "\n".join([self.name, *made, *map(_outline, self.bodies)])


class OnlyResult:
    """A call of a :class:`Whole` that has one result, as that."""

    def __init__(self, whole: Whole) -> None:
        self.whole = whole
        self.__name__ = whole.name

    def __call__(self, *args: Any) -> Any:
        return self.whole(*args)[0]


def _outline(body: GraphModule) -> str:
    lines = []
    for node in body.graph.nodes:
        args, kwargs = pytree.tree_map(_without_number, (node.args, dict(node.kwargs)))
        inner = getattr(body, str(node.target), None) if node.op == "get_attr" else None
        lines.append(f"{node.name}={node.target}{args}{kwargs}")
        lines += [_outline(inner)] if isinstance(inner, GraphModule) else []
    return "\n".join(lines)


def _without_number(value: Any) -> Any:
    """A float that may change without a change of what the code does."""
    return "number" if isinstance(value, float) and value != 0 and math.isfinite(value) else value


class GradientHook(Whole):
    """Identity whose gradient passes through a hook that the user has set on the value."""

    def __init__(self, hook: Callable[[Tensor], Tensor | None], like: Tensor) -> None:
        super().__init__("Tensor.register_hook", self._hooked)
        self.hook = hook
        self.like = like

    def _hooked(self, value: Tensor) -> Tensor:
        hooked = value.view_as(value)
        if hooked.requires_grad:
            hooked.register_hook(self.hook)  # type: ignore[no-untyped-call]
        return hooked


def hook_set(value: Tensor) -> None:
    """Stands in a graph where a hook is set on the gradient of what a value holds then."""
    raise AssertionError("it marks a place, and is not called")


def record_hook(tensor: Tensor) -> str:
    """Record that a hook is set on the gradient of ``tensor``; the name of that call."""
    mode, proxy = get_proxy_mode(), proxy_of(tensor)
    assert mode is not None
    name: str = mode.tracer.create_proxy("call_function", hook_set, (proxy,), {}).node.name
    return name


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


def flatten(
    function: Callable[..., Any], inputs: Sequence[Tensor], mode: FakeTensorMode, *, grad: bool
) -> GraphModule:
    """The flat graph of ``function``, which takes the fake tensors ``inputs``; nothing is computed.

    ``grad`` says whether gradients are on where it begins.
    """
    traced = make_fx(function, pre_dispatch=True, _allow_non_fake_inputs=True)
    with mode, fx_traceback.preserve_node_meta(), torch.set_grad_enabled(grad), _kept_if_unread():
        graph: GraphModule = traced(*inputs)
    return graph


UPDATING = frozenset({torch.ops.aten.batch_norm.default, torch.ops.aten.instance_norm.default})
"""Operators that move statistics although their schemas do not say so."""


@contextmanager
def _kept_if_unread() -> Iterator[None]:
    """Keep calls in a graph that do something else than give a result that nobody reads."""
    added = (UPDATING | {hook_set}) - fx_node._side_effectful_functions
    fx_node._side_effectful_functions.update(added)
    try:
        yield
    finally:
        fx_node._side_effectful_functions.difference_update(added)


def record_whole(target: Whole, args: tuple[Any, ...], like: Any) -> Any:
    """Record one call of ``target`` in the graph that is being made; fake results that are like ``like``."""
    mode = get_proxy_mode()
    assert mode is not None
    tracer = mode.tracer

    def known(tensor: Tensor) -> Any:
        found = proxy_of(tensor)
        if found is None:
            raise UnsupportedModel(
                f"{target.name} takes a tensor that is no part of the forward pass: "
                "register it as a buffer or parameter, or pass it to the model"
            )
        return found

    proxies = pytree.tree_map_only(Tensor, known, args)
    target.like = pytree.tree_map_only(Tensor, on_meta, like)
    with disable_proxy_modes_tracing():
        results = pytree.tree_map_only(Tensor, lambda tensor: _another(tensor, tensor.device), like)
    proxy = tracer.create_proxy("call_function", target, tuple(proxies), {})
    # What this does with the results is no part of the forward pass.
    with torch._C.DisableTorchFunction():
        track_tensor_tree(results, proxy, constant=None, tracer=tracer)
    return results


def proxy_of(tensor: Tensor) -> Any:
    """What stands for a tensor in the graph that is being made; None if that does not know it.

    None is made while what runs whole is run.
    """
    mode = get_proxy_mode()
    return None if mode is None else proxy_in(mode.tracer, tensor)


def proxy_in(tracer: Any, tensor: Tensor) -> Any:
    """What stands for a tensor in the graph that ``tracer`` makes; None if that does not know it."""
    return get_proxy_slot(tensor, tracer, None, lambda tracked: tracked.proxy)


def on_meta(tensor: Tensor) -> Tensor:
    """A tensor like ``tensor`` on the meta device, which no mode sees being made."""
    with beside_the_trace():
        return _another(tensor, "meta")


@contextmanager
def beside_the_trace() -> Iterator[None]:
    """A block whose tensors have values, and of which nothing is recorded."""
    with disable_proxy_modes_tracing(), unset_fake_temporarily():
        yield


def _another(tensor: Tensor, device: torch.device | str) -> Tensor:
    return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=device)


class Inliner(Interpreter):
    """Runs a captured graph, inlining bodies that are part of it and recording others whole."""

    def __init__(self, module: GraphModule, through: Callable[..., Any] | None = None) -> None:
        super().__init__(_with_stretches_folded(module), garbage_collect_values=False)
        self._through = through
        """A function of the capture itself that stands for its argument."""
        self._node: FxNode | None = None

    def run_node(self, n: FxNode) -> Any:
        """Carry out one node."""
        self._node = n
        return super().run_node(n)

    def call_method(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Carry out a call of a tensor's method."""
        if target == "random_" and len(args) == 3 and not kwargs:
            return drawn_between(*args)
        return super().call_method(target, args, kwargs)

    def call_function(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Carry out a call: an ordinary one, an inlined one, or one that is recorded whole."""
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
        if any(names_a_collective(_outline(body)) for body in bodies):
            raise CannotFlatten(f"{name}: processes meet in it, and not all that it does backward is in it")
        operands = tuple(arg for arg in args if not isinstance(arg, GraphModule))
        is_body = tuple(isinstance(arg, GraphModule) for arg in args)
        whole = Whole(name, _bound(target, is_body, bodies, kwargs), bodies)
        return record_whole(whole, operands, node.meta["example_value"])


def drawn_between(tensor: Tensor, low: int, high: int) -> Tensor:
    """``tensor.random_(low, high)``, which draws the same numbers.

    Its own overload is ``random_.from``, which no code of a graph can name.
    """
    return tensor.copy_(torch.randint(low, high, tensor.shape, dtype=tensor.dtype, device=tensor.device))


def _inference_mode(target: Any, argument: Any) -> Any:
    """A block in inference mode, as one without gradients: its tensors are used outside of it."""
    before = torch.is_grad_enabled()
    torch._C._set_grad_enabled(not argument if target is _enter_inference_mode else argument)
    return before


def _autocast(target: Any, *args: Any) -> Any:
    """A block under autocast. Entered as the user would, it is recorded and in force."""
    if target is _exit_autocast:
        args[0].__exit__(None, None, None)
        return None
    device, dtype, enabled, *_ = args
    block = torch.autocast(device, dtype=dtype, enabled=enabled, cache_enabled=False)
    block.__enter__()  # type: ignore[no-untyped-call]
    return block


def mark_recomputed(body: GraphModule) -> None:
    """Note on the calls of ``body`` that activation checkpointing would run them twice."""
    for node in body.graph.nodes:
        node.meta["custom"] = {**(node.meta.get("custom") or {}), RECOMPUTED: True}


def is_recomputed(node: FxNode) -> bool:
    """Whether activation checkpointing would run a call twice."""
    return bool((node.meta.get("custom") or {}).get(RECOMPUTED))


def _bound(
    target: Callable[..., Any],
    is_body: tuple[bool, ...],
    bodies: tuple[GraphModule, ...],
    kwargs: dict[str, Any],
) -> Callable[..., Any]:
    """``target`` with its bodies in their places, as a function of the other operands."""
    if str(target) == "cond":
        # Called as an operator it would be traced; what it means is this.
        def cond(predicate: Any, operands: Any) -> Any:
            return bodies[0 if bool(predicate) else 1](*operands)

        return cond

    def run(*operands: Any) -> Any:
        remaining, given = iter(operands), iter(bodies)
        return target(*(next(given) if body else next(remaining) for body in is_body), **kwargs)

    return run


# --- regions under vmap ----------------------------------------------------------------------------------


def _with_stretches_folded(module: GraphModule) -> GraphModule:
    """``module`` with each stretch of calls under a functorch transform as one call."""
    nodes = list(module.graph.nodes)
    if not any(nesting(node) > 0 for node in nodes):
        return module
    graph = torch.fx.Graph()
    copies: dict[FxNode, FxNode] = {}
    stretches = stretches_of(nodes)
    for node in nodes:
        stretch = stretches.get(node)
        if stretch is None:
            copies[node] = graph.node_copy(node, copies.__getitem__)
        elif node is stretch.own[-1]:
            given = [each for each in stretch.own if leaves_stretch(each, stretches)]
            _fold(module, stretch.nodes, given, graph, copies)
    return GraphModule(module, graph)


def is_plain(module: GraphModule) -> bool:
    """Whether all calls of a captured graph are recorded as what they compute, none as it is, whole."""
    has_bodies = any(isinstance(child, GraphModule) for child in module.children())
    return not has_bodies and not any(
        isinstance(node.target, Whole) or nesting(node) for node in module.graph.nodes
    )


def _fold(
    module: GraphModule,
    stretch: Sequence[FxNode],
    given: Sequence[FxNode],
    graph: torch.fx.Graph,
    copies: dict[FxNode, FxNode],
) -> None:
    """Add one call of all of ``stretch`` to ``graph``, and the values that it gives."""
    inside = set(stretch)
    taken = dict.fromkeys(n for node in stretch for n in node.all_input_nodes if n not in inside)
    body = torch.fx.Graph()
    inner = {node: body.placeholder(node.name) for node in taken if node.op != "get_attr"}
    for node in taken:
        if node.op == "get_attr":
            inner[node] = body.node_copy(node)
    for node in stretch:
        inner[node] = body.node_copy(node, inner.__getitem__)
    body.output(tuple(inner[node] for node in given))
    operands = tuple(copies[node] for node in taken if node.op != "get_attr")
    whole = Whole("torch.func", _with_tangents(GraphModule(module, body)))
    call = graph.call_function(whole, operands)
    call.meta.update(stretch[0].meta)
    call.meta["example_value"] = tuple(node.meta["example_value"] for node in given)
    for index, node in enumerate(given):
        copies[node] = graph.call_function(operator.getitem, (call, index))
        copies[node].meta.update(node.meta)


def _with_tangents(body: GraphModule) -> Callable[..., Any]:
    """``body`` with forward-mode differentiation on, as it is where the user calls it and not in a pass."""

    def run(*operands: Any) -> Any:
        with forward_ad._set_fwd_grad_enabled(True):
            return body(*operands)

    return run


# --- fake tensors ----------------------------------------------------------------------------------------


def reads_values(target: object) -> bool:
    """Whether a call makes a Python number of a tensor: its value, or how often it was overwritten."""
    values = (torch.ops.aten.item.default, torch.ops.aten._local_scalar_dense.default)
    # Registered when Dynamo meets it first.
    return target in values or str(target) == "prims._tensor_version.default"


def is_fake(value: object) -> bool:
    """Whether ``value`` is a tensor without memory, made while tracing."""
    return isinstance(value, FakeTensor)


def memory_of(tensor: Tensor) -> int | None:
    """Which memory a tensor is in; ``None`` for one that is in several pieces, as sparse ones are."""
    return tensor.untyped_storage()._cdata if tensor.layout is torch.strided else None
