"""The eager implementation of a step's computation: PyTorch's operators, one after the other.

The step says which operators run on which parts; nothing is decided here. The same code evaluates them in
forward steps, without autograd, and in backward steps, with it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from streamcnn.execution.step import Computed, Operand, Operator, OwnPart, Step
from streamcnn.geometry.regions import Region
from streamcnn.geometry.windows import crop, padded, placed, with_extents
from streamcnn.graph.autocast import as_recorded
from streamcnn.graph.costs import cost_of
from streamcnn.graph.program import Ref, arguments


@dataclass(frozen=True, slots=True)
class TileRun:
    """The operators of a step on one tile."""

    step: Step
    values: dict[str, Tensor]
    """Values that operators read: at first the step's inputs, then the operators' own values too. In a
    backward step, of input maps only those that are read whole."""
    parts: Mapping[tuple[str, Region], Tensor] = field(default_factory=dict)
    """Parts of input maps that have been cropped already."""

    def evaluate(self) -> Iterator[str]:
        """Evaluate the operators in order, and yield the name of each once its value is in ``values``.

        Each value is dropped after its last use.
        """
        for operator in self.step.operators:
            name = operator.node.name
            self.values[name] = self.evaluate_operator(operator)
            yield name
            for dead in self.step.releases.get(name, ()):
                del self.values[dead]

    def evaluate_operator(self, operator: Operator) -> Tensor:
        """The value of one operator on the region that the tile needs."""
        node = operator.node
        if operator.is_plain:
            values = self.values
            plain = [values[arg.name] if type(arg) is Ref else arg for arg in node.args]
            return operator.target(*plain, **node.kwargs, **operator.keywords)  # type: ignore[no-any-return]
        assert node.local is not None
        fill = node.local.fill

        def value_of(name: str) -> Any:
            operand = operator.operands.get(name)
            if operand is None:
                return self.values[name]
            part = self._part(name, operand)
            return part if fill is None else padded(part, operand.axes, operand.part, operand.window, fill)

        args, kwargs = arguments(node, value_of)
        if operator.keywords:
            kwargs = {**kwargs, **operator.keywords}
        if operator.is_skipped:
            shape = with_extents(node.tensor.shape, node.map_axes, operator.result.size)
            stand_in = cost_of(node.target).stand_in
            assert stand_in is not None
            value = stand_in(shape, node.tensor.dtype, args, **kwargs)
        else:
            with as_recorded(grad=node.grad, casts=node.casts):
                value = operator.target(*args, **kwargs)
        if operator.is_placed:
            return value
        return placed(value, node.map_axes, operator.result, operator.out)

    def _part(self, name: str, operand: Operand) -> Tensor:
        part = self.parts.get((name, operand.part)) if self.parts else None
        return crop(self.values[name], operand.axes, operand.covered, operand.part) if part is None else part


def run_forward(step: Step, inputs: list[Tensor]) -> Iterator[Computed]:
    """The outputs of a forward step, each as soon as it is made.

    A value is dropped after its last use, so the caller should drop each output before it asks for the next.
    """
    values = {slot.name: tensor for slot, tensor in zip(step.inputs, inputs, strict=True)}
    inputs.clear()
    for name in [name for name in step.owned if name in values]:
        yield from _outputs_of(step.owned[name], name, values)
    for name in TileRun(step, values).evaluate():
        if name in step.owned:
            yield from _outputs_of(step.owned[name], name, values)


def _outputs_of(part: OwnPart, name: str, values: Mapping[str, Tensor]) -> Iterator[Computed]:
    """The outputs of a forward step for the map ``name``, in the step's order."""
    share = crop(values[name], part.axes, part.covered, part.own)
    if part.is_stored:
        yield share
    for reduction, rule in part.reductions.items():
        yield rule.given([values[each] for each in part.beside[reduction]]).partial(share, part.place)
