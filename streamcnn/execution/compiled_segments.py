"""Segments compiled as functions of their inputs, which autograd differentiates like any other operator."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from streamcnn.execution.compiler import Candidate, Compile, Layout, Layouts, Run, refuse_opaque
from streamcnn.execution.global_graph import SegmentCall, evaluate
from streamcnn.graph.autocast import autocast
from streamcnn.graph.program import Kind, Program
from streamcnn.plan.plan import Segment

_MOST = 4
"""The most layouts of its inputs for which a segment is compiled."""


class _Kind(NamedTuple):
    """Segments that are compiled alike."""

    level: int
    grad: bool
    inputs: Layouts


class CompiledSegments:
    """The compiled segments of one plan."""

    def __init__(self, program: Program, compile_module: Compile) -> None:
        self._program = program
        self._compile = compile_module
        self._calls: dict[tuple[int, bool], SegmentCall] = {}
        """By level and whether gradients are recorded."""
        self._met: set[_Kind] = set()
        self._tried: set[_Kind] = set()
        self._compiled: dict[_Kind, Run] = {}

    @property
    def num_compiled(self) -> int:
        """Compiled segments, counted once for each layout of their inputs."""
        return len(self._compiled)

    def call(self, segment: Segment) -> SegmentCall | None:
        """A segment's call in the present grad mode; ``None`` if it is not known or nothing is compiled."""
        return self._calls.get((segment.level, torch.is_grad_enabled())) if self._compiled else None

    def run(self, segment: Segment, inputs: Sequence[Tensor]) -> Sequence[Tensor] | None:
        """The results of a segment; ``None`` if it is not compiled for inputs of these layouts."""
        run = self._compiled.get(_kind(segment, inputs))
        if run is None:
            return None
        with autocast(inputs[0].device, None):
            return run(*inputs)

    def note(self, segment: Segment, call: SegmentCall, inputs: Sequence[Tensor]) -> None:
        """Note the layouts of a segment that was evaluated operator by operator."""
        kind = _kind(segment, inputs)
        alike = {each for each in self._tried | self._met if each[:2] == kind[:2]}
        if call.results and inputs and kind not in self._tried and len(alike) < _MOST:
            self._calls[segment.level, kind.grad] = call
            self._met.add(kind)

    def candidates(self, device: torch.device, casts: torch.dtype | None) -> list[Candidate]:
        """The segments met since the last call; the arguments are those of `CompiledSteps.candidates`."""
        met = sorted(self._met, key=lambda kind: kind.level)
        self._met.clear()
        return [Candidate(f"segment {k.level}", partial(self._compile_one, k, device, casts)) for k in met]

    def drop(self) -> None:
        """Drop everything that is compiled."""
        self._compiled.clear()

    def _compile_one(self, kind: _Kind, device: torch.device, casts: torch.dtype | None) -> None:
        self._tried.add(kind)
        call = self._calls[kind.level, kind.grad]
        refuse_opaque(self._program.nodes[name] for name in call.nodes)
        module = _SegmentModule(self._program, call)
        with FakeTensorMode(), torch.set_grad_enabled(kind.grad), autocast(device, casts, cache=False):
            self._compiled[kind] = self._compile(module, [each.empty() for each in kind.inputs])


def _kind(segment: Segment, inputs: Sequence[Tensor]) -> _Kind:
    return _Kind(segment.level, torch.is_grad_enabled(), tuple(map(Layout.of, inputs)))


class _SegmentModule(nn.Module):
    """The values of a segment as a function of its inputs, in the order of its call."""

    def __init__(self, program: Program, call: SegmentCall) -> None:
        super().__init__()
        self._program = program
        self._call = call

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        given = iter(inputs)
        values: dict[str, Any] = {name: next(given) for name in self._call.leaves}
        for name, count in self._call.barriers:
            results = tuple(next(given) for _ in range(count))
            is_gather = self._program.nodes[name].kind is Kind.GATHER
            values[name] = results[0] if is_gather else results
        value_of: Callable[[str], Any] = values.__getitem__
        for name in self._call.nodes:
            values[name] = evaluate(self._program.nodes[name], value_of)
        return tuple(values[name] for name in self._call.results)
