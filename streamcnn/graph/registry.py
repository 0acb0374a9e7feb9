"""Registries of declarations about operators, looked up by the target of a node.

As in ``torch.utils.flop_counter``, a key of a wrong type and a second entry are refused on registration. A
counter of all entries identifies plans that were made with other rules.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from types import FrameType
from typing import Any, Generic, TypeVar

import torch
from torch._ops import OpOverload

T = TypeVar("T")

_PACKAGE = "streamcnn."
_ENTERING = frozenset({"streamcnn.graph.costs", "streamcnn.graph.ops.rules"})
"""Modules whose functions make entries on behalf of their callers."""
_registrations = 0
_from_outside = 0


def rules_version() -> int:
    """Number of entries ever made in all registries, which grows when an operator's rule or cost changes."""
    return _registrations


def all_are_built_in() -> bool:
    """Whether all entries have been made by this package's own modules."""
    return not _from_outside


class Registry(Generic[T]):
    """A mapping from operators to values; the most specific key wins.

    A key is an overload, an operator with all its overloads (``torch.ops.aten.relu``), a function that a
    rule records in an operator's place, a class of callables for its instances, or a ``torch.Tag`` for all
    overloads that carry it and draw no random numbers.

    Parameters
    ----------
    what
        Name of a value for error messages, such as ``"rule"``.
    """

    def __init__(self, what: str) -> None:
        self.what = what
        self._values: dict[Any, T] = {}

    def add(self, keys: Iterable[Any], value: T, *, replace: bool) -> None:
        """Register ``value`` under all of ``keys``, or under none if one is refused.

        Raises
        ------
        TypeError, ValueError
            For an invalid key, and for one that has a value, unless ``replace`` is set.
        """
        global _from_outside, _registrations
        keys = tuple(keys)
        for key in keys:
            if not (callable(key) or isinstance(key, torch.Tag)):
                raise TypeError(f"a {self.what}'s key must be an operator or a function, found {key!r}")
            if key in self._values and not replace:
                raise ValueError(f"{key} has a {self.what} already: replace=True gives it another")
        self._values.update(dict.fromkeys(keys, value))
        _registrations += 1
        _from_outside += not _is_built_in(sys._getframe(1))

    def get(self, target: object) -> T | None:
        """The value for a node's target, or ``None``."""
        found = self._values.get(target)
        if found is not None:
            return found
        return next((self._values[key] for key in _keys(target) if key in self._values), None)


def _is_built_in(frame: FrameType | None) -> bool:
    """Whether a module of this package makes an entry, judged by the caller of the registering function."""
    while frame is not None and _module(frame) in _ENTERING:
        frame = frame.f_back
    return frame is not None and _module(frame).startswith(_PACKAGE)


def _module(frame: FrameType) -> str:
    """The name of the module that a frame's code belongs to; empty if there is none, as for ``exec``."""
    name: str = frame.f_globals.get("__name__", "")
    return name


def _keys(target: object) -> Iterator[Any]:
    """The keys that match a target, the most specific first."""
    yield target
    if isinstance(target, OpOverload):
        yield target.overloadpacket
        if not is_seeded(target):
            yield from target.tags
    else:
        yield type(target)


def is_seeded(target: object) -> bool:
    """Whether a target's tags say that it draws random numbers from PyTorch's generators."""
    return torch.Tag.nondeterministic_seeded in getattr(target, "tags", ())
