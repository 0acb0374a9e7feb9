"""Values that autograd saves for the backward pass and that the code overwrites behind its back.

A write through ``.data``, or a norm's update of its statistics, changes no version counter, so plain PyTorch
silently computes gradients with the new value. A streamed pass would use the value from before the write.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from streamcnn.capture.capture import RawNode, moved
from streamcnn.errors import UnsupportedModel
from streamcnn.graph.costs import cost_of, is_view
from streamcnn.graph.flattening import UPDATING
from streamcnn.graph.in_place import revalued
from streamcnn.graph.program import Ref, refs_in


@dataclass(frozen=True, slots=True)
class Overwrite:
    """A write that autograd does not see."""

    memory: Collection[str]
    """Names of all values in the overwritten memory."""
    position: int
    """Number of calls before the write."""
    line: str
    """Line of the user's code; empty if unknown."""


def refuse_saved(
    nodes: Sequence[RawNode], outputs: Any, overwrites: Iterable[Overwrite], examples: Mapping[str, Tensor]
) -> None:
    """Make sure that none of ``overwrites`` changes a value that a gradient needs.

    ``examples`` are fake tensors by name, read for their dtypes.

    Raises
    ------
    UnsupportedModel
        If one does; the text names the operator whose gradient needs the value.
    """
    reached: set[str] | None = None
    touching = _touching(nodes)
    for overwrite in overwrites:
        places = {place for name in overwrite.memory for place in touching.get(name, ())}
        before = [nodes[place] for place in sorted(places) if place < overwrite.position]
        savers = [node for node in before if _saves(node, overwrite.memory)]
        if savers and reached is None:
            reached = _reached_backward(nodes, outputs, examples)
        found = next((node for node in savers if reached is not None and node.name in reached), None)
        if found is not None:
            where = f" in '{overwrite.line}'" if overwrite.line else ""
            raise UnsupportedModel(
                f"the forward pass overwrites a tensor{where} past autograd (by .data, or as a norm moves "
                f"its statistics) whose values the gradient of {found.target} ({found.source or 'the model'})"
                " needs, and plain PyTorch would take the new values for it: overwrite it before its first "
                "use or outside of the forward pass, or change a clone()"
            )


def _touching(nodes: Sequence[RawNode]) -> dict[str, list[int]]:
    """By the name of a value, the places of the call that gives it and of those that read it."""
    found: dict[str, list[int]] = {}
    for place, node in enumerate(nodes):
        for name in (node.name, *node.operands):
            found.setdefault(name, []).append(place)
    return found


def _saves(node: RawNode, memory: Collection[str]) -> bool:
    """Whether autograd saves a value in ``memory`` for the gradient of a call."""
    if not node.grad or node.target in (revalued, moved) or is_view(node.target):
        return False
    saves = cost_of(node.target).saves
    if saves.result and node.name in memory:
        return True
    moves_statistics = node.target in UPDATING and bool(node.args[5])
    if not any(name in memory for name in _operands(node, with_statistics=not moves_statistics)):
        return False
    return saves.operands or (saves.factors and _num_operands(node) > 1)


def _operands(node: RawNode, *, with_statistics: bool) -> tuple[str, ...]:
    """Names of a call's operands, with or without the running statistics of a norm."""
    if node.target in UPDATING and not with_statistics:
        return refs_in((*node.args[:3], *node.args[5:]))
    return node.operands


def _num_operands(node: RawNode) -> int:
    return sum(isinstance(value, Ref) for value in (*node.args, *node.kwargs.values()))


def _reached_backward(nodes: Sequence[RawNode], outputs: Any, examples: Mapping[str, Tensor]) -> set[str]:
    """Names of the values that a gradient of ``outputs`` may reach."""
    reached = set(refs_in(outputs))
    for node in reversed(nodes):
        if node.name not in reached or not node.grad or cost_of(node.target).detaches:
            continue
        operands = node.operands[:1] if node.target is revalued else _operands(node, with_statistics=False)
        reached.update(name for name in operands if _may_have_gradient(examples.get(name)))
    return reached


def _may_have_gradient(example: Tensor | None) -> bool:
    return not isinstance(example, Tensor) or example.is_floating_point() or example.is_complex()
