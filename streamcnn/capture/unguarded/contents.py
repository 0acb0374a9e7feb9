"""What code may change besides tensors, taken down to be compared and put back."""

from __future__ import annotations

import functools
import random
import types
import weakref
from collections import deque
from collections.abc import Iterator
from typing import Any

import numpy as np
from torch import Tensor, nn

NO_HELPERS = (nn.Module, Tensor, type, types.ModuleType, types.FunctionType, types.MethodType, weakref.ref)
"""Types of objects whose attributes are not taken down."""
_CONTAINERS = (dict, list, set, deque)


class Contents:
    """The contents of containers and closure cells, and of those within them, tuples and objects.

    Parameters
    ----------
    no_helpers
        Types of objects whose attributes are not taken down.
    """

    def __init__(self, no_helpers: tuple[type, ...] = NO_HELPERS) -> None:
        self._no_helpers = no_helpers
        self._held: dict[int, tuple[Any, Any]] = {}

    def __iter__(self) -> Iterator[tuple[Any, Any]]:
        """Each container or cell, with what it held."""
        return iter(self._held.values())

    def keep(self, value: Any) -> None:
        """Take down what ``value`` holds now, if it holds anything, and what is within that."""
        pending = [value]
        while pending:
            value = pending.pop()
            if isinstance(value, (*_CONTAINERS, types.CellType)):
                if id(value) not in self._held:
                    contents = contents_of(value)
                    self._held[id(value)] = value, contents
                    pending += _inner(value, contents)
            elif isinstance(value, tuple):
                pending += value
            elif isinstance(value, functools.partial):
                pending += value.func, value.args, value.keywords, vars(value)
            elif isinstance(getattr(value, "__dict__", None), dict) and not isinstance(
                value, self._no_helpers
            ):
                pending.append(vars(value))

    def changed(self) -> list[tuple[Any, Any]]:
        """The containers and cells that hold something else now, each with what it held."""
        return [(holder, before) for holder, before in self if not _is_same(holder, before)]


def contents_of(holder: Any) -> Any:
    """A copy of what a container holds, or what a closure cell holds; None of a cell without a value."""
    if isinstance(holder, types.CellType):
        try:
            return holder.cell_contents
        except ValueError:
            return None
    return dict(holder) if isinstance(holder, dict) else list(holder)


def put_back(holder: Any, before: Any) -> None:
    """Give a container or cell the contents that it had ``before``."""
    if isinstance(holder, types.CellType):
        holder.cell_contents = before
        return
    holder.clear()
    (holder.extend if isinstance(holder, (list, deque)) else holder.update)(before)


def _inner(holder: Any, contents: Any) -> list[Any]:
    if isinstance(holder, types.CellType):
        return [contents]
    return list(contents.values() if isinstance(contents, dict) else contents)


def _is_same(holder: Any, before: Any) -> bool:
    now = contents_of(holder)
    if isinstance(holder, types.CellType):
        return now is before
    if len(now) != len(before):
        return False
    if isinstance(now, dict):
        return all(name in before and value is before[name] for name, value in now.items())
    return all(a is b for a, b in zip(now, before, strict=True))


class HostRandom:
    """The states of Python's and NumPy's random numbers when it is made."""

    def __init__(self) -> None:
        self._of_python, self._of_numpy = random.getstate(), np.random.get_state()

    def is_unchanged(self) -> bool:
        """Whether nothing was drawn since."""
        of_numpy = zip(np.random.get_state(), self._of_numpy, strict=True)
        return random.getstate() == self._of_python and all(np.array_equal(a, b) for a, b in of_numpy)

    def restore(self) -> None:
        """Have the same numbers drawn again."""
        random.setstate(self._of_python)
        np.random.set_state(self._of_numpy)
