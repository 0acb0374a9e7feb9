"""Bytes of stored maps and gradient maps in one tier, at every moment of a pass."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from streamcnn.plan.level_bytes import HeldBytes, Ints, LevelBytes
from streamcnn.plan.storage import StorePlan, Tier

Flags = NDArray[np.bool_]


@dataclass(frozen=True, slots=True, eq=False)
class Lifetimes:
    """Sizes and lifetimes of stored maps; each array has one entry per map."""

    nbytes: Ints
    made: Ints
    """Level of the phase that writes the map."""
    last_reader: Ints
    """Level of the map's last reader in the forward pass."""
    kept: Flags
    """Whether the map stays until the backward pass, which needs it."""
    rematerialised: Ints
    """Level before whose backward phase the map is computed again, if it is dropped in between; else 0."""

    def held(self, num_levels: int, values: Flags, gradients: Flags) -> HeldBytes:
        """Bytes held while the phases of each level run.

        A map lives from its phase to its last reader, or as long as the backward pass needs it; one that is
        dropped in between lives again from where it is rematerialised to its own backward phase. Its gradient
        map lives from the backward phase of its last reader to its own.

        Parameters
        ----------
        values, gradients
            Masks of the maps, and of the gradient maps, that are counted.
        """
        read, again = self.last_reader + 1, self.rematerialised > 0
        backward_end = np.where(again, self.rematerialised + 1, self.made)

        def lasting(end: Ints, counted: Flags) -> Ints:
            """By level: bytes of counted maps that live from their own level to the one before ``end``."""
            nbytes, changes = self.nbytes * counted, np.zeros(num_levels + 1, np.int64)
            np.add.at(changes, self.made, nbytes)
            np.subtract.at(changes, end, nbytes)
            return changes[:-1].cumsum()

        stored = lasting(np.where(self.kept, num_levels, read), values)
        kept = lasting(np.where(self.kept, num_levels, backward_end), values)
        flow = LevelBytes.of(num_levels, ("gradient maps", lasting(read, gradients & (self.kept | again))))
        forward = LevelBytes.of(num_levels, ("stored maps", stored))
        backward = LevelBytes.of(num_levels, ("stored maps", kept))
        return HeldBytes(forward, segments=forward + flow, backward=backward + flow)


class StoredBytes:
    """Bytes of maps and gradient maps in ``tier`` while the phases of each level run."""

    def __init__(
        self, stores: Mapping[str, StorePlan], levels: Mapping[str, int], tier: Tier = Tier.MEMORY
    ) -> None:
        each = stores.values()
        lifetimes = Lifetimes(
            nbytes=np.array([store.nbytes for store in each], np.int64),
            made=np.array([levels[name] for name in stores], np.int64),
            last_reader=np.array([store.last_reader for store in each], np.int64),
            kept=np.array([store.kept for store in each], np.bool_),
            rematerialised=np.array([store.rematerialised or 0 for store in each], np.int64),
        )
        self.held = lifetimes.held(
            max(levels.values(), default=0) + 1,
            np.array([store.tier is tier for store in each], np.bool_),
            np.array([store.gradient_tier is tier for store in each], np.bool_),
        )

    @property
    def most(self) -> int:
        """The most bytes held at any moment."""
        return max(int(self.held.forward.total.max()), int(self.held.backward.total.max()))
