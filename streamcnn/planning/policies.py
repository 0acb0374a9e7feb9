"""Policies for maps that could be stored: keep, offload, drop or recompute."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum


class Policy(Enum):
    """A policy for a map that could be stored."""

    KEEP = "keep"
    OFFLOAD_VALUES = "offload values"
    """Offloaded without its gradient map, which lives for only a few phases."""
    OFFLOAD = "offload"
    DROP = "drop"
    """Stored in the forward pass, and rematerialised in the backward pass."""
    RECOMPUTE = "recompute"
    """Not stored: every phase that reads it computes it again."""


@dataclass(frozen=True, slots=True)
class Policies:
    """Policies for the maps that a staging stores; maps not named are kept."""

    offloaded: frozenset[str] = frozenset()
    gradients: frozenset[str] = frozenset()
    """Offloaded maps whose gradient maps are offloaded too."""
    dropped: frozenset[str] = frozenset()
    recomputed: frozenset[str] = frozenset()

    def keeps(self, name: str) -> bool:
        """Whether a map is kept."""
        return not any(name in each for each in (self.offloaded, self.dropped, self.recomputed))

    def changed(self, policies: Mapping[str, Policy]) -> Policies:
        """A copy with new policies for the maps that ``policies`` names."""

        def named(before: frozenset[str], *chosen: Policy) -> frozenset[str]:
            return before.difference(policies).union(n for n, each in policies.items() if each in chosen)

        return Policies(
            named(self.offloaded, Policy.OFFLOAD, Policy.OFFLOAD_VALUES),
            named(self.gradients, Policy.OFFLOAD),
            named(self.dropped, Policy.DROP),
            named(self.recomputed, Policy.RECOMPUTE),
        )
