"""What becomes of the maps that could be stored."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum


class Policy(Enum):
    """What becomes of a map that could be stored."""

    KEEP = "keep"
    OFFLOAD_VALUES = "offload values"
    """Offloaded without its gradient map, which lives for a few phases only."""
    OFFLOAD = "offload"
    DROP = "drop"
    """Stored in the forward pass, and rematerialised in the backward pass."""
    RECOMPUTE = "recompute"
    """Not stored: every phase that reads it computes it again."""


@dataclass(frozen=True, slots=True)
class Policies:
    """What becomes of the maps that a staging stores; those that are not named are kept."""

    offloaded: frozenset[str] = frozenset()
    gradients: frozenset[str] = frozenset()
    """Those of the offloaded maps whose gradient maps are offloaded too."""
    dropped: frozenset[str] = frozenset()
    recomputed: frozenset[str] = frozenset()

    def changed(self, policies: Mapping[str, Policy]) -> Policies:
        """The same, with other policies for the maps that ``policies`` names."""

        def named(before: frozenset[str], *chosen: Policy) -> frozenset[str]:
            return before.difference(policies).union(n for n, each in policies.items() if each in chosen)

        return Policies(
            named(self.offloaded, Policy.OFFLOAD, Policy.OFFLOAD_VALUES),
            named(self.gradients, Policy.OFFLOAD),
            named(self.dropped, Policy.DROP),
            named(self.recomputed, Policy.RECOMPUTE),
        )
