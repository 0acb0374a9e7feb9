"""The steps of a plan, kept from pass to pass."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from functools import lru_cache, partial

from streamcnn.execution.build_step import Arrivals, backward_step, forward_step
from streamcnn.execution.step import Step
from streamcnn.graph.program import Program
from streamcnn.plan.plan import Phase, Plan, TileKind

_KEPT = 512
"""Steps that are kept in each direction: there are more only where every tile is of its own kind."""


class Steps:
    """Makes the steps of one plan when they are first asked for."""

    def __init__(self, program: Program, plan: Plan) -> None:
        phases = {phase.level: phase for phase in plan.phases}
        self.forward: Callable[[int, TileKind], Step] = lru_cache(_KEPT)(partial(_forward, program, phases))
        """The step that computes tiles of a kind, given the level of their phase."""
        self.backward: Callable[[int, Arrivals, TileKind], Step] = lru_cache(_KEPT)(
            partial(_backward, program, phases, plan.differentiated)
        )
        """The step that differentiates them, given what has come to the phase too."""


def _forward(program: Program, phases: Mapping[int, Phase], level: int, kind: TileKind) -> Step:
    return forward_step(program, phases[level], kind)


def _backward(
    program: Program,
    phases: Mapping[int, Phase],
    differentiated: Collection[str],
    level: int,
    arrivals: Arrivals,
    kind: TileKind,
) -> Step:
    return backward_step(program, phases[level], kind, differentiated, arrivals)
