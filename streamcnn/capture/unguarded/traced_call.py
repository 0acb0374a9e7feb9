"""One call of the user's module as a function of tensors, traced on fake tensors.

Stand-ins replace the module's own tensors during the call. Tensors that the call leaves in the module's
attributes are taken out until their values are known.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import traceback as fx_traceback
from torch.nn.modules import module as module_hooks
from torch.nn.utils.stateless import _reparametrize_module
from torch.utils import _pytree as pytree

from streamcnn.capture.capture import module_states
from streamcnn.capture.refusals import is_of_script
from streamcnn.capture.results import taken_apart
from streamcnn.capture.scripts import ScriptedAttributes
from streamcnn.capture.unguarded.known_values import KnownValues
from streamcnn.capture.unguarded.leftovers import (
    CONTAINERS,
    Place,
    containers_in,
    entries,
    entries_of,
    places_of_fakes,
    refuse_new_leaves,
    refuse_new_parameters,
    refuse_scripted_tensors,
)
from streamcnn.capture.unguarded.replaced_functions import functions_replaced, refuse_bound
from streamcnn.capture.unguarded.watch import Noted, Watch
from streamcnn.graph.whole import proxy_of
from streamcnn.support.sizes import is_size


class TracedCall:
    """A call of ``net`` that reads ``states``, by key; :meth:`on` gives the function to trace, once."""

    def __init__(
        self,
        net: nn.Module,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        states: Mapping[str, Tensor],
        mode: FakeTensorMode,
    ) -> None:
        self.net = net
        self.arguments = (args, kwargs)
        self.containers = containers_in((*args, *kwargs.values()))
        """Lists and dicts among the arguments."""
        self._filled: list[Any] = []
        """The module's containers into which stand-ins were put."""
        self._given: dict[int, tuple[Any, Any]] = {}
        """Stand-ins in containers among the arguments, with the originals, by ``id`` of the stand-in."""
        self.states = states
        self.mode = mode
        self.keys = {id(tensor): key for key, tensor in states.items()}
        self.noted = Noted()
        self.places: list[Place] = []
        """Places in the module that keep tensors of the forward pass."""
        self.exchanged: list[tuple[dict[str, Any], str, Tensor | None]] = []
        """Parameters and buffers that the forward pass has replaced by other states, or by None."""
        self.flags: dict[str, bool] = {}
        """Whether states require gradients at the end, by key."""
        self.rebuild: Callable[[Sequence[Any]], Any] | None = None

    def _exchanged(
        self, own: Mapping[str, Tensor], fakes: Mapping[str, Tensor]
    ) -> list[tuple[dict[str, Any], str, Tensor | None]]:
        """Registry, name and present state of parameters and buffers that are not ``own``, the stand-ins."""
        real = {id(fake): self.states[key] for key, fake in fakes.items()}
        found: list[tuple[dict[str, Any], str, Tensor | None]] = []
        for prefix, module in self.net.named_modules(remove_duplicate=False):
            for registry in (module._parameters, module._buffers):
                for name, value in () if isinstance(module, torch.jit.ScriptModule) else registry.items():
                    before = own.get(f"{prefix}.{name}" if prefix else name)
                    if value is not before and (value is None or id(value) in real):
                        found.append((registry, name, None if value is None else real[id(value)]))
        return found

    def _put_attributes(self, fakes: Mapping[str, Tensor]) -> None:
        """Replace tensors in plain attributes by their stand-ins."""
        registered = {id(tensor) for tensor in (*self.net.parameters(), *self.net.buffers())}
        for container, key, value in list(entries(self.net)):
            if isinstance(value, Tensor) and id(value) in self.keys and id(value) not in registered:
                container[key] = fakes[self.keys[id(value)]]
                self._filled.append(container)

    def _traced_arguments(self, fakes: Mapping[str, Tensor]) -> Any:
        """Arguments and named ones, with tensors replaced by stand-ins.

        Lists and dicts are the given ones, since the call may change them.
        """

        def traced(leaf: Any) -> Any:
            return fakes[self.keys[id(leaf)]] if id(leaf) in self.keys else leaf

        def whole_or_traced(value: Any) -> Any:
            return pytree.tree_map(
                traced, value, is_leaf=lambda each: is_size(each) or isinstance(each, CONTAINERS)
            )

        for container, key, value in list(entries_of(self.containers)):
            exchanged = whole_or_traced(value)
            if exchanged is not value:
                container[key] = exchanged
                self._given[id(exchanged)] = (exchanged, value)
        args, kwargs = self.arguments
        return tuple(map(whole_or_traced, args)), {name: whole_or_traced(kwargs[name]) for name in kwargs}

    def _put_states_back(self, fakes: Sequence[Tensor], keys: Sequence[str]) -> None:
        """Replace stand-ins by states in containers of the module, such as lists of recurrent layers."""
        real = {id(fake): self.states[key] for fake, key in zip(fakes, keys, strict=True)}
        # The call may have removed a container from the module that still holds stand-ins.
        for container, key, value in list(entries(self.net, self._filled)):
            if id(value) in real:
                container[key] = real[id(value)]
        self._filled.clear()
        for container, key, value in list(entries_of(self.containers)):
            if id(value) in self._given:
                _, container[key] = self._given[id(value)]
            elif id(value) in real:
                container[key] = real[id(value)]
        # References kept here would look like tensors that the call has left behind.
        self._given.clear()

    def _called(self, image: Tensor, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """The module's return value; raises if its code met an error that plain PyTorch does not raise."""
        try:
            result = self.net(image, *args, **kwargs)
        except Exception as error:
            # A script that failed because of it names its line.
            if self.noted.refusal is None or is_of_script(error):
                raise
        if self.noted.refusal is not None:
            raise self.noted.refusal
        return result

    def result(self, values: Sequence[Any]) -> Any:
        """The module's return value, given its graph's results, some of which are put into its attributes."""
        count = len(values) - len(self.places)
        for place, value in zip(self.places, values[count:], strict=True):
            place.put(value)
        for registry, name, tensor in self.exchanged:
            registry[name] = tensor
        assert self.rebuild is not None
        return self.rebuild(values[:count])

    def on(self, keys: tuple[str, ...]) -> Callable[..., Any]:
        """The call as a function of the image and of the states with these keys, in order."""

        def function(image: Tensor, *states: Tensor) -> tuple[Any, ...]:
            by_key = dict(zip(keys, states, strict=True))

            args, kwargs = self._traced_arguments(by_key)
            own = {n: by_key[self.keys[id(state)]] for n, state in module_states(self.net).items()}
            known = KnownValues({state: self.states[key] for key, state in by_key.items()})
            watch = Watch(self.mode, proxy_of(image).node.name, known, self.noted)
            self._put_attributes(by_key)
            with (
                _reparametrize_module(self.net, own),
                _named_submodules(self.net),
                watch,
            ):
                scripted = [ScriptedAttributes(module) for module in self.net.modules()]
                with functions_replaced(self.net, watch.traced, self.noted.noting, self.noted.forget):
                    result = self._called(image, args, kwargs)
                self.flags = {key: state.requires_grad for key, state in by_key.items()}
                self.places = places_of_fakes(self.net, states, self.containers)
                self.exchanged = self._exchanged(own, by_key)
                refuse_new_parameters(self.net, states)
                refuse_scripted_tensors(self.net, scripted)
                kept = [place.take() for place in self.places]
            self._put_states_back(states, keys)
            leaves, self.rebuild = taken_apart(result)
            refuse_bound((leaves, kept))
            refuse_new_leaves((*leaves, *kept), (image, *states))
            return (*leaves, *kept)

        return function


@contextmanager
def _named_submodules(net: nn.Module) -> Iterator[None]:
    """Note on each call recorded in the block which submodule makes it."""
    paths: dict[nn.Module, str] = {module: name for name, module in net.named_modules()}
    outer: list[Any] = []
    here = threading.get_ident()

    def enter(module: nn.Module, args: Any) -> None:
        if threading.get_ident() != here:
            return
        outer.append(fx_traceback.current_meta.get("nn_module_stack"))
        fx_traceback.current_meta["nn_module_stack"] = {"": (paths.get(module, ""), type(module))}

    def leave(module: nn.Module, args: Any, result: Any) -> None:
        if threading.get_ident() == here:
            fx_traceback.current_meta["nn_module_stack"] = outer.pop() if outer else None

    handles = (
        module_hooks.register_module_forward_pre_hook(enter),
        module_hooks.register_module_forward_hook(leave, always_call=True),
    )
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
        fx_traceback.current_meta.pop("nn_module_stack", None)
