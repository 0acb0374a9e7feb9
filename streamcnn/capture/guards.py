"""Guarded capture: a captured forward pass that is used again for exactly as long as it holds.

What a forward pass reads besides tensors (attributes of any kind, hooks, methods, globals, modes) is part
of its capture. Dynamo, the front half of ``torch.compile``, follows the Python code of a call, gives the
tensor operations as a graph whose inputs are the parameters and buffers, and checks at each later call,
within a millisecond, that nothing that it has read is different. What the code does besides computing
(counters, attributes, lists) is left to it as well: it happens after the graph has been carried out.

The graph is handed to us as to any compiler. The image is stood in for by one element expanded to the
image's shape, which takes no memory.
"""

from __future__ import annotations

import logging
import operator
import os
import re
import threading
import types
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from functools import cache
from itertools import chain
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch.fx import GraphModule
from torch.nn.modules import module as module_hooks

from streamcnn.capture.caller_modes import collector, function_modes_aside
from streamcnn.capture.capture import RawGraph, module_states, named_arguments
from streamcnn.capture.functional import functionalized
from streamcnn.capture.presence import presence_guarded
from streamcnn.errors import StreamError
from streamcnn.graph.flattening import CannotFlatten, Inliner, flatten, is_fake, reads_values

Run = Callable[[RawGraph, Mapping[str, Tensor]], Sequence[Any]]
"""Carries a captured graph out, given the tensors of its states by key; its results in order, without those
that are only checked."""

TORCH_FOLDER = str(Path(torch.__file__).parent)
_GLOBAL_HOOKS = ("_global_forward_pre_hooks", "_global_forward_hooks")
MOST_GRAPHS = 32
"""Captured graphs kept before all are dropped: images of ever new sizes make one each."""


class CannotBeGuarded(Exception):
    """The forward pass holds code that Dynamo does not follow."""


def as_image(image: Tensor) -> Tensor:
    """The image as the model gets it, while its forward pass is captured."""
    if not is_fake(image):
        raise CannotBeGuarded("torch.compile is switched off")
    return image.clone(memory_format=torch.contiguous_format)


def _forward(net: nn.Module, image: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return net(as_image(image), *args, **kwargs)


class _Present(threading.local):
    """The call that is being made in this thread."""

    call: _GuardedCall | None = None


_present = _Present()


class GuardedForward:
    """The captured forward passes of one module, each with the guards under which it holds."""

    def __init__(self) -> None:
        self._compiled: Callable[..., Any] | None = None
        self._graphs = _Graphs()
        self._unseen = _Unseen((), {})

    def __call__(
        self,
        net: nn.Module,
        image: Tensor,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        run: Run,
    ) -> Any:
        """What ``net(image, *args, **kwargs)`` returns, its operators carried out by ``run``.

        ``image`` stands in for the image: its values are not read.

        Raises
        ------
        CannotBeGuarded
            If the forward pass cannot be captured whole; nothing has been run or changed.
        """
        unseen = _Unseen.by(net)
        if self._compiled is None or self._graphs.count >= MOST_GRAPHS or not unseen.is_same(self._unseen):
            self._unseen = unseen
            self._graphs = _Graphs()
            self._compiled = _compiled(self._graphs)
        with ExitStack() as settings:
            settings.enter_context(_dynamo_as_wanted())
            settings.enter_context(collector.off())
            call = _GuardedCall(net, args, kwargs, run, settings)
            outer, _present.call = _present.call, call
            try:
                result = _followed(call, self._compiled, net, image, args, kwargs)
            finally:
                _present.call = outer
        if not call.has_begun:
            raise CannotBeGuarded("no tensor operation depends on the image")
        return result


def _followed(call: _GuardedCall, compiled: Callable[..., Any], *inputs: Any) -> Any:
    """The result of a call, or the news that Dynamo cannot follow its code."""
    try:
        return compiled(*inputs)
    except StreamError:
        raise
    except Exception as error:
        if call.has_begun:
            raise
        raise CannotBeGuarded(first_line(error)) from error


@dataclass(frozen=True, slots=True, eq=False)
class _Unseen:
    """What Dynamo has no guards for: what modules' classes hold, hooks of all modules, and the environment's
    variables."""

    members: tuple[Any, ...]
    environment: Mapping[str, str]

    @classmethod
    def by(cls, net: nn.Module) -> _Unseen:
        """As it is now."""
        kinds = dict.fromkeys(kind for module in net.modules() for kind in type(module).__mro__)
        # Dynamo itself patches the base class when it is used first, and not what a call goes through.
        own = (vars(kind).values() for kind in kinds if kind not in (nn.Module, object))
        calls = (getattr(nn.Module, name) for name in ("__call__", "_call_impl", "__getattr__"))
        hooks = (hook for kind in _GLOBAL_HOOKS for hook in getattr(module_hooks, kind).values())
        return cls((*chain.from_iterable(own), *calls, *hooks), dict(os.environ))

    def is_same(self, other: _Unseen) -> bool:
        """Whether nothing has changed in between."""
        return (
            len(self.members) == len(other.members)
            and all(map(operator.is_, self.members, other.members))
            and self.environment == other.environment
        )


class _Graphs:
    """Dynamo's backend. It does not know its owner: the collector does not see into Dynamo's cache."""

    def __init__(self) -> None:
        self.count = 0

    def __call__(self, graph: GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        self.count += 1
        return _Captured(graph)


def _compiled(graphs: _Graphs) -> Callable[..., Any]:
    import torch._dynamo

    torch._dynamo.allow_in_graph(as_image)  # type: ignore[no-untyped-call]
    # Captured graphs belong to a code object, and their names to its globals. Those of its own go with it.
    own = types.FunctionType(_forward.__code__.replace(), {**_forward.__globals__}, "forward")
    return torch.compile(own, backend=graphs, fullgraph=True, dynamic=False)


class _Captured:
    """What Dynamo calls in place of a graph's operations."""

    def __init__(self, module: GraphModule) -> None:
        self._module: GraphModule | None = module
        self._graph: RawGraph | None = None
        self._keys: tuple[str | None, ...] = ()

    def __call__(self, *inputs: Any) -> Sequence[Any]:
        with function_modes_aside():
            return self._carried_out(inputs)

    def _carried_out(self, inputs: Sequence[Any]) -> Sequence[Any]:
        call = _present.call
        assert call is not None
        if self._graph is None:
            assert self._module is not None
            self._graph, self._keys = call.lower(self._module, inputs)
            self._module = None
        call.has_begun = True
        call.settings.close()
        states = {key: given for key, given in zip(self._keys, inputs, strict=True) if key is not None}
        return call.run(self._graph, states)


class _GuardedCall:
    """One call of the module."""

    def __init__(
        self,
        net: nn.Module,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        run: Run,
        settings: ExitStack,
    ) -> None:
        self.net = net
        self.arguments = (args, kwargs)
        self.run = run
        self.settings = settings
        """What holds while the call is captured, and no longer when its operators are carried out."""
        self.has_begun = False

    def lower(self, module: GraphModule, inputs: Sequence[Any]) -> tuple[RawGraph, tuple[str | None, ...]]:
        """Dynamo's graph as a raw one, and for each input the key of a state, or None for the image."""
        placeholders = [node for node in module.graph.nodes if node.op == "placeholder"]
        images = {
            node.args[0]
            for node in module.graph.nodes
            if node.op == "call_function" and node.target is as_image
        }
        named = _names(self.net, self.arguments)
        keys = tuple(
            None if node in images else named.get(id(given), node.name)
            for node, given in zip(placeholders, inputs, strict=True)
        )
        fakes = [_fake_of(node, node in images) for node in placeholders]
        mode = fakes[0].fake_mode  # type: ignore[attr-defined]
        grad = torch.is_grad_enabled()
        flat = flatten(Inliner(module, through=as_image).run, fakes, mode, grad=grad)
        if any(reads_values(node.target) for node in flat.graph.nodes):
            raise CannotFlatten("a number is read from a tensor")
        shape = next((tuple(f.shape) for f, key in zip(fakes, keys, strict=True) if key is None), ())
        device = fakes[0].device
        graph = functionalized(flat, keys, shape, grad=grad, device=device, path_of=_path_of)
        return graph, keys


def _fake_of(node: torch.fx.Node, is_image: bool) -> Tensor:
    fake: Tensor = node.meta["example_value"]
    if not is_image:
        return fake
    with fake.fake_mode:  # type: ignore[attr-defined]
        return torch.empty(fake.shape, dtype=fake.dtype, device=fake.device)


def _names(net: nn.Module, arguments: Any) -> dict[int, str]:
    """Keys of tensors by their identity: qualified names, or the place among further arguments."""
    named: dict[int, str] = {}
    for key, tensor in (*named_arguments(arguments), *module_states(net).items()):
        named.setdefault(id(tensor), key)
    return named


def _path_of(place: str) -> str:
    """A submodule's qualified name, from Dynamo's name of its place."""
    path = re.sub(r"\._modules\['([^']*)'\]", r".\1", place).removeprefix("L['net']")
    return re.sub(r"\[['\"]?([^\]'\"]*)['\"]?\]", r".\1", path).strip(".")


@contextmanager
def _dynamo_as_wanted() -> Iterator[None]:
    """Dynamo with what we need of it, whatever the user has set for its own sake, and silent."""
    from torch._dynamo import config, guards, symbolic_convert
    from torch._dynamo.variables.misc import RandomVariable
    from torch._dynamo.variables.torch import TorchInGraphFunctionVariable

    handlers = TorchInGraphFunctionVariable._get_handlers()
    many = 2**30
    with ExitStack() as settings:
        settings.enter_context(warnings.catch_warnings())
        warnings.filterwarnings("ignore", module=r"torch\._dynamo")
        settings.enter_context(patch.dict(handlers, _plain_answers()))
        settings.enter_context(presence_guarded())
        # It would be taken for a setting without effect.
        settings.enter_context(_unfollowed(torch.autograd.function.FunctionCtx, "set_materialize_grads"))
        # Its state would be part of the graph and of no guard.
        settings.enter_context(patch.object(RandomVariable, "is_supported_random_obj", _never))
        for name in ("torch._dynamo", "torch._subclasses.fake_tensor"):
            settings.enter_context(silenced(name))
        # It parses whole files for the sake of a line of the log.
        settings.enter_context(patch.object(symbolic_convert, "get_funcname", _unnamed))
        # For another line it fills a buffer larger than the processor's caches, and times the guards.
        settings.enter_context(patch.object(guards, "profile_guard_manager", _untimed))
        settings.enter_context(
            config.patch(
                recompile_limit=many,
                accumulated_recompile_limit=many,
                suppress_errors=False,
                # What a capture leaves is collected when the caller's own garbage is.
                run_gc_after_compile=False,
                skip_nnmodule_hook_guards=False,
                force_parameter_static_shapes=True,
                automatic_dynamic_shapes=False,
                assume_static_by_default=True,
                # In PyTorch 2.11 it is on, and what closures, defaults and flags of parameters are is not
                # looked at any more where the dicts of modules are as they were.
                use_recursive_dict_tags_for_guards=False,
            )
        )
        yield


def _unfollowed(owner: type, name: str) -> AbstractContextManager[Any]:
    """A block in which Dynamo does not follow code that calls a method of PyTorch's."""
    return patch.object(owner, name, torch._dynamo.disable(vars(owner)[name]))  # type: ignore[no-untyped-call]


@contextmanager
def silenced(name: str) -> Iterator[None]:
    """Keep one of PyTorch's loggers off the terminal."""
    logger = logging.getLogger(name)
    level = logger.level
    logger.setLevel(logging.CRITICAL + 1)
    try:
        yield
    finally:
        logger.setLevel(level)


def _never(value: object) -> bool:
    return False


def _unnamed(filename: str, lineno: int) -> None:
    return None


def _untimed(*_: Any) -> float:
    return 0.0


@cache
def _plain_answers() -> dict[Any, Callable[..., Any]]:
    """Handlers of the functions that say whether code is being compiled; every pass has them in place."""
    from torch._dynamo.variables.torch import TorchInGraphFunctionVariable

    return {
        function: _said_to_torch_alone(handler)
        for function, handler in TorchInGraphFunctionVariable._get_handlers().items()
        if getattr(function, "__name__", "") in ("is_compiling", "is_dynamo_compiling", "is_exporting")
    }


def _said_to_torch_alone(handler: Callable[..., Any]) -> Callable[..., Any]:
    """Dynamo's answer to whether it is compiling, as PyTorch's own code gets it: to the user's it is no.

    The user's forward pass is to be the one that plain PyTorch would run.
    """
    from torch._dynamo.variables import ConstantVariable

    def handle(self: Any, tx: Any, *args: Any, **kwargs: Any) -> Any:
        if tx.f_code.co_filename.startswith(TORCH_FOLDER):
            return handler(self, tx, *args, **kwargs)
        return ConstantVariable.create(False)

    return handle


def first_line(error: BaseException) -> str:
    """The first line of an error's text, or what kind of error it is."""
    text = str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__
