"""Bytes of stored maps and gradient maps in one tier, at every moment of a pass."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from streamcnn.plan.storage import MemoryTerm, StorePlan, Tier


class StoredBytes:
    """What is held in ``tier`` while the phases of each level run.

    A map lives from its phase to its last reader, or as long as the backward pass needs it; one that is
    dropped in between lives again from where it is rematerialised to its own backward phase. Its gradient map
    lives from the backward phase of its last reader to its own.
    """

    def __init__(
        self, stores: Mapping[str, StorePlan], levels: Mapping[str, int], tier: Tier = Tier.MEMORY
    ) -> None:
        num_levels = max(levels.values(), default=0) + 1
        self._forward, self._kept, self._gradients = np.zeros((3, num_levels), np.int64)
        for name, store in stores.items():
            made, last = levels[name], store.last_reader
            if store.tier is tier:
                self._forward[made : num_levels if store.kept else last + 1] += store.nbytes
                self._kept[made : _backward_end(store, num_levels)] += store.nbytes
            if store.gradient_tier is tier and (store.kept or store.rematerialised is not None):
                self._gradients[made : last + 1] += store.nbytes
        self.forward_bytes = self._forward
        """By level: the sum of what :meth:`forward` names; likewise the next."""
        self.backward_bytes = self._kept + self._gradients

    @property
    def most(self) -> int:
        """The most that is held at any moment."""
        return max(int(self.forward_bytes.max()), int(self.backward_bytes.max()))

    def forward(self, level: int) -> tuple[MemoryTerm, ...]:
        """While the phase of ``level`` runs forward."""
        return (MemoryTerm("stored maps", int(self._forward[level])),)

    def tail(self, level: int) -> tuple[MemoryTerm, ...]:
        """While the global values of ``level``, the last one, are worked out and differentiated."""
        return *self.forward(level), self._gradient_maps(level)

    def backward(self, level: int) -> tuple[MemoryTerm, ...]:
        """While the phase of ``level`` runs backward."""
        return MemoryTerm("stored maps", int(self._kept[level])), self._gradient_maps(level)

    def _gradient_maps(self, level: int) -> MemoryTerm:
        return MemoryTerm("gradient maps", int(self._gradients[level]))


def _backward_end(store: StorePlan, num_levels: int) -> int:
    """The first level in whose backward phase a map is not there, of those from its own level on."""
    if store.kept:
        return num_levels
    return 0 if store.rematerialised is None else store.rematerialised + 1
