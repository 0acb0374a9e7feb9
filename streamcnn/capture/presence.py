"""What Dynamo has no guards for: which attributes there are, and whether anything is in a dict.

Dynamo guards what it finds. Where code looks for what is not there (``"scale" in vars(self)``, ``hasattr`` of
a module or function, ``except AttributeError``, ``if self.options``), it often guards nothing, and a capture
would be used on when that has come. So everything that Dynamo reads under a name gets one more guard.
"""

from __future__ import annotations

import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch._C._dynamo.guards import DictGuardManager

_OTHERS = (Tensor, type)
"""What has attributes and is not looked into: tensors have guards of their own, and so have classes."""


@contextmanager
def presence_guarded() -> Iterator[None]:
    """A block in which Dynamo also guards which attributes there are, and whether dicts are empty."""
    from torch._dynamo.variables.builder import VariableBuilder

    wrap = VariableBuilder.__call__
    guarded: set[str] = set()

    def wrap_and_guard(self: Any, value: Any) -> Any:
        asked = self.source
        found = wrap(self, value)
        if self.source is not asked:
            # Guards are now those of what it has inside: of a compiled module, the module.
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
    """What to compare of a value at each call; None for nothing."""
    if isinstance(value, dict):
        return _has_entries
    if isinstance(value, types.MappingProxyType):
        return bool
    if isinstance(value, _OTHERS) or type(getattr(value, "__dict__", None)) is not dict or _is_torchs(value):
        return None
    return _attributes


def _is_torchs(value: Any) -> bool:
    """Whether it is a module or function of PyTorch's own."""
    name = value.__name__ if isinstance(value, types.ModuleType) else getattr(value, "__module__", "")
    is_code = isinstance(value, (types.ModuleType, types.FunctionType))
    return is_code and str(name).partition(".")[0] == torch.__name__


def _has_entries(value: dict[Any, Any]) -> bool:
    return dict.__len__(value) > 0


def _attributes(value: Any) -> tuple[str, ...]:
    return tuple(value.__dict__)


def _guard(builder: Any, guard: Any, *, look: Callable[[Any], Any], seen: Any) -> None:
    """Add a guard that compares ``look`` of a value with what was ``seen``."""

    def is_same(value: Any) -> bool:
        return bool(look(value) == seen)

    manager = builder.get_guard_manager(guard)
    # Those of dicts compare the number of entries, and take no further guards.
    if not isinstance(manager, DictGuardManager):
        manager.add_lambda_guard(is_same, [f"{look.__name__}({guard.name})"], None)
