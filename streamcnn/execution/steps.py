"""The steps of a plan, cached from pass to pass."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from functools import lru_cache, partial
from itertools import chain

from streamcnn.execution.build_step import Arrivals, backward_step, forward_step
from streamcnn.execution.fused import with_fused_operators
from streamcnn.execution.global_graph import last_uses
from streamcnn.execution.step import Step
from streamcnn.graph.program import Program
from streamcnn.plan.plan import Phase, Plan, TileKind

_KEPT = 512
"""Steps that are cached in each direction: there are more only where every tile is its own kind."""


class Steps:
    """Makes each step of one plan when it is first asked for.

    Parameters
    ----------
    fuses
        Whether operators are fused where one pass over a map replaces several.
    """

    def __init__(self, program: Program, plan: Plan, *, fuses: bool = False) -> None:
        # By identity: a phase that is run again has the level of another one, and tiles of its own.
        phases = {id(phase): phase for phase in (*plan.phases, *chain(*plan.rematerialised.values()))}
        self.fuses = fuses
        self.last_uses = last_uses(program, plan.levels)
        """When each global value can be dropped."""
        self._forward = lru_cache(_KEPT)(partial(_forward, program, phases, fuses))
        self._backward = lru_cache(_KEPT)(partial(_backward, program, phases, fuses, plan.differentiated))

    def forward(self, phase: Phase, kind: TileKind) -> Step:
        """The step that computes tiles of a kind."""
        return self._forward(id(phase), kind)

    def backward(self, phase: Phase, arrivals: Arrivals, kind: TileKind) -> Step:
        """The step that computes tiles of a kind again and differentiates them, given the arrivals."""
        return self._backward(id(phase), arrivals, kind)


def _forward(program: Program, phases: Mapping[int, Phase], fuses: bool, phase: int, kind: TileKind) -> Step:
    step = forward_step(program, phases[phase], kind)
    return with_fused_operators(step) if fuses else step


def _backward(
    program: Program,
    phases: Mapping[int, Phase],
    fuses: bool,
    differentiated: Collection[str],
    phase: int,
    arrivals: Arrivals,
    kind: TileKind,
) -> Step:
    step = backward_step(program, phases[phase], kind, differentiated, arrivals)
    return with_fused_operators(step) if fuses else step
