"""What the code of a user's ``autograd.Function`` does with the positions of maps, call by call.

Tiles run the code as it is. So every value must come from the same position of each map, and what the
backward pass gives for each operand must be linear in the gradient: overlapping tiles each get a part of a
position's gradient, and what they make of their parts is added up. A gradient for the weights may sum over
positions, since the sums of tiles add up as well. The code is followed as a graph of ATen's operators.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch.fx import GraphModule, Interpreter
from torch.fx import Node as FxNode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils import _pytree as pytree

from streamcnn.graph.ops.pointwise import pointwise
from streamcnn.graph.ops.rules import rule_for
from streamcnn.graph.program import Axes, TensorSpec
from streamcnn.graph.registry import is_seeded
from streamcnn.graph.schemas import bound, operator_name, takes

aten = torch.ops.aten

Role = Literal["rows", "columns"] | None
"""What runs along an axis of a value: rows or columns of the map, or neither."""

ROLES: tuple[Role, Role] = ("rows", "columns")
_OTHER_SIZE: dict[Role, int] = {"rows": 1, "columns": 2, None: 0}
"""What is added to an axis for a map of another size."""
_SAME_SHAPE = frozenset({"alias", "clone", "detach", "expand", "view", "_unsafe_view", "_to_copy", "view_as"})
"""Operators that leave every position alone if they keep the shape."""
_OF_SHAPES = frozenset({"empty_like", "full_like", "ones_like", "zeros_like"})
"""Operators that read no values."""
_SUMS = frozenset({"sum", "mean"})
"""Reductions that are linear."""
_ALONG_AXES = _SUMS | {
    *("_log_softmax", "_softmax", "amax", "amin", "argmax", "argmin", "cumprod", "cumsum"),
    *("linalg_vector_norm", "log_softmax", "logsumexp", "norm", "prod", "softmax", "std", "var"),
}
"""Operators whose argument ``dim`` holds the axis or the axes."""


class PositionsMixed(Exception):
    """Says why a Function does not treat every position alike, or may not do so."""


@dataclass(frozen=True, slots=True)
class Value:
    """What is known of a tensor in a body."""

    spec: TensorSpec
    roles: tuple[Role, ...]
    """What runs along each axis."""
    is_linear: bool = False
    """Whether it is linear in the gradient that the backward pass gets; else it does not depend on it."""
    summed: frozenset[Role] = frozenset()
    """What it is a sum over: the whole value is the sum of those that tiles give."""
    is_zero: bool = False
    """Whether the code makes it of zeros, and changes nothing in place."""

    @classmethod
    def of_map(cls, spec: TensorSpec, axes: Axes, extents: Sequence[int]) -> Value:
        """A map that has ``extents`` along ``axes``, or a single position, which is broadcast."""
        roles: list[Role] = [None] * len(spec.shape)
        for role, axis, extent in zip(ROLES, axes, extents, strict=True):
            if spec.shape[axis] == extent:
                roles[axis] = role
        return cls(spec, tuple(roles))

    @classmethod
    def alike_everywhere(cls, spec: TensorSpec) -> Value:
        """A value that all tiles share."""
        return cls(spec, (None,) * len(spec.shape))

    @property
    def varies(self) -> bool:
        """Whether it has other values in other tiles."""
        return any(self.roles) or self.is_linear

    @property
    def other_size(self) -> tuple[int, ...]:
        """Its shape for a map of another size."""
        return tuple(
            extent + _OTHER_SIZE[role] for extent, role in zip(self.spec.shape, self.roles, strict=True)
        )


class Body:
    """A body as a graph of ATen's operators, and what its values are if every position is treated alike.

    Parameters
    ----------
    body, inputs
        The code, and what it is given.
    rounded
        Types to which gradients are rounded in any case.
    device
        Where it runs.

    Raises
    ------
    PositionsMixed
        If it is not certain that it treats every position alike.
    """

    def __init__(
        self,
        body: GraphModule,
        inputs: Sequence[Value],
        rounded: frozenset[torch.dtype],
        device: torch.device,
    ) -> None:
        self._rounded = rounded
        self._values: dict[FxNode, Value] = {}
        given = iter(inputs)
        traced = make_fx(Interpreter(body).run)(*empty([each.spec for each in inputs], device))
        # What only serves to name a number, as in x[0, 0].numel(), is no longer needed.
        traced.graph.eliminate_dead_code()
        self._overwrites = any(_overwrites(node.target) for node in traced.graph.nodes)
        for node in traced.graph.nodes:
            if node.op == "placeholder":
                self._values[node] = next(given)
            elif node.op == "call_function":
                self._values[node] = self._result(node)
            elif node.op == "output":
                self.results = pytree.tree_map(self._values.get, node.args[0])
            else:
                raise PositionsMixed("it holds a tensor of its own")

    def _result(self, node: FxNode) -> Value:
        """What a call returns."""
        name, result = operator_name(node.target), node.meta.get("val")
        operands = [self._values[each] for each in node.all_input_nodes]
        if not name or not isinstance(result, Tensor) or is_seeded(node.target):
            raise PositionsMixed(f"it calls {node.target}")
        made = Value.alike_everywhere(TensorSpec(tuple(result.shape), result.dtype))
        if not self._overwrites and _makes_zeros(node):
            made = replace(made, is_zero=True)
        if not any(value.varies for value in operands):
            return made
        keeps_shape = name in _SAME_SHAPE and made.spec.shape == operands[0].spec.shape
        if rule_for(node.target) is pointwise or (keeps_shape and node.target is not aten.view.dtype):
            made = _broadcast(node, operands, made)
        elif name in _ALONG_AXES and len(operands) == 1:
            made = _along_axes(node, operands[0], made)
        elif name in _MOVES and len(operands) == 1:
            made = _moved(node, operands[0], made)
        else:
            raise PositionsMixed(f"it may mix positions: {node.target}")
        if name in _OF_SHAPES:
            made = replace(made, is_linear=False)
        if made.is_linear and not self._stays_linear(node, made):
            raise PositionsMixed(f"its gradient is not linear in the one that arrives: {node.target}")
        return made

    def _stays_linear(self, node: FxNode, made: Value) -> bool:
        """Whether a call some of whose operands are linear returns a linear value."""
        name, args = operator_name(node.target), node.args
        values = [self._values[each] for each in node.all_input_nodes]
        if any(value.is_linear and self._rounds(value.spec.dtype, made.spec.dtype) for value in values):
            return False
        linear = [self._values[arg].is_linear if isinstance(arg, FxNode) else None for arg in args]
        if name in _SAME_SHAPE or name in _SUMS or name in _MOVES or name == "neg":
            return True
        if name == "mul":
            return linear.count(True) == 1
        if name == "div":
            return linear[0] is True and True not in linear[1:] and node.kwargs.get("rounding_mode") is None
        if name in ("add", "sub"):
            return linear[:2] == [True, True]
        if name == "where":
            return not linear[0] and all(map(self._is_linear_or_zero, args[1:]))
        if name == "masked_fill":
            return linear[:2] == [True, False] and bool(args[2] == 0)
        return False

    def _is_linear_or_zero(self, arg: Any) -> bool:
        if not isinstance(arg, FxNode):
            return bool(arg == 0)
        return self._values[arg].is_linear or self._values[arg].is_zero

    def _rounds(self, before: torch.dtype, after: torch.dtype) -> bool:
        """Whether a cast rounds, other than to a type to which gradients are rounded in any case."""
        return after not in self._rounded and torch.promote_types(before, after) != after


def _overwrites(target: Any) -> bool:
    """Whether a call changes an operand in place."""
    return isinstance(target, OpOverload) and target._schema.is_mutable


def _makes_zeros(node: FxNode) -> bool:
    """Whether a call returns a new tensor of zeros."""
    match operator_name(node.target):
        case "zeros" | "zeros_like" | "new_zeros":
            return True
        case "full" | "full_like" | "new_full":
            return bool(bound(node.target, node.args, node.kwargs, "fill_value")[0] == 0)
        case "scalar_tensor":
            return bool(node.args[0] == 0)
    return False


def _broadcast(node: FxNode, operands: Sequence[Value], made: Value) -> Value:
    """The result of a call that takes the same position of each operand."""
    roles = list(made.roles)
    for value in operands:
        for axis, role in enumerate(value.roles, len(roles) - len(value.roles)):
            if role is not None:
                if roles[axis] not in (None, role):
                    raise PositionsMixed(f"rows meet columns: {node.target}")
                roles[axis] = role
    present = [role for role in roles if role is not None]
    summed = frozenset(role for value in operands for role in value.summed)
    if len(set(present)) < len(present) or summed.intersection(present):
        raise PositionsMixed(f"positions meet others: {node.target}")
    for value in operands:
        for axis, role in enumerate(value.roles):
            if role != roles[axis - len(value.roles)] and value.spec.shape[axis] != 1:
                raise PositionsMixed(f"it names the shape of a map: {node.target}")
    is_linear = any(value.is_linear for value in operands)
    return replace(made, roles=tuple(roles), is_linear=is_linear, summed=summed)


def _along_axes(node: FxNode, value: Value, made: Value) -> Value:
    """The result of an operator along axes, which may be spatial ones in a sum of gradients."""
    dims, ndim = _dims(node), len(value.roles)
    along = {dim % ndim for dim in dims or range(ndim)}
    over = frozenset(value.roles[axis] for axis in along) - {None}
    if over and not (value.is_linear and operator_name(node.target) == "sum"):
        raise PositionsMixed(f"it mixes positions: {node.target}")
    if len(made.roles) == ndim:
        roles = [None if axis in along else role for axis, role in enumerate(value.roles)]
    else:
        roles = [role for axis, role in enumerate(value.roles) if axis not in along]
    return replace(made, roles=tuple(roles), is_linear=value.is_linear, summed=value.summed | over)


def _moved(node: FxNode, value: Value, made: Value) -> Value:
    """The result of a view: with axes at other places, or with others of one position beside them."""
    roles = list(made.roles)
    if any(value.roles):
        found = _MOVES[operator_name(node.target)](node, value)
        if found is None:
            raise PositionsMixed(f"it moves positions: {node.target}")
        roles = found
    return replace(made, roles=tuple(roles), is_linear=value.is_linear, summed=value.summed)


def _dims(node: FxNode) -> Sequence[int] | None:
    """The argument ``dim`` of a call; None if it has none."""
    if not takes(node.target, "dim"):
        return None
    (dims,) = bound(node.target, node.args, node.kwargs, "dim")
    return [dims] if isinstance(dims, int) else dims


def _permuted(node: FxNode, value: Value) -> list[Role]:
    (dims,) = bound(node.target, node.args, node.kwargs, "dims")
    return [value.roles[axis] for axis in dims]


def _swapped(node: FxNode, value: Value) -> list[Role]:
    first, second = bound(node.target, node.args, node.kwargs, "dim0", "dim1")
    roles = list(value.roles)
    roles[first], roles[second] = roles[second], roles[first]
    return roles


def _with_one_more(node: FxNode, value: Value) -> list[Role]:
    (axis,) = bound(node.target, node.args, node.kwargs, "dim")
    roles = list(value.roles)
    roles.insert(axis % (len(roles) + 1), None)
    return roles


def _with_fewer(node: FxNode, value: Value) -> list[Role] | None:
    dims = _dims(node)
    gone = {dim % len(value.roles) for dim in dims or range(len(value.roles))}
    if any(value.roles[axis] is not None and value.spec.shape[axis] == 1 for axis in gone):
        return None
    return [role for axis, role in enumerate(value.roles) if axis not in gone or value.spec.shape[axis] != 1]


def _repeated(node: FxNode, value: Value) -> list[Role]:
    """New axes in front, and axes of one position that are repeated; the map's own stay as they are."""
    return [None] * (node.meta["val"].dim() - len(value.roles)) + list(value.roles)


def _reshaped(node: FxNode, value: Value) -> None:
    """Where the shape of a value with positions changes, they may become others."""


_MOVES: Mapping[str, Callable[[FxNode, Value], list[Role] | None]] = {
    "_unsafe_view": _reshaped,
    "expand": _repeated,
    "permute": _permuted,
    "reshape": _reshaped,
    "squeeze": _with_fewer,
    "transpose": _swapped,
    "unsqueeze": _with_one_more,
    "view": _reshaped,
}
"""Views, with what runs along the axes of the result; None where positions do not stay what they are."""


def empty(specs: Sequence[TensorSpec], device: torch.device) -> list[Tensor]:
    """Tensors of these shapes and types, without their elements."""
    return [torch.empty(spec.shape, dtype=spec.dtype, device=device) for spec in specs]
