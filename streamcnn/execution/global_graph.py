"""The global values of a pass: evaluated once, differentiated segment by segment.

A segment holds the global values of one level. Ordinary autograd runs within it, and values from elsewhere
are leaves. So the backward pass can differentiate a segment once all later phases have delivered their
gradients, and before any earlier phase runs.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from streamcnn.graph.autocast import as_recorded
from streamcnn.graph.costs import cost_of
from streamcnn.graph.program import Kind, Node, Program, TensorSpec, arguments, has_gradient, sum_dtype
from streamcnn.plan.plan import Segment

Results = tuple[Tensor, ...]
LastUses = Mapping[str, tuple[str, ...]]
"""For each global value, the values of which it is the last reader."""


class SegmentCall(NamedTuple):
    """A segment as a function of tensors."""

    leaves: tuple[str, ...]
    """Global values of other segments, and states, that the segment reads."""
    barriers: tuple[tuple[str, int], ...]
    """The segment's reductions and gathers, each with the number of its results."""
    nodes: tuple[str, ...]
    """The nodes that it computes, in order."""
    results: tuple[str, ...]
    """Its values that are read outside of the segment."""
    gathered: tuple[str, ...]
    """Gathered maps that are read outside of the segment."""


class SegmentRunner(Protocol):
    """Carries out segments in another way than operator by operator, where it can."""

    def call(self, segment: Segment) -> SegmentCall | None:
        """The segment's call; ``None`` if the runner cannot carry it out in the present grad mode."""

    def run(self, segment: Segment, inputs: Sequence[Tensor]) -> Sequence[Tensor] | None:
        """The results, given leaves and results of barriers; ``None`` if it cannot run on such inputs."""

    def note(self, segment: Segment, call: SegmentCall, inputs: Sequence[Tensor]) -> None:
        """Note that a segment was carried out operator by operator."""


def evaluate(node: Node, value_of: Callable[[str], Any]) -> Any:
    """The result of a node that computes global values, given the values of others by name."""
    assert node.target is not None
    args, kwargs = arguments(node, value_of)
    if node.target is operator.getitem:
        # Most nodes: the items of what others return.
        return args[0][args[1]]
    target = cost_of(node.target).on_whole or node.target
    with as_recorded(grad=node.grad, casts=node.casts):
        return target(*args, **kwargs)


_Place = tuple[str, int]
"""A leaf's name and 0, or a barrier's name and the index of one of its results."""


@dataclass(slots=True)
class _Record:
    """A segment's autograd graph between forward and backward."""

    leaves: dict[str, Tensor] = field(default_factory=dict)
    """Global values from earlier segments and states, by name."""
    barriers: dict[str, Results] = field(default_factory=dict)
    """Results of reductions and gathered maps, by name."""
    values: dict[str, Any] = field(default_factory=dict)

    def starts(self) -> dict[_Place, Tensor]:
        """Leaves and results of barriers that have gradients."""
        leaves = (((name, 0), leaf) for name, leaf in self.leaves.items())
        results = (
            ((name, index), result)
            for name, each in self.barriers.items()
            for index, result in enumerate(each)
        )
        return {place: tensor for place, tensor in chain(leaves, results) if tensor.requires_grad}


class _Ending(torch.autograd.Function):
    """A value whose gradient goes to ``end``, a tensor of its shape that takes no memory."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, end: Tensor) -> Tensor:
        return value.detach()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[None, Tensor]:
        return None, grads[0]


class GlobalGraph:
    """Values and gradients of all global values of one pass."""

    def __init__(
        self,
        program: Program,
        states: Mapping[str, Tensor],
        differentiated: frozenset[str],
        last_uses: LastUses,
        runner: SegmentRunner | None,
    ) -> None:
        self.program = program
        self._runner = runner
        self.differentiated = differentiated
        self.values: dict[str, Any] = {name: tensor.detach() for name, tensor in states.items()}
        """Detached values by node name; states included."""
        self.gradients: dict[str, Tensor] = {}
        self.gradient_terms: dict[str, Results] = {}
        """By reduction whose results have gradients, once its segment has been differentiated: the terms from
        which tiles compute their gradients."""
        self._last_uses = last_uses
        self._summed: set[str] = set()
        """Names whose gradient is a sum made here."""
        self._records: dict[int, _Record] = {}

    def run(self, segment: Segment, barrier: Callable[[Node], Results], *, record: bool) -> None:
        """Evaluate a segment; ``barrier`` returns the results of its reductions and gathers."""
        current = _Record()
        with torch.set_grad_enabled(record):
            if not self._run_otherwise(segment, current, barrier):
                self._run_nodes(segment, current, barrier)
                self._note(segment, current)
        for name, value in current.values.items():
            if isinstance(value, Tensor):
                self.values[name] = value.detach()
        if record:
            self._records[segment.level] = current

    def _run_nodes(self, segment: Segment, current: _Record, barrier: Callable[[Node], Results]) -> None:
        """Evaluate a segment operator by operator."""
        values, nodes = current.values, self.program.nodes

        def value_of(name: str) -> Any:
            return values[name] if name in values else self._read(name, current)

        for name in segment.nodes:
            node = nodes[name]
            if node.kind is Kind.GLOBAL:
                values[name] = evaluate(node, value_of)
            else:
                results = self._reached(node, current, barrier)
                values[name] = results[0] if node.kind is Kind.GATHER else results
            for dead in self._last_uses.get(name, ()):
                values.pop(dead, None)

    def _reached(self, node: Node, current: _Record, barrier: Callable[[Node], Results]) -> Results:
        """The results of a reduction or gather, at which autograd stops."""
        if node.kind is Kind.GATHER and self._runner is None:
            return self._gathered(node, current, barrier)
        if node.name not in current.barriers:
            results = tuple(self._leaf(node.name, tensor) for tensor in barrier(node))
            current.barriers[node.name] = results
        return current.barriers[node.name]

    def _gathered(self, node: Node, current: _Record, barrier: Callable[[Node], Results]) -> Results:
        """A whole map, kept alive only by its readers and by tensors that autograd saves for them."""
        (whole,) = barrier(node)
        end = self._leaf(node.name, whole.new_empty(()).expand(whole.shape))
        current.barriers[node.name] = (end,)
        return (_Ending.apply(whole, end) if end.requires_grad else whole,)  # type: ignore[no-untyped-call]

    def _read(self, name: str, current: _Record) -> Tensor:
        """A value of another segment, at which autograd stops."""
        if name not in current.leaves:
            current.leaves[name] = self._leaf(name, self.values[name])
        return current.leaves[name]

    def _run_otherwise(self, segment: Segment, current: _Record, barrier: Callable[[Node], Results]) -> bool:
        """Let the runner carry the segment out, if it can; return whether it did."""
        if self._runner is None:
            return False
        call = self._runner.call(segment)
        if call is None:
            return False
        for name in call.leaves:
            self._read(name, current)
        for name, _ in call.barriers:
            self._reached(self.program.nodes[name], current, barrier)
        found = self._runner.run(segment, _inputs(current))
        if found is not None:
            current.values.update(zip(call.results, found, strict=True))
            current.values.update({name: current.barriers[name][0] for name in call.gathered})
        return found is not None

    def _note(self, segment: Segment, current: _Record) -> None:
        """Tell the runner about a segment that was carried out without it."""
        if self._runner is None:
            return
        kinds = {name: self.program.nodes[name].kind for name in segment.nodes}
        read = [name for name, value in current.values.items() if isinstance(value, Tensor)]
        call = SegmentCall(
            leaves=tuple(current.leaves),
            barriers=tuple((name, len(results)) for name, results in current.barriers.items()),
            nodes=tuple(name for name, kind in kinds.items() if kind is Kind.GLOBAL),
            results=tuple(name for name in read if kinds[name] is Kind.GLOBAL),
            gathered=tuple(name for name in read if kinds[name] is Kind.GATHER),
        )
        self._runner.note(segment, call, _inputs(current))

    def _leaf(self, name: str, tensor: Tensor) -> Tensor:
        wanted = name in self.differentiated and has_gradient(tensor.dtype) and torch.is_grad_enabled()
        # Nothing that gets here has a graph, and nothing is written to it.
        return tensor.detach().requires_grad_() if wanted else tensor

    def accumulate(self, name: str, gradient: Tensor | None) -> None:
        """Add to the gradient of a global value; :meth:`take` gives the sum in the value's own type."""
        if gradient is None:
            return
        known = self.gradients.get(name)
        if known is None:
            self.gradients[name] = gradient
        elif name in self._summed:
            known.add_(gradient)
        else:
            # The caller may share the first gradient, so nothing is added to it in place. Nor is it summed
            # in half precision, which would lose the shares of many tiles.
            self.gradients[name] = known.to(sum_dtype(known.dtype)) + gradient
            self._summed.add(name)

    def take(self, name: str) -> Tensor:
        """Remove and return the gradient of a global value."""
        gradient = self.gradients.pop(name)
        self._summed.discard(name)
        spec = self.program.nodes[name].spec
        return gradient.to(spec.dtype) if isinstance(spec, TensorSpec) else gradient

    def backward(self, level: int) -> dict[str, Tensor]:
        """Differentiate the segment of ``level``; return the gradients of its gathers by name."""
        record = self._records.pop(level, None)
        if record is None:
            return {}
        for name in record.values:
            # All readers are later phases and segments, which are done.
            self.values.pop(name, None)
        ends = [
            (value, self.take(name))
            for name, value in record.values.items()
            if name in self.gradients and value.requires_grad
        ]
        starts = record.starts()
        if not ends or not starts:
            return {}
        outputs, gradients = zip(*ends, strict=True)
        # So that what autograd has saved can be freed as soon as it has been used.
        record.values.clear()
        ends.clear()
        found = torch.autograd.grad(outputs, [*starts.values()], gradients, allow_unused=True)
        return self._hand_on(record, dict(zip(starts, found, strict=True)))

    def _hand_on(self, record: _Record, found: Mapping[_Place, Tensor | None]) -> dict[str, Tensor]:
        """Keep the gradients of a segment's leaves and reductions; return those of its gathers by name."""
        for name in record.leaves:
            self.accumulate(name, found.get((name, 0)))
        gathered: dict[str, Tensor] = {}
        for name, results in record.barriers.items():
            gradients = tuple(found.get((name, index)) for index in range(len(results)))
            node = self.program.nodes[name]
            if node.reduction is None:
                gathered.update((name, each) for each in gradients if each is not None)
            elif any(each is not None for each in gradients):
                dtype = self.program.nodes[node.operands[0]].tensor.dtype
                detached = [leaf.detach() for leaf in results]
                self.gradient_terms[name] = node.reduction.gradient_terms(detached, gradients, dtype)
        return gathered


def _inputs(record: _Record) -> list[Tensor]:
    """The inputs of a segment: leaves, then results of barriers."""
    return [*record.leaves.values(), *chain(*record.barriers.values())]


def last_uses(program: Program, levels: Mapping[str, int]) -> LastUses:
    """For each global value, the values of which it is the last reader and that nothing else needs.

    Values that a map reads too, or that the model returns, stay until the backward pass.
    """
    asked = {*program.output_names, *program.updates.values()}
    last: dict[str, str] = {}
    # Levels run one after the other, whatever the order of the program.
    for node in sorted(program.nodes.values(), key=lambda node: levels.get(node.name, 0)):
        for name in node.operands:
            if node.kind is Kind.GLOBAL:
                last[name] = node.name
            else:
                asked.add(name)
    dead: dict[str, list[str]] = {}
    for name, reader in last.items():
        if program.nodes[name].kind in (Kind.GLOBAL, Kind.GATHER, Kind.REDUCTION) and name not in asked:
            dead.setdefault(reader, []).append(name)
    return {reader: tuple(names) for reader, names in dead.items()}
