"""Steps of phases compiled as functions of tensors, each recorded as one graph of ATen's operators."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import partial
from operator import itemgetter
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import GraphModule
from torch.fx import Node as FxNode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils import _pytree as pytree

from streamcnn.execution.backward_tile import told_apart
from streamcnn.execution.compiler import Candidate, Compile, Layout, Layouts, refuse_opaque
from streamcnn.execution.eager import compute_eagerly
from streamcnn.execution.step import Compute, Computed, Step
from streamcnn.graph.autocast import autocast
from streamcnn.graph.schemas import operator_name

_KINDS = 4
"""The number of kinds of tiles, the commonest, compiled per phase and direction; the rest are few tiles."""
_MOST = 1024
"""Steps that are tracked: there are more only where each tile is its own kind."""


class CompiledSteps:
    """Makes the functions that compute the steps of one plan, in place of :func:`compute_eagerly`."""

    def __init__(self, compile_module: Compile) -> None:
        self._compile = compile_module
        self._kinds: dict[int, _Kind] = {}

    def __call__(self, step: Step) -> Compute:
        """The function that computes a step, compiled if it is for its inputs' layouts."""
        # By identity: steps are kept with the plan, and comparing them may take longer than a tile.
        if id(step) not in self._kinds and len(self._kinds) >= _MOST:
            return compute_eagerly(step)
        return self._kinds.setdefault(id(step), _Kind(step)).compute

    @property
    def num_compiled(self) -> int:
        """Compiled steps, counted once for each layout of their inputs."""
        return sum(len(kind.compiled) for kind in self._all_kinds())

    def candidates(self, device: torch.device, casts: torch.dtype | None) -> list[Candidate]:
        """The steps worth compiling among those met since the last call.

        Parameters
        ----------
        device, casts
            Where steps run, and the element type to which autocast casts there; ``None`` for no casts.
        """
        groups: dict[str, list[_Kind]] = {}
        for kind in self._all_kinds():
            groups.setdefault(f"phase {kind.step.level} {kind.step.direction}", []).append(kind)
        return [
            Candidate(name, partial(kind.compile, inputs, device, casts, self._compile))
            for name, kinds in groups.items()
            for kind, inputs in _commonest(kinds)
        ]

    def drop(self) -> None:
        """Drop everything that is compiled."""
        for kind in self._all_kinds():
            kind.compiled.clear()

    def _all_kinds(self) -> list[_Kind]:
        # A copy: a pass in another thread may meet new kinds meanwhile.
        return list(self._kinds.values())


@dataclass(slots=True)
class _Kind:
    """The computation of one kind of tile."""

    step: Step
    met: Counter[Layouts] = field(default_factory=Counter)
    """How often inputs of each layout were met for which compiling was not tried yet."""
    tried: set[Layouts] = field(default_factory=set)
    compiled: dict[Layouts, Compute] = field(default_factory=dict)

    def compute(self, inputs: list[Tensor]) -> Iterable[Computed]:
        """The step's outputs."""
        layouts = tuple(map(Layout.of, inputs))
        if layouts in self.compiled:
            return self.compiled[layouts](inputs)
        if layouts not in self.tried:
            self.met[layouts] += 1
        return compute_eagerly(self.step)(inputs)

    def compile(
        self, inputs: Layouts, device: torch.device, casts: torch.dtype | None, compile_module: Compile
    ) -> None:
        """Compile the step for inputs of these layouts. This is tried once, whether it succeeds or not."""
        self.tried.add(inputs)
        self.compiled[inputs] = _compiled(self.step, inputs, device, casts, compile_module)


def _commonest(kinds: list[_Kind]) -> list[tuple[_Kind, Layouts]]:
    """The kinds and layouts that a phase met most often in one direction, up to the number compiled."""
    met = [(count, kind, inputs) for kind in kinds for inputs, count in list(kind.met.items())]
    for kind in kinds:
        kind.met.clear()
    room = max(0, _KINDS - sum(len(kind.tried) for kind in kinds))
    best = sorted(met, key=itemgetter(0), reverse=True)[:room]
    return [(kind, inputs) for _, kind, inputs in best]


def _compiled(
    step: Step,
    inputs: Layouts,
    device: torch.device,
    casts: torch.dtype | None,
    compile_module: Compile,
) -> Compute:
    """A step as one compiled function.

    The step is recorded on tensors without memory, so operators with a faster form for real tensors are
    recorded in their plain form, which can be compiled together with their neighbours.

    Raises
    ------
    CannotCompile
        If an operator cannot be recorded.
    """
    refuse_opaque(operator.node for operator in step.operators)
    outputs: list[Any] = []
    structure: pytree.TreeSpec

    def run_step(*given: Tensor) -> list[Tensor]:
        nonlocal structure
        outputs[:], structure = pytree.tree_flatten([*compute_eagerly(step)(list(given))])
        return [output for output in outputs if output is not None]

    with FakeTensorMode(), torch.no_grad():
        empty = [each.empty() for each in inputs]
        # Autograd would differentiate a GPU's operators on a thread of its own, out of the recorder's sight.
        with autocast(device, casts, cache=False), torch.autograd.set_multithreading_enabled(False):
            graph = make_fx(run_step)(*empty)
        is_there = [output is not None for output in outputs]
        constants = _take_constants(graph)
        # The graph already contains the casts.
        with autocast(device, None):
            run = compile_module(graph, empty)

    def compute(given: list[Tensor]) -> Iterator[Computed]:
        with autocast(device, None):
            found = iter(told_apart([*run(*given)]))
        given.clear()
        values = iter([next(found) if constant is None else constant for constant in constants])
        results = pytree.tree_unflatten([next(values) if there else None for there in is_there], structure)
        del found, values
        # One by one, so that each can be freed once it is handed over.
        while results:
            yield results.pop(0)

    return compute


def _take_constants(graph: GraphModule) -> list[Tensor | None]:
    """Remove results that are constants from a graph.

    Returns
    -------
    list of Tensor or None
        Each result that was removed; ``None`` for those that are left.
    """
    (end,) = graph.graph.find_nodes(op="output")
    (results,) = end.args
    constants = [_constant(graph, result) for result in results]
    end.args = ([result for result, taken in zip(results, constants, strict=True) if taken is None],)
    graph.recompile()
    return constants


def _constant(graph: GraphModule, result: FxNode) -> Tensor | None:
    """The value of a result that is a constant, such as the number of a tile's elements; else None."""
    if operator_name(result.target) != "lift_fresh_copy":
        return None
    (origin,) = result.all_input_nodes
    value: Tensor = getattr(graph, str(origin.target))
    return value
