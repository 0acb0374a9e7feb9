"""Measure bytes that operators and reductions take on a tile, by the allocator in front of PyTorch's own."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, TypeVar
from unittest import mock

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from streamcnn import StreamingModel
from streamcnn.ceiling.kept_blocks import KeptBlocks
from streamcnn.execution import interpreter
from streamcnn.execution.backward_tile import BackwardTile
from streamcnn.execution.interpreter import TileRun
from streamcnn.execution.step import Operator, OwnPart
from streamcnn.graph.costs import CallBytes, Cost, Operation, cost_of, is_view
from streamcnn.graph.ops.reduction_types import Reduction
from streamcnn.graph.program import Program
from streamcnn.planning.backends import CpuBackend

BACKEND = CpuBackend.on(torch.get_num_threads())
T = TypeVar("T")


def most_bytes(call: Callable[[], T]) -> tuple[T, int]:
    """The result of a call, and the most bytes that tensors made in it held."""
    blocks = KeptBlocks(keep=0)
    blocks.enter()
    try:
        return call(), blocks.peak
    finally:
        blocks.leave()


@dataclass(frozen=True)
class Measured:
    """Measured and projected bytes of one call."""

    what: str
    """The operator or reduction, and the direction."""
    nbytes: int
    projected: int
    """The memory model's bytes for it beside its operands."""


@dataclass
class Meter:
    """Measures every operator and reduction of a model's pass in one tile, each by itself."""

    program: Program
    found: list[Measured]

    def operator(self, run: TileRun, operator: Operator) -> None:
        """Measure an operator: forward, or, if autograd is on, forward and backward."""
        alone = replace(operator, target=operator.node.target, is_skipped=False)
        projected = _Projected(self.program, operator)
        if not torch.is_grad_enabled():
            operands = _detached(run, operator, trains=False)
            _, nbytes = most_bytes(lambda: _evaluate(operands, alone))
            self._note(operator, "forward", nbytes, projected.forward)
            return
        operands = _detached(run, operator, trains=True)
        given = (*operands.values.values(), *operands.parts.values())
        leaves = [value for value in given if value.requires_grad]

        def both() -> bool:
            result = _evaluate(operands, alone)
            if result.requires_grad:
                torch.autograd.grad(result, leaves, torch.ones_like(result), allow_unused=True)
            return bool(result.requires_grad)

        is_differentiated, nbytes = most_bytes(both)
        self._note(operator, "backward", nbytes, projected.backward(is_differentiated))

    def _note(self, operator: Operator, direction: str, nbytes: int, projected: int) -> None:
        target, args = operator.node.target, operator.node.args
        name = getattr(target, "__name__", str(target))
        name = f"{name} {args[0]}" if name == "result_of" else name
        self.found.append(Measured(f"{name}, {direction}", nbytes, projected))

    def reduction(self, rule: Reduction, share: Tensor, partial: Callable[[], T]) -> T:
        """Measure the bytes of partial results."""
        found, nbytes = most_bytes(partial)
        projected = _observed([rule], share)
        self.found.append(Measured(f"{_name(rule)}, forward", nbytes, projected))
        return found

    def arriving(self, part: OwnPart, share: Tensor, gradient: Callable[[], T]) -> T:
        """Measure the bytes of reductions' gradients."""
        found, nbytes = most_bytes(gradient)
        rules = list(part.reductions.values())
        projected = share.nbytes + _observed(rules, share)
        self.found.append(Measured(f"{', '.join(map(_name, rules))}, backward", nbytes, projected))
        return found


@dataclass(frozen=True)
class _Projected:
    """The memory model's bytes for one operator of a tile."""

    program: Program
    operator: Operator

    @property
    def cost(self) -> Cost:
        return cost_of(self.operator.node.target)

    @property
    def call(self) -> CallBytes:
        """The arguments of the declared cost's formulas."""
        nodes, node = self.program.nodes, self.operator.node
        weights = sum(nodes[name].nbytes for name in node.operands if not nodes[name].is_map)
        operands = sum(map(self._operand, self.operator.operands))
        return CallBytes(
            operands, self._of_map(node, self.operator.out.size), weights, node.tensor.dtype.itemsize
        )

    @property
    def unused(self) -> int:
        """Bytes for views, which count as memory of their own, and for cropped parts' gradients."""
        operands, nodes = self.operator.operands, self.program.nodes
        return sum(
            self._operand(name)
            for name, operand in operands.items()
            if _may_be_view(nodes[name].target) or operand.part != operand.covered
        )

    @property
    def made(self) -> int:
        """Bytes of the result, and of a padded copy of the operands."""
        local = self.operator.node.local
        assert local is not None
        is_padded = not local.pointwise and local.fill is not None
        return self.call.result + self.call.operands * is_padded + self.unused

    @property
    def forward(self) -> int:
        return self.made + BACKEND.workspace(self.cost, self.call)

    def backward(self, is_differentiated: bool) -> int:
        """Bytes of the result, of values saved beside it, of gradients and of workspace."""
        call, node = self.call, self.operator.node
        beside = self.cost.saves.beside(Operation.of(self.program, node)) if self.cost.saves.beside else 0
        flow = call.result + call.operands + BACKEND.backward_workspace(self.cost, call)
        return max(self.forward, self.made + flow * is_differentiated) + beside + 3 * call.weights

    def _operand(self, name: str) -> int:
        return self._of_map(self.program.nodes[name], self.operator.operands[name].covered.size)

    @staticmethod
    def _of_map(node: Any, size: tuple[int, int]) -> int:
        return int(node.nbytes // (node.size[0] * node.size[1]) * size[0] * size[1])


def _may_be_view(target: Any) -> bool:
    names = ("reshape", "flatten", "movedim", "shuffle", "split")
    return target is None or is_view(target) or any(name in str(target) for name in names)


def _observed(rules: list[Reduction], share: Tensor) -> int:
    return max(2 * share.nbytes, *(rule.workspace(share.numel(), share.itemsize) for rule in rules))


def _name(rule: Reduction) -> str:
    inner = getattr(rule, "reduction", None)
    return f"{type(rule).__name__} of {_name(inner)}" if inner else type(rule).__name__


_evaluate = TileRun.evaluate_operator
_arriving = BackwardTile.arriving
_rules_of = interpreter._outputs_of


def _detached(run: TileRun, operator: Operator, *, trains: bool) -> TileRun:
    """The operator's operands alone, as leaves."""

    def leaf(value: Tensor) -> Tensor:
        return value.detach().requires_grad_(trains and value.requires_grad)

    values = {name: leaf(run.values[name]) for name in operator.node.operands if name in run.values}
    places = [(name, operand.part) for name, operand in operator.operands.items()]
    return TileRun(run.step, values, {at: leaf(run.parts[at]) for at in places if at in run.parts})


def measured_pass(net: nn.Module, shape: tuple[int, ...], dtype: torch.dtype) -> list[Measured]:
    """All measurements of a pass of ``net``, forward and backward, in one tile."""
    model = StreamingModel(net.to(dtype))
    model.resident_tail = False
    meter = Meter(model.planned(shape, dtype, image_gradient=True).program, [])  # type: ignore[arg-type]

    def evaluate(run: TileRun, operator: Operator) -> Tensor:
        meter.operator(run, operator)
        return _evaluate(run, operator)

    def outputs_of(part: OwnPart, name: str, values: Mapping[str, Tensor]) -> Iterator[Any]:
        share = interpreter.crop(values[name], part.axes, part.covered, part.own)
        if part.is_stored:
            yield share
        for reduction, rule in part.reductions.items():
            told = rule.given([values[each] for each in part.beside[reduction]])
            yield meter.reduction(rule, share, lambda told=told: told.partial(share, part.place))  # type: ignore[misc]

    def arriving(tile: BackwardTile, name: str, share: Tensor, total: Tensor | None = None) -> Tensor:
        part = tile.step.owned[name]
        if not part.reductions:
            return _arriving(tile, name, share, total)
        return meter.arriving(part, share, lambda: _arriving(tile, name, share, total))

    with (
        mock.patch.object(TileRun, "evaluate_operator", evaluate),
        mock.patch.object(interpreter, "_outputs_of", outputs_of),
        mock.patch.object(BackwardTile, "arriving", arriving),
    ):
        results = pytree.tree_leaves(model(torch.rand(shape, dtype=dtype, requires_grad=True)))
        roots = [each for each in results if isinstance(each, Tensor) and each.requires_grad]
        torch.autograd.backward(roots, [torch.ones_like(root) for root in roots])
    return meter.found
