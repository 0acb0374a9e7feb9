"""Calls that run whole: as they are, on whole values. Also their recording in a graph."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import unset_fake_temporarily
from torch.fx import GraphModule
from torch.fx.experimental.proxy_tensor import (
    disable_proxy_modes_tracing,
    get_proxy_mode,
    get_proxy_slot,
    track_tensor_tree,
)
from torch.utils import _pytree as pytree

from streamcnn.errors import UnsupportedModel


class Whole:
    """A call that runs as it is, on whole values, with the gradient that it defines itself."""

    def __init__(self, name: str, run: Callable[..., Any], bodies: tuple[GraphModule, ...] = ()) -> None:
        self.name = name
        self.run = run
        self.bodies = bodies
        self.like: Any = None
        """The results of tracing, as meta tensors."""
        self.__name__ = name

    def __call__(self, *args: Any) -> Any:
        return self.run(*args)

    def __repr__(self) -> str:
        return self.name

    @property
    def outline(self) -> str:
        """What plans depend on: shapes and dtypes of results, and the bodies' code without its floats."""
        made = [f"{leaf.dtype}{tuple(leaf.shape)}" for leaf in pytree.tree_leaves(self.like)]
        return "\n".join([self.name, *made, *map(outline_of, self.bodies)])


class OnlyResult:
    """A call of a :class:`Whole` that returns its only result itself.

    On whole operands, its forward pass saves ``saved_bytes`` beside them.
    """

    def __init__(self, whole: Whole, saved_bytes: int = 0) -> None:
        self.whole = whole
        self.saved_bytes = saved_bytes
        self.__name__ = whole.name

    def __call__(self, *args: Any) -> Any:
        return self.whole(*args)[0]


def outline_of(body: GraphModule) -> str:
    """The code of a body as text, without the values of floats."""
    lines = []
    for node in body.graph.nodes:
        args, kwargs = pytree.tree_map(_without_number, (node.args, dict(node.kwargs)))
        inner = getattr(body, str(node.target), None) if node.op == "get_attr" else None
        lines.append(f"{node.name}={node.target}{args}{kwargs}")
        lines += [outline_of(inner)] if isinstance(inner, GraphModule) else []
    return "\n".join(lines)


def _without_number(value: Any) -> Any:
    """A placeholder for a float whose value does not change what the code does; else ``value``."""
    return "number" if isinstance(value, float) and value != 0 and math.isfinite(value) else value


class GradientHook(Whole):
    """Identity whose gradient passes through a hook of the user's."""

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
    """Marks the place in a graph where a hook is set on the gradient of a value; never called."""
    raise AssertionError("it marks a place, and is not called")


def record_hook(tensor: Tensor) -> str:
    """Record that a hook is set on the gradient of ``tensor``; return the name of the recorded call."""
    mode, proxy = get_proxy_mode(), proxy_of(tensor)
    assert mode is not None
    name: str = mode.tracer.create_proxy("call_function", hook_set, (proxy,), {}).node.name
    return name


def record_whole(target: Whole, args: tuple[Any, ...], like: Any) -> Any:
    """Record one call of ``target`` in the graph being traced; return fake results like ``like``."""
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
    # This is not part of the forward pass.
    with torch._C.DisableTorchFunction():
        track_tensor_tree(results, proxy, constant=None, tracer=tracer)
    return results


def proxy_of(tensor: Tensor) -> Any:
    """The proxy of a tensor in the graph being traced; None if there is none.

    While a function runs whole, no graph is traced.
    """
    mode = get_proxy_mode()
    return None if mode is None else proxy_in(mode.tracer, tensor)


def proxy_in(tracer: Any, tensor: Tensor) -> Any:
    """The proxy of a tensor in the graph that ``tracer`` makes; None if there is none."""
    return get_proxy_slot(tensor, tracer, None, lambda tracked: tracked.proxy)


def on_meta(tensor: Tensor) -> Tensor:
    """A tensor like ``tensor`` on the meta device, created without any mode seeing it."""
    with beside_the_trace():
        return _another(tensor, "meta")


@contextmanager
def beside_the_trace() -> Iterator[None]:
    """Run a block on real tensors while tracing, without recording it."""
    with disable_proxy_modes_tracing(), unset_fake_temporarily():
        yield


def _another(tensor: Tensor, device: torch.device | str) -> Tensor:
    return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=device)
