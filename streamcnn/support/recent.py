"""Values that were asked for last, up to a size: what is dear to make and dear to keep."""

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
    """Values by key, for several threads. When there is too much, the least recently used value goes.

    Parameters
    ----------
    most
        What all values that are kept may add up to: their number, or the sum of their sizes.
    size
        Of one value.
    least
        So many values are kept however large they are.
    """

    def __init__(self, most: int, *, size: Callable[[V], int] = _one, least: int = 1) -> None:
        self._most = most
        self._size = size
        self._least = least
        self._values = OrderedDict[K, V]()
        self._lock = Lock()

    def __reduce__(self) -> tuple[Any, ...]:
        # A copy has nothing yet: values may be what cannot be copied, as the lock cannot.
        return partial(type(self), self._most, size=self._size, least=self._least), ()

    def __len__(self) -> int:
        return len(self._values)

    def values(self) -> list[V]:
        """All that are kept."""
        with self._lock:
            return list(self._values.values())

    def get(self, key: K, make: Callable[[], V]) -> V:
        """The value of ``key``, made if it is not there.

        It is made without the lock. Where several threads make one for the same key, all get the first.
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
