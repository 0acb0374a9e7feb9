"""Random integers that are the same on every machine and with every version of NumPy.

Only the raw 64-bit words of a counter-based bit generator are used, whose values are fixed by its definition
(Philox4x64-10: Salmon et al., Parallel Random Numbers: As Easy as 1, 2, 3, 2011). Integers, choices and
orders are derived from them here in integer arithmetic, as NumPy's own methods may change between versions.
"""

from __future__ import annotations

import hashlib
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from itertools import accumulate
from typing import TypeVar

import numpy as np

_FORMAT = "streamcnn ultramnist 1"  # part of every key; increased whenever draws change
_NUM_WORDS = 2**64
_WORDS_AT_ONCE = 64

T = TypeVar("T")


class Draws:
    """An endless stream of random integers that depends only on its name and key.

    Streams with different names or keys are independent of each other: ``Draws("layout", seed=0, index=3)``.
    """

    __slots__ = ("_words",)

    def __init__(self, name: str, **key: int | str) -> None:
        parts = [_FORMAT, name, *(f"{part}={value}" for part, value in key.items())]
        digest = hashlib.sha256("\n".join(parts).encode()).digest()
        self._words = _words(np.random.Philox(key=int.from_bytes(digest[:16], "little")))

    def below(self, stop: int) -> int:
        """One of the integers ``0 <= i < stop``, all equally likely; ``stop`` is at most 2^64."""
        assert 0 < stop <= _NUM_WORDS, stop
        # The last words would make small integers more likely than large ones, so they are drawn again.
        fair = _NUM_WORDS - _NUM_WORDS % stop
        word = next(self._words)
        while word >= fair:
            word = next(self._words)
        return word % stop

    def between(self, low: int, high: int) -> int:
        """One of the integers ``low <= i <= high``, all equally likely."""
        return low + self.below(high - low + 1)

    def weighted(self, weights: Sequence[int]) -> int:
        """A position in ``weights``, with a probability proportional to its weight."""
        ends = list(accumulate(weights))
        return bisect_right(ends, self.below(ends[-1]))

    def choice(self, items: Sequence[T]) -> T:
        """One of ``items``, all equally likely."""
        return items[self.below(len(items))]

    def shuffled(self, items: Sequence[T]) -> list[T]:
        """All ``items``, every order equally likely."""
        order = list(items)
        for last in range(len(order) - 1, 0, -1):
            other = self.below(last + 1)
            order[last], order[other] = order[other], order[last]
        return order


def _words(source: np.random.Philox) -> Iterator[int]:
    while True:
        yield from source.random_raw(_WORDS_AT_ONCE).tolist()
