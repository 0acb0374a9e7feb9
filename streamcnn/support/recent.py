"""A least-recently-used cache of limited size, for values that are costly to compute and to keep."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable
from functools import partial
from threading import Lock
from typing import Any, Generic, TypeVar

K = TypeVar("K", bound=Hashable)
V = TypeVar("V")


def _one(value: object) -> int:
    return 1


class Recent(Generic[K, V]):
    """A thread-safe cache that drops the least recently used values above a size.

    Parameters
    ----------
    most
        Largest sum of the sizes of kept values; by default, their number.
    size
        The size of one value.
    least
        Number of values that are kept whatever their size.
    """

    def __init__(self, most: int, *, size: Callable[[V], int] = _one, least: int = 1) -> None:
        self._most = most
        self._size = size
        self._least = least
        self._values = OrderedDict[K, V]()
        self._lock = Lock()

    def __reduce__(self) -> tuple[Any, ...]:
        # A copy is empty: values, like the lock, may not be copyable.
        return partial(type(self), self._most, size=self._size, least=self._least), ()

    def __len__(self) -> int:
        return len(self._values)

    def values(self) -> list[V]:
        """All kept values."""
        with self._lock:
            return list(self._values.values())

    def get(self, key: K, make: Callable[[], V]) -> V:
        """The value of ``key``, computed by ``make`` if it is not kept.

        ``make`` runs without the lock. If several threads compute the same key, all get the first result.
        """
        with self._lock:
            if key in self._values:
                self._values.move_to_end(key)
                return self._values[key]
        made = make()
        with self._lock:
            value = self._values.setdefault(key, made)
            self._values.move_to_end(key)
            total = sum(map(self._size, self._values.values()))
            while total > self._most and len(self._values) > self._least:
                _, gone = self._values.popitem(last=False)
                total -= self._size(gone)
        return value
