"""How operators are streamed: one rule per operator, kept in a registry.

A rule gets a captured call and records, through a :class:`Tracer`, the nodes that carry it out:
local operators with their windows, reductions, global values. If it cannot, it returns :class:`NotStreamable`
with a reason, and the operator runs resident, on whole maps. An operator without a rule is resident too:
unknown is never assumed pointwise. The recorded nodes' costs are declared beside the rule
(:mod:`streamcnn.graph.costs`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import torch

from streamcnn.graph.program import Access, Axes, Ref, TensorSpec
from streamcnn.graph.registry import Registry
from streamcnn.graph.schemas import bound, with_argument

if TYPE_CHECKING:
    from streamcnn.graph.ops.reduction_types import Reduction


@dataclass(frozen=True, slots=True)
class NotStreamable:
    """A rule's result if the call cannot be streamed, with the reason."""

    reason: str


@dataclass(frozen=True, slots=True)
class Call:
    """One captured call, whose arguments' nodes are already recorded."""

    target: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]

    def bind(self, *names: str) -> list[Any]:
        """Values of the schema's arguments ``names``, defaults filled in."""
        return bound(self.target, self.args, self.kwargs, *names)

    def replaced(self, name: str, value: Any) -> Call:
        """The call with another value for the schema's argument ``name``."""
        return Call(self.target, *with_argument(self.target, self.args, self.kwargs, name, value))


class Tracer(Protocol):
    """The interface of rules: what they may ask about operands, and record."""

    resident: bool
    """Whether everything from here on runs on whole values, so that no more maps may be recorded."""

    def spec(self, ref: Ref) -> TensorSpec:
        """Shape and dtype of a recorded value."""

    def axes(self, ref: Ref) -> Axes | None:
        """Spatial axes of a map; ``None`` for a global value."""

    def is_of_maps(self, ref: Ref) -> bool:
        """Whether a value is a map or computed from maps, and not from parameters and constants alone."""

    def recorded(self, ref: Ref) -> Call | None:
        """The call that carries out a local operator; ``None`` for any other value."""

    def fake(self, call: Call) -> Any:
        """The call's result on fake tensors, for its shape and dtype."""

    def global_value(self, target: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Record a call on global values; a tuple of refs if the target returns several tensors."""

    def local(
        self,
        target: Callable[..., Any],
        args: Sequence[Any],
        kwargs: Mapping[str, Any] | None = None,
        *,
        like: torch.Tensor,
        axes: Axes,
        accesses: Mapping[str, Access],
        fill: float | None = None,
        positional: bool = False,
        heavy: bool = False,
    ) -> Ref:
        """Record a local operator whose whole result would be like the fake tensor ``like``."""

    def reduce(self, reduction: Reduction, ref: Ref, *beside: Ref) -> Any:
        """Record a reduction of a map, with the global values that it reads; return a ref for each result."""

    def promote(self, ref: Ref, axes: Axes) -> Ref:
        """Record that a global value with spatial extent is read as a map."""

    def update(self, statistic: Ref, value: Ref) -> None:
        """Record that the call updates ``statistic``, one of its operands, to ``value``."""


Rule = Callable[[Tracer, Call], Any]

_RULES = Registry[Rule]("rule")
_WITHOUT_MAPS = Registry[Rule]("rule for global values")
_BEGINS = Registry[Rule]("rule that begins maps")


def rule(
    *keys: Any, replace: bool = False, without_maps: bool = False, begins: bool = False
) -> Callable[[Rule], Rule]:
    """Register the decorated function as the rule of operators.

    Parameters
    ----------
    keys
        As for :class:`~streamcnn.graph.registry.Registry`; usually exact overloads.
    replace
        Whether to replace the rule of a key that has one, such as a built-in rule. Models that are captured
        or planned afterwards follow the new rule; plans that were made before are no longer used.
    without_maps
        Whether the rule also gets calls without a map among their operands, which otherwise are recorded as
        they are.
    begins
        Whether streaming begins again with a call whose first operand was computed from whole maps and has
        a map's shape: for operators that take most of a network's time, or return larger maps.

    Raises
    ------
    TypeError, ValueError
        For a key that is no operator or function, and for one that has a rule, unless ``replace`` is set.
    """

    def register(function: Rule) -> Rule:
        _RULES.add(keys, function, replace=replace)
        if without_maps:
            _WITHOUT_MAPS.add(keys, function, replace=replace)
        if begins:
            _BEGINS.add(keys, function, replace=replace)
        return function

    return register


def rule_for(target: object, *, without_maps: bool = False) -> Rule | None:
    """The rule for a call with maps among its operands, or for one without; ``None`` if there is none."""
    return (_WITHOUT_MAPS if without_maps else _RULES).get(target)


def begins_maps(target: object) -> bool:
    """Whether streaming begins again with a call of ``target``."""
    return _BEGINS.get(target) is not None


@dataclass(frozen=True, slots=True)
class Sample:
    """A small module and an image shape that test whether a family of operators streams exactly."""

    name: str
    build: Callable[[], torch.nn.Module]
    shape: tuple[int, int, int, int] = (2, 3, 43, 37)
    resident: bool = False
    """Whether an operator is expected to run on a whole map."""
    train: bool = True


Pair = tuple[int, int]
"""A number along the rows and one along the columns."""


def as_pair(value: int | Sequence[int]) -> tuple[int, int]:
    """An integer or a sequence of one or two as (rows, columns)."""
    if isinstance(value, int):
        return (value, value)
    return (value[0], value[-1])


def as_triple(value: int | Sequence[int]) -> tuple[int, int, int]:
    """An integer or a sequence of one or three as (depth, rows, columns)."""
    if isinstance(value, int):
        return (value, value, value)
    return (value[0], value[len(value) // 2], value[-1])
