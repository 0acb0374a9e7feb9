"""Capture anew at each pass, for forward passes with code that cannot be guarded.

The user's Python runs on fake tensors at each call of the model, and its operators are recorded. So printing,
random numbers and counters work as in plain PyTorch, and nothing that the code reads can be out of date. A
fake tensor that it leaves in an attribute, or in a list, dict or tuple there, is replaced by the real one
after the pass. If one is found anywhere else, the pass is refused, and the module restored.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from streamcnn.capture.capture import RawGraph, named_arguments, outside_key
from streamcnn.capture.flat.functional import functionalized
from streamcnn.capture.unguarded.leftovers import Snapshot, entries, refuse_backward_hooks, refuse_remaining
from streamcnn.capture.unguarded.traced_call import TracedCall
from streamcnn.capture.unguarded.watch import is_plain_tensor
from streamcnn.graph.fakes import let_go
from streamcnn.graph.flattening import flatten


@dataclass(frozen=True, slots=True)
class Capture:
    """One captured call of a module."""

    graph: RawGraph
    states: Mapping[str, Tensor]
    result: Callable[[Sequence[Any]], Any]
    """Makes the module's return value from the results of the graph."""
    undo: Callable[[], None]
    """Restores the module's attributes to what they were before the call."""


def capture_anew(net: nn.Module, image: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Capture:
    """Capture ``net(image, *args, **kwargs)`` by running it on fake tensors; ``image`` is a stand-in.

    Raises
    ------
    UnsupportedModel
        If the forward pass cannot be followed, or leaves a tensor without values behind; the module is
        then as it was.
    """
    refuse_backward_hooks(net)
    before = Snapshot(net, (*args, *kwargs.values()))
    try:
        capture, traced, flags = _traced(net, image, args, kwargs, before)
        before.refuse_fakes()
        refuse_remaining(traced)
        flags.set()
    except BaseException:
        before.restore()
        raise
    return capture


@dataclass(frozen=True, slots=True)
class _Flags:
    """The states whose ``requires_grad`` the forward pass has changed, with the new values."""

    wanted: tuple[tuple[Tensor, bool], ...]

    def set(self) -> None:
        """Apply the changes to the states."""
        for state, flag in self.wanted:
            state.requires_grad_(flag)

    def undo(self) -> None:
        """Undo the changes."""
        for state, flag in self.wanted:
            state.requires_grad_(not flag)


def _traced(
    net: nn.Module, image: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any], before: Snapshot
) -> tuple[Capture, list[weakref.ref[Tensor]], _Flags]:
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    try:
        return _traced_in(mode, net, image, args, kwargs, before)
    finally:
        let_go(mode)


def _traced_in(
    mode: FakeTensorMode,
    net: nn.Module,
    image: Tensor,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    before: Snapshot,
) -> tuple[Capture, list[weakref.ref[Tensor]], _Flags]:
    states = _states(net, args, kwargs)
    with mode:
        like = torch.empty(image.shape, dtype=image.dtype, device=image.device)
        like.requires_grad_(image.requires_grad)
        vars(like).update(vars(image))
    call = TracedCall(net, args, kwargs, states, mode)
    grad = torch.is_grad_enabled()
    inputs = [like, *(_stand_in_for(tensor, mode) for tensor in states.values())]
    flat = flatten(call.on(tuple(states)), inputs, mode, grad=grad)
    graph = functionalized(
        flat,
        (None, *states),
        tuple(image.shape),
        grad=grad,
        device=image.device,
        path_of=str,
        hooks={name: hook for name, hook in call.noted.hooks.items() if hook.is_set},
    )
    constants = {
        node.target: getattr(flat, node.target) for node in flat.graph.nodes if node.op == "get_attr"
    }
    outside = {
        key: constant for name, constant in constants.items() if (key := outside_key(name)) in graph.updates
    }
    wanted = ((states[key], flag) for key, flag in call.flags.items())
    flags = _Flags(tuple((state, flag) for state, flag in wanted if state.requires_grad != flag))

    def undo() -> None:
        before.restore()
        flags.undo()

    graph = replace(graph, marks_image=call.noted.marks_image)
    # A stand-in for a state must not stay either, in the closure of a hook for example.
    traced = [*call.noted.made, *map(weakref.ref, inputs)]
    return Capture(graph, {**states, **outside}, call.result, undo), traced, flags


def _stand_in_for(tensor: Tensor, mode: FakeTensorMode) -> Tensor:
    """A fake tensor for ``tensor``, with the attributes that the user has set on it."""
    fake = mode.from_tensor(tensor)
    if is_plain_tensor(tensor):
        vars(fake).update(vars(tensor))
    return fake


def _states(net: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Tensor]:
    """All tensors that a call may read, each once, by key: states, arguments and plain attributes."""
    found: dict[int, tuple[str, Tensor]] = {}
    for name, tensor in (*net.named_parameters(), *net.named_buffers()):
        found.setdefault(id(tensor), (name, tensor))
    for name, tensor in named_arguments((args, kwargs)):
        found.setdefault(id(tensor), (name, tensor))
    for _, key, value in entries(net):
        if isinstance(value, Tensor):
            found.setdefault(id(value), (f"attribute {key} ({len(found)})", value))
    return dict(found.values())
