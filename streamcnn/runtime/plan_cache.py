"""Make the plan of a captured forward pass once, and cache it."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from streamcnn.capture.caller_modes import collector
from streamcnn.capture.capture import RawGraph
from streamcnn.capture.lowering.tracing import Trace
from streamcnn.ceiling.rooms import Room
from streamcnn.data.map_reader import MapReader
from streamcnn.execution.compiled import Compiled
from streamcnn.execution.steps import Steps
from streamcnn.graph.program import Program
from streamcnn.graph.registry import rules_version
from streamcnn.graph.whole import OnlyResult, Whole
from streamcnn.plan.plan import Plan, StepShape
from streamcnn.planning.planner import make_plan
from streamcnn.planning.spec import Machine, PassSpec
from streamcnn.runtime.plan_files import PlanFile
from streamcnn.support.recent import Recent

_NODES = 32_000
"""The most nodes in the programs of all cached plans. Images of many sizes need a plan each, which takes
seconds to make, and 2 to 4 MB with the 500 nodes of a ResNet-50: 64 such plans take at most 250 MB."""
_PLANS = 8
"""Plans that are cached in any case."""
_WORTH_KEEPING = 0.1
"""Seconds that making a plan must take for it to be kept on disk."""


@dataclass(frozen=True, slots=True, eq=False)
class Planned:
    """A program and its plan, with the steps, compiled parts and shapes known from carrying it out."""

    program: Program
    plan: Plan
    steps: Steps
    compiled: Compiled
    carried_out: set[StepShape] = field(default_factory=set)
    """Shapes of steps that have been carried out: libraries have compiled their code for these."""

    @classmethod
    def of(cls, program: Program, plan: Plan, *, fuses: bool) -> Planned:
        """A plan that was never carried out; ``fuses`` is that of :class:`Steps`."""
        return cls(program, plan, Steps(program, plan, fuses=fuses), Compiled(program))


class PlanCache:
    """The most recently used plans of one module's captured forward passes."""

    def __init__(self) -> None:
        self._plans = Recent[Any, tuple[RawGraph, Planned]](_NODES, size=_num_nodes, least=_PLANS)

    def plan(self, captured: Captured, spec: PassSpec, machine: Machine) -> Planned:
        """The plan of a captured forward pass, whatever mode the module is in now."""
        key = (captured.settings, spec, machine, rules_version())
        graph, planned = self._plans.get(key, lambda: (captured.graph, _plan(captured, spec, machine)))
        return planned if graph is captured.graph else _for_graph(planned, graph, captured.graph)

    def programs(self) -> list[Program]:
        """The programs of all cached plans."""
        return [planned.program for _, planned in self._plans.values()]

    def plan_within(
        self,
        captured: Captured,
        spec: PassSpec,
        machine: Machine,
        room: Room | None,
        present: Callable[[PassSpec], PassSpec],
    ) -> tuple[Planned, PassSpec]:
        """The plan within the budget and other limits, and the spec that it was made for.

        ``present`` maps a spec that was refused memory before to the one to plan for instead.
        """
        planned = self.plan(captured, present(spec), machine)
        if room is None or planned.plan.projected_bytes <= room.nbytes:
            return planned, spec
        if spec.budget is not None and spec.budget <= room.nbytes:
            return planned, spec
        for nbytes in dict.fromkeys((room.rounded, room.nbytes)):
            within = replace(spec, budget=nbytes)
            planned = self.plan(captured, present(within), machine)
            if planned.plan.fits:
                break
        return replace(planned, plan=replace(planned.plan, limited_by=str(room))), within


def _num_nodes(planned: tuple[RawGraph, Planned]) -> int:
    return len(planned[1].program.nodes)


def _for_graph(planned: Planned, known: RawGraph, graph: RawGraph) -> Planned:
    """A graph's program and plan, with the user's functions and constants of an equal graph."""
    targets = {
        old.target: new.target
        for old, new in zip(known.nodes, graph.nodes, strict=True)
        if isinstance(old.target, Whole) and isinstance(new.target, Whole)
    }
    constants = {name: graph.constants[name] for name in planned.program.constants}
    if not targets:
        return replace(planned, program=replace(planned.program, constants=constants))

    def of_graph(target: Any) -> Any:
        if isinstance(target, OnlyResult):
            return OnlyResult(targets[target.whole], target.saved_bytes)
        return targets[target] if isinstance(target, Whole) else target

    nodes = {
        name: replace(node, target=of_graph(node.target)) for name, node in planned.program.nodes.items()
    }
    program = replace(planned.program, nodes=nodes, constants=constants)
    found = replace(
        Planned.of(program, planned.plan, fuses=planned.steps.fuses), carried_out=planned.carried_out
    )
    found.compiled.refuse("its own functions and hooks are other ones in every pass")
    return found


@dataclass(frozen=True, slots=True, eq=False)
class Captured:
    """A captured forward pass, and the tensors of one call of it."""

    graph: RawGraph
    states: Mapping[str, Tensor]
    """Parameters, buffers and further arguments by key."""
    device: torch.device
    maps: Mapping[str, MapReader] = field(default_factory=dict)
    """Readers of further arguments that are read by regions, by key; ``states`` has stand-ins for them."""
    settings: tuple[Any, ...] = field(init=False)
    """All that a plan depends on beside the spec and the machine."""

    def __post_init__(self) -> None:
        settings = (self.device, self.graph.key, _specs(self.states), tuple(self.maps))
        object.__setattr__(self, "settings", settings)


def _plan(captured: Captured, spec: PassSpec, machine: Machine) -> Planned:
    fuses = machine.backend.fuses_norms
    with collector.off():
        read = {key: reader.axes for key, reader in captured.maps.items()}
        trace = Trace(
            captured.graph,
            captured.states,
            spec.dtype,
            captured.device,
            read,
            keeps_results=spec.keeps_results,
        )
        file = PlanFile(captured.settings, spec, machine)
        found = file.read(trace.program)
        if found is not None:
            return Planned.of(*found, fuses=fuses)
        began = time.perf_counter()
        program, plan, tail = make_plan(trace.program, spec, machine)
        if time.perf_counter() - began > _WORTH_KEEPING:
            file.write(tail, program, plan)
        return Planned.of(program, plan, fuses=fuses)


def module_dtype(net: nn.Module) -> torch.dtype:
    """The element type of a module's first parameter, or the default one."""
    first = next(net.parameters(), None)
    return torch.get_default_dtype() if first is None else first.dtype


def _specs(states: Mapping[str, Tensor]) -> tuple[Any, ...]:
    return tuple((name, state.shape, state.dtype) for name, state in states.items())
