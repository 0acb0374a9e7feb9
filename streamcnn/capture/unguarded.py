"""Capture anew for each pass, of forward passes that hold code which cannot be guarded.

The user's Python runs on fake tensors, as often as the model is called, and its operators are recorded; so
what it prints, draws or counts happens as in plain PyTorch. Nothing that it reads can be out of date. A fake
tensor that it leaves in an attribute, or in a list or dict there, gives way to the real one after the pass.
Anywhere else it is found: then the pass is refused, and the module put back as it was.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any
from weakref import WeakSet

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.autograd.function import FunctionCtx
from torch.fx import Proxy
from torch.fx import traceback as fx_traceback
from torch.fx.experimental.proxy_tensor import (
    disable_proxy_modes_tracing,
    get_proxy_mode,
    track_tensor_tree,
)
from torch.nn.modules import module as module_hooks
from torch.nn.utils.stateless import _reparametrize_module
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree
from torch.utils import checkpoint

from streamcnn.capture.blind import BLIND, gaussian_nll_loss, observers_blind
from streamcnn.capture.capture import RawGraph, module_states, named_arguments, outside_key
from streamcnn.capture.functional import functionalized
from streamcnn.capture.known_values import KnownValues
from streamcnn.capture.leftovers import (
    Place,
    Snapshot,
    entries,
    places_of_fakes,
    refuse_backward_hooks,
    refuse_new_parameters,
    refuse_remaining,
    refuse_scripted_tensors,
)
from streamcnn.capture.replacing import replaced_here
from streamcnn.capture.results import taken_apart
from streamcnn.capture.scripts import ScriptedAttributes
from streamcnn.capture.whole_calls import called_whole
from streamcnn.errors import UnsupportedModel
from streamcnn.graph.flattening import (
    RECOMPUTED,
    SEEDED,
    SEEDING,
    flatten,
    let_go,
    proxy_of,
)
from streamcnn.graph.in_place import resized


@dataclass(frozen=True, slots=True)
class Capture:
    """One captured call of a module."""

    graph: RawGraph
    states: Mapping[str, Tensor]
    result: Callable[[Sequence[Any]], Any]
    """What the module returns, given the results of the graph."""
    undo: Callable[[], None]
    """Put the module's attributes back as they were before the call."""


def capture_anew(net: nn.Module, image: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Capture:
    """Run ``net(image, *args, **kwargs)`` on fake tensors; ``image`` stands in for the image.

    Raises
    ------
    UnsupportedModel
        If the forward pass cannot be followed, or leaves a tensor behind that would have no values; the
        module is as it was then.
    """
    refuse_backward_hooks(net)
    before = Snapshot(net)
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
    """Which states the forward pass has frozen or released (``requires_grad``), and what it made of them."""

    wanted: tuple[tuple[Tensor, bool], ...]

    def set(self) -> None:
        """Do to the states what was done to their stand-ins."""
        for state, flag in self.wanted:
            state.requires_grad_(flag)

    def undo(self) -> None:
        """Put the states back as they were."""
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
    call = _Call(net, args, kwargs, states, mode)
    grad = torch.is_grad_enabled()
    inputs = [like, *(_stand_in_for(tensor, mode) for tensor in states.values())]
    flat = flatten(call.on(tuple(states)), inputs, mode, grad=grad)
    flat_hooks = {name: tuple(hooks) for name, hooks in call.hooks.items()}
    graph = functionalized(
        flat,
        (None, *states),
        tuple(image.shape),
        grad=grad,
        device=image.device,
        path_of=str,
        hooks=flat_hooks,
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

    graph = replace(graph, marks_image=call.marks_image)
    return Capture(graph, {**states, **outside}, call.result, undo), call.made, flags


def _stand_in_for(tensor: Tensor, mode: FakeTensorMode) -> Tensor:
    """A fake tensor with what the user has set on ``tensor``."""
    fake = mode.from_tensor(tensor)
    if type(tensor) in _PLAIN:
        vars(fake).update(vars(tensor))
    return fake


def _states(net: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Tensor]:
    """All tensors that a call is known to read, each once, by key."""
    found: dict[int, tuple[str, Tensor]] = {}
    for name, tensor in (*net.named_parameters(), *net.named_buffers()):
        found.setdefault(id(tensor), (name, tensor))
    for name, tensor in named_arguments((args, kwargs)):
        found.setdefault(id(tensor), (name, tensor))
    for _, key, value in entries(net):
        if isinstance(value, Tensor):
            found.setdefault(id(value), (f"attribute {key} ({len(found)})", value))
    return dict(found.values())


class _Call:
    """A call of the module as a function of tensors, while it is traced."""

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
        self.states = states
        self.mode = mode
        self.keys = {id(tensor): key for key, tensor in states.items()}
        self.hooks: dict[str, list[Callable[..., Any]]] = {}
        """Hooks on gradients by the name of the traced value."""
        self.made: list[weakref.ref[Tensor]] = []
        self.known: KnownValues | None = None
        self.image_name = ""
        self.places: list[Place] = []
        """Where the module keeps tensors that its forward pass has made."""
        self.exchanged: list[tuple[dict[str, Any], str, Tensor | None]] = []
        """Registered tensors that the forward pass has replaced by others that were there, or by nothing."""
        self.flags: dict[str, bool] = {}
        """Whether states require gradients at the end, by key."""
        self.marks_image = False
        """Whether the forward pass has changed if the image requires one."""
        self.rebuild: Callable[[Sequence[Any]], Any] | None = None

    def _exchanged(
        self, own: Mapping[str, Tensor], fakes: Mapping[str, Tensor]
    ) -> list[tuple[dict[str, Any], str, Tensor | None]]:
        """Where parameters and buffers are not ``own``, stand-ins by qualified name, and what is there."""
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
        """Let stand-ins take the places of tensors that are plain attributes."""
        registered = {id(tensor) for tensor in (*self.net.parameters(), *self.net.buffers())}
        for container, key, value in list(entries(self.net)):
            if isinstance(value, Tensor) and id(value) in self.keys and id(value) not in registered:
                container[key] = fakes[self.keys[id(value)]]

    def _put_states_back(self, fakes: Sequence[Tensor], keys: Sequence[str]) -> None:
        """Take stand-ins of states out of lists of the module's own, as recurrent layers have them."""
        real = {id(fake): self.states[key] for fake, key in zip(fakes, keys, strict=True)}
        for container, key, value in entries(self.net):
            if id(value) in real:
                container[key] = real[id(value)]

    def result(self, values: Sequence[Any]) -> Any:
        """What the module returns, and keeps, given the results of its graph."""
        count = len(values) - len(self.places)
        for place, value in zip(self.places, values[count:], strict=True):
            place.container[place.key] = value
        for registry, name, tensor in self.exchanged:
            registry[name] = tensor
        assert self.rebuild is not None
        return self.rebuild(values[:count])

    def on(self, keys: tuple[str, ...]) -> Callable[..., Any]:
        """The call as a function of the image and of the states with these keys, in order."""

        def function(image: Tensor, *states: Tensor) -> tuple[Any, ...]:
            by_key = dict(zip(keys, states, strict=True))

            def traced(leaf: Any) -> Any:
                return by_key[self.keys[id(leaf)]] if id(leaf) in self.keys else leaf

            args, kwargs = pytree.tree_map(traced, self.arguments)
            own = {n: by_key[self.keys[id(state)]] for n, state in module_states(self.net).items()}
            self.image_name = proxy_of(image).node.name
            self.known = KnownValues({state: self.states[key] for key, state in by_key.items()})
            self._put_attributes(by_key)
            with _reparametrize_module(self.net, own), _named_submodules(self.net), _Watch(self):
                scripted = [ScriptedAttributes(module) for module in self.net.modules()]
                with _functions_whole():
                    result = self.net(image, *args, **kwargs)
                self.flags = {key: state.requires_grad for key, state in by_key.items()}
                self.places = places_of_fakes(self.net, states)
                self.exchanged = self._exchanged(own, by_key)
                refuse_new_parameters(self.net, states)
                refuse_scripted_tensors(self.net, scripted)
                kept = [place.take() for place in self.places]
            self._put_states_back(states, keys)
            self.known = None
            leaves, self.rebuild = taken_apart(result)
            _refuse_bound((leaves, kept))
            return (*leaves, *kept)

        return function


_PLAIN = (Tensor, nn.Parameter)
_COPIES = frozenset(
    getattr(Tensor, name) for name in ("item", "tolist", "__bool__", "__float__", "__index__", "__int__")
)
_READS = _COPIES | {getattr(Tensor, name) for name in ("numpy", "__array__")}
"""Methods that give a tensor's values to Python; the last two, with the memory that they are in."""


class _Watch(TorchFunctionMode):
    """Follows what tracing alone would not see, and notes the tensors that are made."""

    def __init__(self, call: _Call) -> None:
        super().__init__()
        self.call = call
        self.infers = torch.is_inference_mode_enabled()
        self.stand_ins: dict[int, tuple[Tensor, Tensor]] = {}
        """Tensors from outside, each with what stands for it, by identity."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if torch.is_inference_mode_enabled() and not self.infers:
            raise UnsupportedModel(
                "the forward pass enters torch.inference_mode(), whose tensors have no gradient anywhere: "
                "use torch.no_grad() for the block"
            )
        if func in _READS and self._is_from_outside(args[0]):
            with disable_proxy_modes_tracing(), unset_fake_temporarily():
                return func(*args, **(kwargs or {}))
        if func in _COPIES and self.call.known is not None:
            known = self.call.known.of(args[0])
            if known is not None:
                with disable_proxy_modes_tracing(), unset_fake_temporarily():
                    return func(known, *args[1:], **(kwargs or {}))
        func = BLIND.get(func, func)
        args, kwargs = pytree.tree_map_only(Tensor, self._traced, (args, kwargs or {}))
        if func == Tensor.data.__get__:  # type: ignore[attr-defined]
            return args[0].detach()
        if func == Tensor._version.__get__ and self.call.known is not None:  # type: ignore[attr-defined]
            return self.call.known.version_of(args[0])
        if func is Tensor.__deepcopy__:
            return _deep_copy(*args)
        if func is Tensor.register_hook:
            return self._hook(*args)
        if func == Tensor.data.__set__:  # type: ignore[attr-defined]
            return _set_data(*args)
        if func is Tensor.resize_ and not kwargs:
            return _resized(*args)
        if func is Tensor.requires_grad_ or func == Tensor.requires_grad.__set__:  # type: ignore[attr-defined]
            self._mark(*args, **kwargs)
        if func in (Tensor.retain_grad, Tensor.register_post_accumulate_grad_hook):
            raise UnsupportedModel(
                f"the forward pass calls {func.__name__}(), and a map that is streamed has no gradient of "
                "its own: return the map as a further result and ask autograd.grad for its gradient"
            )
        _refuse_bound((args, kwargs))
        result = func(*args, **kwargs)
        if isinstance(result, FakeTensor):
            self.call.made.append(weakref.ref(result))
        return result

    def _traced(self, tensor: Tensor) -> Tensor:
        """What stands for a tensor; for one from outside it is made where it is met first.

        As it is, such a tensor would be written to, or read by NumPy, past what is recorded.
        """
        mode = get_proxy_mode()
        if mode is None or type(tensor) not in _PLAIN:
            return tensor
        if id(tensor) not in self.stand_ins:
            # What makes it is no part of the forward pass.
            with disable_proxy_modes_tracing(), torch._C.DisableTorchFunction():
                fake = self.call.mode.from_tensor(tensor)
            node: Any = mode.tracer.create_arg(tensor)
            track_tensor_tree(fake, Proxy(node, mode.tracer), constant=None, tracer=mode.tracer)
            self.stand_ins[id(tensor)] = (tensor, fake)
        return self.stand_ins[id(tensor)][1]

    def _is_from_outside(self, tensor: Tensor) -> bool:
        """Whether a tensor has values, and those that it has where it is read."""
        _, stand_in = self.stand_ins.get(id(tensor), (tensor, None))
        return type(tensor) in _PLAIN and (stand_in is None or stand_in._version == 0)

    def _mark(self, tensor: Tensor, requires_grad: bool = True) -> None:
        """Note that a tensor is frozen or released; only of what goes in does it matter to anybody."""
        proxy = proxy_of(tensor)
        node = None if proxy is None else proxy.node
        if node is None or node.op != "placeholder" or tensor.requires_grad == requires_grad:
            return
        if node.name == self.call.image_name:
            self.call.marks_image = True
        elif node.users:
            raise UnsupportedModel(
                "the forward pass freezes or releases a tensor (requires_grad) that it has used already: do "
                "so before its first use, or outside of the forward pass"
            )

    def _hook(self, tensor: Tensor, hook: Callable[..., Any]) -> _Handle:
        proxy = proxy_of(tensor)
        node = None if proxy is None else proxy.node
        if node is None or (node.op == "placeholder" and node.name != self.call.image_name):
            raise UnsupportedModel(
                "the forward pass sets a hook on the gradient of a parameter, a buffer or a tensor from "
                "outside: set it once, outside of the forward pass"
            )
        hooks = self.call.hooks.setdefault(node.name, [])
        hooks.append(hook)
        return _Handle(hooks, hook)


def _resized(tensor: Tensor, *size: Any) -> Tensor:
    """``tensor.resize_(size)``, which observers of quantisation call each time."""
    wanted = tuple(size[0] if len(size) == 1 and not isinstance(size[0], int) else size)
    if wanted == tuple(tensor.shape):
        return tensor
    if tensor.numel():
        return tensor.resize_(wanted)
    raise resized("the forward pass calls resize_(), which changes", tensor.shape, wanted)


def _deep_copy(tensor: Tensor, memo: dict[int, Any]) -> Tensor:
    """What ``copy.deepcopy`` makes of a tensor: one of the same values that nothing ties to it."""
    if id(tensor) in memo:
        found: Tensor = memo[id(tensor)]
        return found
    if not tensor.is_leaf:
        raise RuntimeError("copy.deepcopy of a tensor that was computed: only leaves can be copied by it")
    found = memo[id(tensor)] = tensor.detach().clone()
    with disable_proxy_modes_tracing():
        return found.requires_grad_(tensor.requires_grad)


def _set_data(tensor: Tensor, value: Tensor) -> None:
    """``tensor.data = value``, which autograd does not see."""
    if value.shape != tensor.shape or value.dtype != tensor.dtype:
        raise UnsupportedModel(
            f"the forward pass assigns a tensor of shape {tuple(value.shape)} to the .data of one of shape "
            f"{tuple(tensor.shape)}: do so outside of it"
        )
    with torch.no_grad():
        tensor.detach().copy_(value)


@dataclass(slots=True)
class _Handle:
    """What setting a hook returns."""

    hooks: list[Callable[..., Any]]
    hook: Callable[..., Any]

    def remove(self) -> None:
        """Take the hook off again."""
        if self.hook in self.hooks:
            self.hooks.remove(self.hook)


@contextmanager
def _functions_whole() -> Iterator[None]:
    """Record the user's functions whole, and checkpointed calls as ordinary ones."""
    with (
        replaced_here(torch.autograd.Function, "apply", _apply),
        replaced_here(FunctionCtx, "mark_dirty", _refuse_dirty),
        replaced_here(F, "gaussian_nll_loss", gaussian_nll_loss),
        observers_blind(),
        replaced_here(torch, "from_numpy", _from_numpy),
        replaced_here(checkpoint, "_checkpoint_without_reentrant_generator", _without_reentry),
        ExitStack() as generators,
    ):
        for module in (torch, torch.random):
            for name in SEEDING:
                generators.enter_context(replaced_here(module, name, _refuse_seed))
        yield


def _refuse_seed(*args: Any, **kwargs: Any) -> None:
    raise UnsupportedModel(SEEDED)


_FROM_NUMPY = torch.from_numpy


def _from_numpy(array: Any) -> Tensor:
    """``torch.from_numpy``, whose result is in the array's memory; while tracing it would be in a copy."""
    with disable_proxy_modes_tracing(), unset_fake_temporarily():
        return _FROM_NUMPY(array)


def _refuse_dirty(ctx: Any, *tensors: Tensor) -> None:
    raise UnsupportedModel(
        f"{type(ctx)._forward_cls.__name__} changes its input in place (mark_dirty): "
        "return a new tensor instead"
    )


_APPLY = vars(torch.autograd.Function)["apply"]
_inner: WeakSet[type[torch.autograd.Function]] = WeakSet()
"""Functions by which custom operators are differentiated: those are recorded above them."""


def _refuse_bound(values: Any) -> None:
    """Refuse results of an ``apply`` that was taken from a function before the pass, past our own."""
    for leaf in pytree.tree_leaves(values):
        cls = getattr(leaf.grad_fn, "_forward_cls", None) if isinstance(leaf, Tensor) else None
        if cls is not None and cls not in _inner:
            raise UnsupportedModel(
                f"the forward pass calls the apply of {cls.__name__} by another name, and holds code that "
                "can only be captured without values: write .apply(...) where it is called"
            )


def _apply(cls: Any, *args: Any, **kwargs: Any) -> Any:
    """``autograd.Function.apply`` while tracing: one call that is carried out as it is."""
    if cls is checkpoint.CheckpointFunction:
        run, _, *operands = args
        with _recomputed():
            return run(*operands)
    original = _APPLY.__get__(None, cls)
    if get_proxy_mode() is None:
        _inner.add(cls)
        return original(*args, **kwargs)
    _refuse_bound((args, kwargs))
    with disable_proxy_modes_tracing():
        like = original(*args, **kwargs)

    def function(*args: Any, **kwargs: Any) -> Any:
        # Looked up when it runs: here it is this function's.
        return cls.apply(*args, **kwargs)

    return called_whole(cls.__name__, function, args, kwargs, like)


@contextmanager
def _recomputed() -> Iterator[None]:
    """Note on each recorded call that activation checkpointing would run it twice."""
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


@contextmanager
def _named_submodules(net: nn.Module) -> Iterator[None]:
    """Note on each recorded call which submodule makes it."""
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
