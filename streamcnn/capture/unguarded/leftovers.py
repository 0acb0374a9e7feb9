"""Fake tensors that a forward pass leaves in a module: found, replaced by real ones, or refused by name."""

from __future__ import annotations

import dataclasses
import gc
import weakref
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn.modules import module as module_hooks

from streamcnn.capture.lines import shortened
from streamcnn.capture.scripts import ScriptedAttributes
from streamcnn.capture.unguarded.contents import Contents, HostRandom, put_back
from streamcnn.errors import UnsupportedModel

CONTAINERS = (dict, list, deque)
"""What a forward pass may put tensors into."""
_BACKWARD_HOOKS = ("_backward_hooks", "_backward_pre_hooks")


@dataclass(frozen=True, slots=True)
class Place:
    """An attribute of a submodule, or an entry of a list or dict there."""

    container: Any
    key: Any
    path: tuple[int, ...] = ()
    """Indices of the tensor within nested tuples there."""

    def take(self) -> Tensor:
        """Remove and return the tensor that is there, until its values are known."""
        value = self.container[self.key]
        for index in self.path:
            value = value[index]
        self.put(None)
        assert isinstance(value, Tensor)
        return value

    def put(self, value: Tensor | None) -> None:
        """Put ``value`` there."""
        self.container[self.key] = _exchanged(self.container[self.key], self.path, value)


def _exchanged(held: Any, path: tuple[int, ...], value: Tensor | None) -> Any:
    """``held`` with ``value`` at ``path`` within nested tuples; ``value`` itself if the path is empty."""
    if not path:
        return value
    parts = list(held)
    parts[path[0]] = _exchanged(parts[path[0]], path[1:], value)
    return type(held)(*parts) if hasattr(held, "_fields") else type(held)(parts)


def places_of_fakes(net: nn.Module, states: Sequence[Tensor], given: Sequence[Any]) -> list[Place]:
    """The places in submodules, and in containers that were ``given``, of traced tensors other than the
    stand-ins for ``states``."""
    known = set(map(id, states))
    return [
        Place(container, key, path)
        for container, key, value in entries(net, given)
        for path, held in _in_tuples(value)
        if isinstance(held, FakeTensor) and id(held) not in known
    ]


def containers_in(values: Sequence[Any]) -> list[Any]:
    """The lists and dicts among ``values``, also within tuples."""
    return [held for value in values for _, held in _in_tuples(value) if isinstance(held, CONTAINERS)]


def _in_tuples(value: Any) -> Iterator[tuple[tuple[int, ...], Any]]:
    """A value, or the items of nested tuples, each with its path."""
    if not isinstance(value, tuple):
        yield (), value
        return
    for index, inner in enumerate(value):
        for path, held in _in_tuples(inner):
            yield (index, *path), held


def refuse_new_parameters(net: nn.Module, states: Sequence[Tensor]) -> None:
    known = set(map(id, states))
    for name, module in net.named_modules():
        for attribute, parameter in module._parameters.items():
            if isinstance(parameter, FakeTensor) and id(parameter) not in known:
                raise UnsupportedModel(
                    f"the forward pass makes parameter '{attribute}' of {_titled(name, module)}, and holds "
                    "code that can only be captured without values: make it in __init__"
                )


def refuse_new_leaves(values: Sequence[Any], given: Sequence[Tensor]) -> None:
    """Raise if a tensor that is returned or kept, and was not ``given``, is one that autograd begins at."""
    known = set(map(id, given))
    for value in values:
        if isinstance(value, Tensor) and value.requires_grad and value.is_leaf and id(value) not in known:
            raise UnsupportedModel(
                "the forward pass returns or keeps a tensor that it has made require a gradient "
                "(requires_grad_(), requires_grad=True, nn.Parameter), and a streamed pass would leave its "
                ".grad empty: return it as it is, without detach(), and ask autograd.grad for its gradient"
            )


def refuse_scripted_tensors(net: nn.Module, before: Sequence[ScriptedAttributes]) -> None:
    """Raise if a script has assigned a tensor to an attribute; ``before`` has all modules' attributes."""
    for (name, module), had in zip(net.named_modules(), before, strict=True):
        for attribute, value in ScriptedAttributes(module).items():
            if isinstance(value, FakeTensor) and value is not had[attribute]:
                raise UnsupportedModel(
                    f"the script of {_titled(name, module)} assigns a tensor to its attribute '{attribute}': "
                    "overwrite a buffer in place (copy_), return the tensor, or use the module without "
                    "torch.jit"
                )


def entries(net: nn.Module, given: Sequence[Any] = ()) -> Iterator[tuple[Any, Any, Any]]:
    """Container, key and value of all attributes of submodules, and of the entries of lists and dicts among
    them, within tuples, or ``given``."""
    scripted = [ScriptedAttributes(module) for module in net.modules()]
    return entries_of([*(vars(module) for module in net.modules()), *scripted, *given])


def entries_of(containers: Sequence[Any]) -> Iterator[tuple[Any, Any, Any]]:
    """Container, key and value of all entries of containers, and of lists and dicts within them."""
    seen: set[int] = set()
    pending = list(containers)
    while pending:
        container = pending.pop()
        if id(container) in seen:
            continue
        seen.add(id(container))
        for key, value in list(container.items() if isinstance(container, dict) else enumerate(container)):
            yield container, key, value
            held = (inner for _, inner in _in_tuples(value))
            pending += [inner for inner in held if isinstance(inner, CONTAINERS)]


class Snapshot:
    """The attributes of all submodules, and the contents of containers among them and among ``arguments``."""

    def __init__(self, net: nn.Module, arguments: Sequence[Any] = ()) -> None:
        self._modules = [(name, module, dict(vars(module))) for name, module in net.named_modules()]
        self._scripted = [(module, ScriptedAttributes(module)) for module in net.modules()]
        self._contents = Contents()
        self._random = HostRandom()
        for _, _, attributes in self._modules:
            for value in attributes.values():
                self._contents.keep(value)
        for parameter in net.parameters():
            for kind in ("_backward_hooks", "_post_accumulate_grad_hooks"):
                self._contents.keep(getattr(parameter, kind, None))
        for container in containers_in(arguments):
            self._contents.keep(container)

    def restore(self) -> None:
        """Restore everything, and the random states of Python and NumPy."""
        self._random.restore()
        for _, module, attributes in self._modules:
            vars(module).clear()
            vars(module).update(attributes)
        for module, scripted in self._scripted:
            present = ScriptedAttributes(module)
            for name, value in scripted.items():
                if present[name] is not value:
                    present[name] = value
        for container, contents in self._contents:
            put_back(container, contents)

    def refuse_fakes(self) -> None:
        """Raise if an attribute holds a fake tensor."""
        for name, module, _ in self._modules:
            for attribute, value in vars(module).items():
                for place, held in _named_values(attribute, value):
                    if isinstance(held, FakeTensor):
                        raise UnsupportedModel(_left_behind(f"'{place}' of {_titled(name, module)}"))


def _named_values(name: str, value: Any, depth: int = 3) -> Iterator[tuple[str, Any]]:
    """A value and the items of nested containers, with names for messages."""
    yield name, value
    if depth and isinstance(value, dict):
        for key, inner in value.items():
            registry = name in ("_parameters", "_buffers", "_modules")
            if not isinstance(inner, nn.Module):
                yield from _named_values(str(key) if registry else f"{name}[{key!r}]", inner, depth - 1)
    elif depth and isinstance(value, (list, tuple, set, deque)):
        for index, inner in enumerate(value):
            yield from _named_values(f"{name}[{index}]", inner, depth - 1)
    elif depth and dataclasses.is_dataclass(value) and not isinstance(value, type):
        for each in dataclasses.fields(value):
            yield from _named_values(f"{name}.{each.name}", getattr(value, each.name, None), depth - 1)


def _titled(name: str, module: nn.Module) -> str:
    return f"'{name}' ({type(module).__name__})" if name else f"the model ({type(module).__name__})"


def _left_behind(where: str) -> str:
    return (
        f"the forward pass leaves a tensor in {where}, and holds code that can only be captured without "
        "values: return the tensor as a further result of the model (timm's features_only, torchvision's "
        "create_feature_extractor) instead of keeping it"
    )


def refuse_remaining(made: list[weakref.ref[Tensor]]) -> None:
    """Raise if a tensor that was made while tracing is still held, by a hook's closure for example."""
    # The collector was off, so the trace's cycles, which refer to parameters, are in the youngest generation.
    gc.collect(0)
    if any(reference() is not None for reference in made):
        gc.collect()
    for reference in made:
        tensor = reference()
        if tensor is not None:
            raise UnsupportedModel(_left_behind(_holder_of(tensor)))


def _holder_of(tensor: Tensor) -> str:
    for holder in gc.get_referrers(tensor):
        if isinstance(holder, dict):
            keys = [key for key, value in holder.items() if value is tensor]
            if keys:
                return f"a dict, under {shortened(' '.join(repr(keys[0]).split()))}"
        if isinstance(holder, (list, tuple, set)):
            return f"a {type(holder).__name__} outside the model"
    return "an object outside the model (a hook, a closure or a global)"


def refuse_backward_hooks(net: nn.Module) -> None:
    for name, module in net.named_modules():
        if any(getattr(module, kind, None) for kind in _BACKWARD_HOOKS):
            raise UnsupportedModel(
                f"{_titled(name, module)} has a backward hook, which needs the gradients of whole maps: "
                "remove it, or set it on a parameter or with Tensor.register_hook on a result of the model"
            )
    if module_hooks._global_backward_hooks or module_hooks._global_backward_pre_hooks:
        raise UnsupportedModel(
            "a backward hook is set on all modules, which needs the gradients of whole maps: remove it"
        )
