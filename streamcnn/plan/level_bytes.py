"""Bytes held at each level of a pass: named terms and their sums."""

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
        """Add terms up."""
        if len(terms) == 1:
            return cls(terms, terms[0][1])
        return cls(terms, sum((nbytes for _, nbytes in terms), np.zeros(num_levels, np.int64)))

    def __add__(self, other: LevelBytes) -> LevelBytes:
        """The terms of both, with the sum of their totals."""
        return LevelBytes((*self.terms, *other.terms), self.total + other.total)

    def at(self, level: int) -> tuple[MemoryTerm, ...]:
        """The terms at one level, without terms of image reading that are zero."""
        found = (MemoryTerm(name, int(nbytes[level])) for name, nbytes in self.terms)
        return tuple(term for term in found if term.nbytes or term.name not in OF_IMAGES)


@dataclass(frozen=True, slots=True, eq=False)
class HeldBytes:
    """Bytes held at each level in addition to the tensors of a step."""

    forward: LevelBytes
    """While the phase of each level runs forward."""
    segments: LevelBytes
    """While the global values of each level are computed or differentiated."""
    backward: LevelBytes
    """While the phase of each level runs backward."""

    def __add__(self, other: HeldBytes) -> HeldBytes:
        return HeldBytes(
            self.forward + other.forward, self.segments + other.segments, self.backward + other.backward
        )
