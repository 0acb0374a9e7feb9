"""Flattening of a model's results into leaves, and rebuilding them, for any nesting."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

from torch.utils import _pytree as pytree

from streamcnn.support.sizes import is_size


def taken_apart(value: Any) -> tuple[list[Any], Callable[[Sequence[Any]], Any]]:
    """The leaves of nested containers and dataclasses, and a function that rebuilds these from leaves."""
    leaves, spec = pytree.tree_flatten(value, is_leaf=is_size)
    inner: list[tuple[int, Callable[[Sequence[Any]], Any]]] = []
    flat: list[Any] = []
    for leaf in leaves:
        if dataclasses.is_dataclass(leaf) and not isinstance(leaf, type):
            names = [each.name for each in dataclasses.fields(leaf)]
            parts, put = taken_apart([getattr(leaf, name) for name in names])
            inner.append((len(parts), _with_fields(leaf, names, put)))
            flat.extend(parts)
        else:
            inner.append((1, _only))
            flat.append(leaf)

    def rebuild(given: Sequence[Any]) -> Any:
        rebuilt, start = [], 0
        for count, put in inner:
            rebuilt.append(put(given[start : start + count]))
            start += count
        return pytree.tree_unflatten(rebuilt, spec)

    return flat, rebuild


def _only(values: Sequence[Any]) -> Any:
    return values[0]


def _with_fields(
    original: Any, names: Sequence[str], put: Callable[[Sequence[Any]], Any]
) -> Callable[[Sequence[Any]], Any]:
    # Without its fields, which hold tensors of the captured pass.
    emptied = copy.copy(original)
    for name in names:
        object.__setattr__(emptied, name, None)

    def rebuild(values: Sequence[Any]) -> Any:
        made = copy.copy(emptied)
        for name, value in zip(names, put(values), strict=True):
            object.__setattr__(made, name, value)
        return made

    return rebuild
