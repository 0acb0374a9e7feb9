"""Smaller plans for a pass that was refused memory."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch

from streamcnn.graph.autocast import autocast
from streamcnn.plan.plan import Plan
from streamcnn.planning.spec import Machine, PassSpec
from streamcnn.runtime.plan_cache import Captured, PlanCache, Planned

SMALLEST_TILE = 32
"""Edge of the smallest tile in pixels; below it, halos are nearly all of the work."""
_LESS_PERCENT = (75, 85, 93)
"""Targets of plans that are tried after a refusal, in percent of what the refused plan would allocate."""


class SmallerPlans:
    """Makes smaller plans for a pass, in the grad and autocast modes in which it began."""

    def __init__(
        self,
        plans: PlanCache,
        captured: Captured,
        spec: PassSpec,
        machine: Machine,
        kept: dict[tuple[Any, ...], PassSpec],
    ) -> None:
        self._plans = plans
        self._captured = captured
        self._spec = spec
        self._machine = machine
        self._kept = kept
        self._grad = torch.is_grad_enabled()
        self._found: PassSpec | None = None

    def __call__(self, plan: Plan) -> Planned | None:
        """The next smaller plan after ``plan``; None if there is none."""
        reserved = self._machine.reserved
        for smaller in _smaller_specs(self._spec, plan, reserved):
            with torch.set_grad_enabled(self._grad), autocast(self._captured.device, self._spec.casts):
                found = self._plans.plan(self._captured, smaller, self._machine)
            room = smaller.room(reserved)
            if room is None or found.plan.projected_bytes <= reserved + room:
                self._found = smaller
                return found
        return None

    def keep(self) -> None:
        """Make later passes of the same kind begin with the plan that was found."""
        if self._found is not None:
            self._kept[self._captured.settings, self._spec] = self._found


def _smaller_specs(spec: PassSpec, plan: Plan, reserved: int) -> Iterator[PassSpec]:
    """Specs to plan for after ``plan`` was refused memory: for less of it, or for half the tile asked for."""
    if spec.tile is None:
        for percent in _LESS_PERCENT:
            yield replace(spec, target=(plan.projected_bytes - reserved) * percent // 100)
    elif (tile := _halved(plan.tile)) is not None:
        yield replace(spec, tile=tile)


def _halved(tile: tuple[int, int]) -> tuple[int, int] | None:
    """A tile of half the height and width; None if it cannot get smaller."""
    height, width = tile
    smaller = (min(height, max(SMALLEST_TILE, height // 2)), min(width, max(SMALLEST_TILE, width // 2)))
    return None if smaller == tile else smaller
