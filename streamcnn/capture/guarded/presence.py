"""What Dynamo has no guards for: which attributes there are, methods, and what is in a dict in which order.

Dynamo guards what it finds. Where code looks for something that is absent (``"scale" in vars(self)``,
``hasattr`` of a module or function, ``except AttributeError``, ``if self.options``), it often adds no guard,
and a capture would still be used once the thing is there. Dynamo reads methods from an object's class without
a guard, and whatever a metaclass has, and ignores that the order of an ``OrderedDict`` may change. So
everything that Dynamo reads under a name gets one more guard.
"""

from __future__ import annotations

import types
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from itertools import chain
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch._C._dynamo.guards import DictGuardManager

_HEAP_TYPE = 1 << 9
"""The flag of classes that are not built in."""


@contextmanager
def presence_guarded() -> Iterator[None]:
    """Make Dynamo also guard absent attributes, methods, and dicts' entries and order, for the block."""
    from torch._dynamo.variables.builder import VariableBuilder

    wrap = VariableBuilder.__call__
    guarded: set[str] = set()

    def wrap_and_guard(self: Any, value: Any) -> Any:
        asked = self.source
        found = wrap(self, value)
        if self.source is not asked:
            # Guards now apply to the wrapped value, such as the module inside a compiled one.
            value = getattr(value, "_orig_mod", None)
        look = _look_of(value)
        name = self.source.name
        if look is not None and name not in guarded:
            guarded.add(name)
            self.install_guards(partial(_guard, look=look, seen=look(value)))
        return found

    with patch.object(VariableBuilder, "__call__", wrap_and_guard):
        yield


def _look_of(value: Any) -> Callable[[Any], Any] | None:
    """The function of a value to compare at each call; None for nothing."""
    if isinstance(value, OrderedDict):
        return _keys
    if isinstance(value, dict):
        return _has_entries
    if isinstance(value, types.MappingProxyType):
        return bool
    if isinstance(value, deque):
        return _limit
    if isinstance(value, type):
        return _members if is_made(value) else None
    if isinstance(value, Tensor) or is_torchs(value):
        return None
    if type(getattr(value, "__dict__", None)) is not dict:
        return _methods if _is_users(type(value)) else None
    return _attributes_and_methods if _is_users(type(value)) else _attributes


def is_torchs(value: Any) -> bool:
    """Whether a value is one of PyTorch's own Python modules or functions."""
    name = value.__name__ if isinstance(value, types.ModuleType) else getattr(value, "__module__", "")
    is_code = isinstance(value, (types.ModuleType, types.FunctionType))
    return is_code and str(name).partition(".")[0] == torch.__name__


def _is_users(kind: type) -> bool:
    """Whether a class may change and is not checked elsewhere, as classes of modules are."""
    return is_made(kind) and not issubclass(kind, nn.Module)


def is_made(kind: type) -> bool:
    """Whether a class comes from a ``class`` statement that is not PyTorch's."""
    return bool(kind.__flags__ & _HEAP_TYPE) and str(kind.__module__).partition(".")[0] != torch.__name__


def _keys(value: OrderedDict[Any, Any]) -> tuple[Any, ...]:
    return tuple(value)


def _attributes_and_methods(value: Any) -> tuple[Any, ...]:
    return (*_attributes(value), *_methods(value))


def _methods(value: Any) -> tuple[Any, ...]:
    return _members(type(value))


def _members(kind: type) -> tuple[Any, ...]:
    """Methods and properties of a class and its bases, and all that their metaclass has."""
    own, of_metaclass = (_in_classes(each.__mro__) for each in (kind, type(kind)))
    return (*(member for member in own if hasattr(type(member), "__get__")), *of_metaclass)


def _in_classes(kinds: Iterable[type]) -> Iterator[Any]:
    return chain.from_iterable(vars(kind).values() for kind in kinds if is_made(kind))


def _limit(value: deque[Any]) -> int | None:
    return value.maxlen


def _has_entries(value: dict[Any, Any]) -> bool:
    return dict.__len__(value) > 0


def _attributes(value: Any) -> tuple[str, ...]:
    return tuple(value.__dict__)


def _guard(builder: Any, guard: Any, *, look: Callable[[Any], Any], seen: Any) -> None:
    """Add a guard that ``look`` of the value still equals ``seen``."""
    from torch._dynamo.guards import _get_closure_vars

    def is_same(value: Any) -> bool:
        return bool(look(value) == seen)

    manager = builder.get_guard_manager(guard)
    what = [f"{look.__name__}({guard.name})"]
    # Guard managers of dicts compare the number of entries, and accept no lambda guards.
    if not isinstance(manager, DictGuardManager):
        manager.add_lambda_guard(is_same, what, None)
    elif look is _keys:
        names = {**_get_closure_vars(), "___is_same": is_same}
        builder.add_python_lambda_leaf_guard_to_root([f"___is_same({guard.name})"], what, closure_vars=names)
