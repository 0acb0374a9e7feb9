"""Bytes that are held at every moment of a pass: named terms by level, and their sums."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

import numpy as np
from numpy.typing import NDArray

from streamcnn.plan.reading import OF_IMAGES
from streamcnn.plan.storage import MemoryTerm

Ints = NDArray[np.int64]


@dataclass(frozen=True, slots=True, eq=False)
class LevelBytes:
    """Named terms, each an array of bytes by level; the search reads their sum, a plan their names."""

    terms: tuple[tuple[str, Ints], ...]
    total: Ints
    """By level: the sum of the terms."""

    @classmethod
    def of(cls, num_levels: int, *terms: tuple[str, Ints]) -> Self:
        """The terms with their sum."""
        if len(terms) == 1:
            return cls(terms, terms[0][1])
        return cls(terms, sum((nbytes for _, nbytes in terms), np.zeros(num_levels, np.int64)))

    def __add__(self, other: LevelBytes) -> LevelBytes:
        """Both, one after the other."""
        return LevelBytes((*self.terms, *other.terms), self.total + other.total)

    def at(self, level: int) -> tuple[MemoryTerm, ...]:
        """The terms at one level; those that only some images have are left out where they are zero."""
        found = (MemoryTerm(name, int(nbytes[level])) for name, nbytes in self.terms)
        return tuple(term for term in found if term.nbytes or term.name not in OF_IMAGES)


@dataclass(frozen=True, slots=True, eq=False)
class HeldBytes:
    """What is held beside the steps of a pass."""

    forward: LevelBytes
    """While the phase of each level runs forward."""
    segments: LevelBytes
    """While the global values of each level are worked out or differentiated."""
    backward: LevelBytes
    """While the phase of each level runs backward."""

    def __add__(self, other: HeldBytes) -> HeldBytes:
        return HeldBytes(
            self.forward + other.forward, self.segments + other.segments, self.backward + other.backward
        )
