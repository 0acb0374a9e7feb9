"""Snapshots: all values of an object at one moment, by path, and the differences of two snapshots."""

from __future__ import annotations

import functools
import math
import random
import types
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

FLOOR = 1e-6
"""Share of the largest norm below which a value counts as noise."""
_PLAIN = (bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device, Enum)
_FUNCTIONS = (types.FunctionType, types.BuiltinFunctionType, type)

Snapshot = dict[str, Any]
"""Leaves by path: plain values, texts, and tensors as `Held`."""

_OF_TORCH_COMPILE = ("_is_torch_compile", "_compiled_call_impl")
"""Marks that ``torch.compile`` leaves on the very module that it is given, a net or a model of it."""


@dataclass(frozen=True, slots=True)
class Held:
    """A tensor as it was when the snapshot was taken."""

    what: str
    """Class, type, shape and whether it requires a gradient."""
    value: Tensor | None
    """A copy of the tensor; None for one without values, such as a fake tensor."""


def snapshot(value: Any) -> Snapshot:
    """All leaves of ``value`` by path."""
    found: Snapshot = {}
    _Walk(found).visit("", value)
    return found


class _Walk:
    """Fills a snapshot; an object that is met again is noted as the same as before."""

    def __init__(self, found: Snapshot) -> None:
        self.found = found
        self.met: dict[int, tuple[str, Any]] = {}
        """Path and object by id: the object is held, so that its id stays its own."""

    def visit(self, path: str, value: Any) -> None:
        if isinstance(value, _PLAIN):
            self.found[path] = value
            return
        # Whether two immutable values are one object shows in nothing.
        if not isinstance(value, (tuple, *_FUNCTIONS)):
            if id(value) in self.met:
                self.found[path] = f"the same as '{self.met[id(value)][0]}'"
                return
            self.met[id(value)] = (path, value)
        if isinstance(value, Tensor):
            self.found[path] = _held(value)
        elif isinstance(value, (np.ndarray, np.generic)):
            self._numpy(path, value)
        elif isinstance(value, _FUNCTIONS):
            self.found[path] = f"{type(value).__name__} {value.__qualname__}"
        elif isinstance(value, types.MethodType):
            self.found[path] = f"method {value.__func__.__qualname__}"
            self.visit(f"{path}.__self__", value.__self__)
        elif isinstance(value, functools.partial):
            self.found[path] = "partial"
            self._items(path, {"func": value.func, "args": value.args, "keywords": value.keywords})
        else:
            self.found[path] = type(value).__qualname__
            self._inside(path, value)

    def _numpy(self, path: str, value: Any) -> None:
        numbers = np.asarray(value)
        what = f"{type(value).__name__} {numbers.dtype} {numbers.shape}"
        self.found[path] = Held(
            what, torch.from_numpy(numbers.copy()) if numbers.dtype.kind in "fiub" else None
        )

    def _inside(self, path: str, value: Any) -> None:
        if isinstance(value, Mapping):
            self._items(path, value)
        elif isinstance(value, (list, tuple, deque)):
            self._items(path, dict(enumerate(value)))
        elif isinstance(value, (set, frozenset)):
            self._items(path, dict(enumerate(sorted(value, key=repr))))
        elif isinstance(value, random.Random):
            self.found[f"{path} state"] = str(hash(value.getstate()))
        elif hasattr(type(value), "__slots__"):
            slots = [name for name in type(value).__slots__ if hasattr(value, name)]
            self._attributes(path, {name: getattr(value, name) for name in slots})
        if isinstance(value, nn.Module):
            self._module(path, value)
        elif hasattr(value, "__dict__") and not isinstance(value, types.ModuleType):
            self._attributes(path, vars(value))

    def _items(self, path: str, items: Mapping[Any, Any]) -> None:
        self.found[f"{path} length"] = len(items)
        for index, (key, item) in enumerate(items.items()):
            # Objects as keys have no name that two runs share.
            name = repr(key) if isinstance(key, (*_PLAIN, tuple)) else f"item {index}"
            self.visit(f"{path}[{name}]", item)

    def _module(self, path: str, module: nn.Module) -> None:
        attributes = {name: value for name, value in vars(module).items() if name not in _OF_TORCH_COMPILE}
        for name in tuple(attributes):
            if "hooks" in name and isinstance(attributes[name], Mapping):
                # Their keys are drawn from one counter for all modules.
                attributes[name] = list(attributes[name].values())
        self._attributes(path, attributes)

    def _attributes(self, path: str, attributes: Mapping[str, Any]) -> None:
        for name in sorted(attributes):
            self.visit(f"{path}.{name}" if path else name, attributes[name])


def _held(tensor: Tensor) -> Held:
    hooks = 0
    # Tools put hooks on results, and not on the same ones if modules are entered in another order.
    if isinstance(tensor, nn.Parameter):
        registries = (tensor._backward_hooks, tensor._post_accumulate_grad_hooks)
        hooks = sum(len(registry or ()) for registry in registries)
    what = (
        f"{type(tensor).__name__} {tensor.dtype}"
        f" {'lazy' if nn.parameter.is_lazy(tensor) else tuple(tensor.shape)}"
        f"{' requires gradient' if tensor.requires_grad else ''}{f' {hooks} hooks' if hooks else ''}"
    )
    if isinstance(tensor, FakeTensor) or tensor.is_meta or nn.parameter.is_lazy(tensor):
        return Held(what, None)
    return Held(what, tensor.detach().as_subclass(Tensor).clone())


@dataclass(frozen=True, slots=True)
class Difference:
    """The difference of two leaves at one path."""

    path: str
    error: float
    """``|a - b| / max(|b|, FLOOR * largest)`` of norms; infinite where they cannot be compared."""
    expected: str
    found: str


def differences(expected: Snapshot, found: Snapshot) -> list[Difference]:
    """The difference at every path of either snapshot, in order."""
    floor = FLOOR * max(
        (_norm(leaf.value) for leaf in expected.values() if isinstance(leaf, Held)), default=0.0
    )
    paths: Sequence[str] = [*expected, *(path for path in found if path not in expected)]
    missing = Held("absent", None)
    return [_difference(p, expected.get(p, missing), found.get(p, missing), floor) for p in paths]


def _difference(path: str, expected: Any, found: Any, floor: float) -> Difference:
    # What they share is not what differs.
    whole = not (isinstance(expected, Held) and isinstance(found, Held) and expected.what == found.what)
    return Difference(path, _error(expected, found, floor), _text(expected, whole), _text(found, whole))


def _error(expected: Any, found: Any, floor: float) -> float:
    if type(expected) is not type(found):
        return math.inf
    if isinstance(expected, Held):
        if expected.what != found.what:
            return math.inf
        return 0.0 if expected.value is None else _distance(expected.value, found.value, floor)
    if isinstance(expected, (float, complex)) and expected != found:
        return abs(expected - found) / max(abs(expected), floor, 1e-300)
    return 0.0 if expected == found else math.inf


def _distance(expected: Tensor, found: Tensor, floor: float) -> float:
    wide = torch.complex128 if expected.is_complex() else torch.float64
    a, b = found.to(wide), expected.to(wide)
    apart = _norm(torch.where((a == b) | (a.isnan() & b.isnan()), torch.zeros_like(b), a - b))
    # A maximum would pass over NaN.
    return math.inf if math.isnan(apart) else apart / max(_norm(b), floor, 1e-300)


def _norm(value: Tensor | None) -> float:
    if value is None:
        return 0.0
    return float(
        torch.linalg.vector_norm(value.to(torch.complex128 if value.is_complex() else torch.float64))
    )


def _text(leaf: Any, whole: bool) -> str:
    """A leaf in words, for a tensor without its norm or without its type."""
    if isinstance(leaf, Held):
        return leaf.what if whole or leaf.value is None else f"norm {_norm(leaf.value):.6g}"
    return repr(leaf) if isinstance(leaf, _PLAIN) else str(leaf)
