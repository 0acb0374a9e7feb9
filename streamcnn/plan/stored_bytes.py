"""Bytes of stored maps and gradient maps in one tier, at every moment of a pass."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from streamcnn.plan.level_bytes import HeldBytes, LevelBytes
from streamcnn.plan.storage import StorePlan, Tier


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
        stored, kept, gradients = np.zeros((3, num_levels), np.int64)
        for name, store in stores.items():
            made, last = levels[name], store.last_reader
            if store.tier is tier:
                stored[made : num_levels if store.kept else last + 1] += store.nbytes
                kept[made : _backward_end(store, num_levels)] += store.nbytes
            if store.gradient_tier is tier and (store.kept or store.rematerialised is not None):
                gradients[made : last + 1] += store.nbytes
        of_gradients = LevelBytes.of(num_levels, ("gradient maps", gradients))
        forward = LevelBytes.of(num_levels, ("stored maps", stored))
        backward = LevelBytes.of(num_levels, ("stored maps", kept))
        self.held = HeldBytes(forward, tail=forward + of_gradients, backward=backward + of_gradients)

    @property
    def most(self) -> int:
        """The most that is held at any moment."""
        return max(int(self.held.forward.total.max()), int(self.held.backward.total.max()))


def _backward_end(store: StorePlan, num_levels: int) -> int:
    """The first level in whose backward phase a map is not there, of those from its own level on."""
    if store.kept:
        return num_levels
    return 0 if store.rematerialised is None else store.rematerialised + 1
