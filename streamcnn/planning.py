"""From a captured forward pass to a plan for one machine, each thing once.

It gathers what a plan depends on besides the module: the image's shape, the budget, and how fast and how
large the machine is. The machine may be another one than this.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from streamcnn.calibration import rates_for
from streamcnn.capture import RawGraph
from streamcnn.ceiling.device import reserved_bytes
from streamcnn.flattening import Whole
from streamcnn.libraries import Libraries
from streamcnn.plan import Home, Plan, StepKind
from streamcnn.planner import PlanRequest, make_plan
from streamcnn.program import Program, differentiated
from streamcnn.rates import NOMINAL, Rates
from streamcnn.reading import NO_READING, BatchCost
from streamcnn.search import SpillPlace
from streamcnn.surroundings import collector
from streamcnn.tracing import Trace

CONTEXT_BYTES = 960 * 2**20
"""What CUDA, its libraries and the margin take of a card that is not at hand: 765 to 780 MiB were measured on
an H100 with PyTorch 2.11, the margin is 128, and the sum is rounded up to 64."""
_CACHED = 8
"""Plans kept, the most recently used ones."""

T = TypeVar("T")


@dataclass(frozen=True, slots=True, eq=False)
class Machine:
    """What a plan is made for."""

    rates: Rates
    places: tuple[SpillPlace, ...]
    """Where maps go that the device's memory has no room for, the fastest place first."""
    reserved: int
    """Bytes of the budget that are taken before a pass begins."""
    libraries: Libraries

    @classmethod
    def here(cls, device: torch.device) -> Machine:
        """This machine, computing on ``device``; its rates are measured if they never were."""
        places: tuple[SpillPlace, ...] = (SpillPlace(Home.DISK),)
        if device.type != "cpu":
            places = (SpillPlace(Home.HOST), *places)
        libraries = Libraries.card() if device.type == "cuda" else Libraries.host(torch.get_num_threads())
        return cls(rates_for(device), places, reserved_bytes(device), libraries)

    @classmethod
    def card(cls, net: nn.Module, *, host_bytes: int, optimizer_copies: int) -> Machine:
        """A CUDA card that need not be at hand, with nominal rates.

        Parameters
        ----------
        host_bytes
            Host RAM that maps may be spilled to, bytes; what is left goes to the disk.
        optimizer_copies
            Numbers that the optimiser keeps for each parameter: 2 for Adam, 1 for momentum, 0 for plain SGD.
        """
        parameters = sum(p.nbytes for p in net.parameters())
        buffers = sum(b.nbytes for b in net.buffers())
        return cls(
            rates=NOMINAL["cuda"],
            places=(SpillPlace(Home.HOST, host_bytes), SpillPlace(Home.DISK)),
            reserved=CONTEXT_BYTES + (1 + optimizer_copies) * parameters + buffers,
            libraries=Libraries.card(),
        )


@dataclass(frozen=True, slots=True)
class Wish:
    """What a plan is wanted for."""

    shape: tuple[int, int, int, int]
    dtype: torch.dtype
    """Of the image."""
    casts: torch.dtype | None
    """What autocast casts to, if it is on."""
    trainable: frozenset[str]
    """Keys of the states that want a gradient: parameters' qualified names, and further arguments."""
    image_gradient: bool
    budget: int | None
    """Bytes."""
    tile: tuple[int, int] | None
    target: int | None = None
    """Bytes to plan for, where that is less than the budget."""
    tail: bool = True
    """Whether a resident tail may be chosen."""
    reading: BatchCost = NO_READING
    """What reading the images takes in host memory, if that is what the budget is of."""


@dataclass(frozen=True, slots=True, eq=False)
class Planned:
    """A program, the plan to carry it out by, and what is known from having done so."""

    program: Program
    plan: Plan
    compiled: set[StepKind] = field(default_factory=set)
    """Kinds of steps that have been carried out, for which libraries have compiled their code."""


class Planning:
    """The plans of one module's captured forward passes, the most recently used ones."""

    def __init__(self) -> None:
        self._plans: OrderedDict[Any, tuple[RawGraph, Planned]] = OrderedDict()

    def plan(self, captured: Captured, wish: Wish, machine: Machine) -> Planned:
        """The plan for what was captured, whatever mode the module is in by now."""
        key = (captured.settings, wish, machine.reserved, machine.rates.source, machine.libraries)
        graph, planned = _kept(self._plans, key, lambda: (captured.graph, _plan(captured, wish, machine)))
        return planned if graph is captured.graph else _for_graph(planned, graph, captured.graph)


def _for_graph(planned: Planned, known: RawGraph, graph: RawGraph) -> Planned:
    """What was planned for one graph, with the user's own functions and constants of an equal one."""
    targets = {
        id(old.target): new.target
        for old, new in zip(known.nodes, graph.nodes, strict=True)
        if isinstance(old.target, Whole)
    }
    nodes = {
        name: replace(node, target=targets[id(node.target)]) if id(node.target) in targets else node
        for name, node in planned.program.nodes.items()
    }
    constants = {name: graph.constants[name] for name in planned.program.constants}
    return replace(planned, program=replace(planned.program, nodes=nodes, constants=constants))


@dataclass(frozen=True, slots=True, eq=False)
class Captured:
    """A forward pass as it was captured, and the tensors of one call of it."""

    graph: RawGraph
    states: Mapping[str, Tensor]
    """Parameters, buffers and further arguments by key."""
    device: torch.device
    settings: tuple[Any, ...] = field(init=False)
    """What a plan is a function of, besides the wish and the machine."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "settings", (self.device, self.graph.key, _specs(self.states)))


def _kept(cache: OrderedDict[Any, T], key: Any, make: Callable[[], T]) -> T:
    """The value of ``key``, made if it is not there; the oldest goes when there are too many."""
    if key not in cache:
        cache[key] = make()
        if len(cache) > _CACHED:
            cache.popitem(last=False)
    cache.move_to_end(key)
    return cache[key]


def _plan(captured: Captured, wish: Wish, machine: Machine) -> Planned:
    graph = captured.graph
    leaves = {name for name, qualified in graph.states.items() if qualified in wish.trainable}
    if wish.image_gradient:
        leaves.add(graph.image)
    request = PlanRequest(
        image_shape=wish.shape,
        dtype=str(wish.dtype).removeprefix("torch."),
        leaves=frozenset(leaves),
        budget=wish.budget,
        target=wish.target,
        tile=wish.tile,
        reserved=machine.reserved,
        places=machine.places,
        rates=machine.rates,
        libraries=machine.libraries,
        tail=wish.tail,
        reading=wish.reading,
    )

    def gradients(program: Program) -> frozenset[str]:
        return differentiated(program, request.leaves & program.nodes.keys())

    with collector(on=False):
        program = Trace(graph, captured.states, wish.dtype, captured.device).program
        return Planned(*make_plan(program, request, gradients))


def module_dtype(net: nn.Module) -> torch.dtype:
    """The element type of a module's first parameter, or the default one."""
    first = next(net.parameters(), None)
    return torch.get_default_dtype() if first is None else first.dtype


def _specs(states: Mapping[str, Tensor]) -> tuple[Any, ...]:
    return tuple((name, state.shape, state.dtype) for name, state in states.items())
