"""A captured model as plain data: one list of operations over maps and global values.

Planning and execution share a :class:`Program`. Of the module it holds no tensors: parameters and buffers
are named, and looked up in the user's module when a pass starts.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import torch
from torch.utils import _pytree as pytree

from streamcnn.geometry.axis_maps import AxisMap, Same
from streamcnn.geometry.windows import Axes as Axes
from streamcnn.graph.autocast import Casts

if TYPE_CHECKING:
    from streamcnn.graph.ops.reduction_types import Reduction


@dataclass(frozen=True, slots=True)
class Ref:
    """Stands for the value of another node among a node's arguments."""

    name: str


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """Shape and dtype of one tensor."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def numel(self) -> int:
        """Number of elements."""
        count = 1
        for extent in self.shape:
            count *= extent
        return count

    @property
    def nbytes(self) -> int:
        """Bytes of a dense tensor."""
        return self.numel * self.dtype.itemsize

    @property
    def gradient_bytes(self) -> int:
        """Bytes of its gradient while tiles' contributions are summed, in :func:`sum_dtype`."""
        return self.numel * sum_dtype(self.dtype).itemsize


class Kind(Enum):
    """What a node produces, and how it is carried out."""

    IMAGE = "image"
    """The map that the user passes in, or one that is read by regions beside it, such as a mask."""
    LOCAL = "local"
    """A map, computed tile by tile."""
    PROMOTED = "promoted"
    """A global value with spatial extent, read as a map."""
    REDUCTION = "reduction"
    """A global value that needs every position of a map."""
    GATHER = "gather"
    """A whole map taken as a global value, for an operator that must be resident."""
    RESULT = "result"
    """A map that stays stored when the pass is over, for the caller to read."""
    GLOBAL = "global"
    """A global value computed once from global values."""
    STATE = "state"
    """A parameter, buffer or constant of the user's module."""


class Access(NamedTuple):
    """How a local operator reads one of its map operands, per axis (rows, columns)."""

    rows: AxisMap = Same()
    cols: AxisMap = Same()


@dataclass(frozen=True, slots=True)
class Local:
    """How a local operator runs on a tile.

    The interpreter crops each map operand to the window that its access asks for, pads with ``fill`` outside
    of the operand, and calls the node's target. With ``fill=None`` the operand is only cropped, and the
    target's result is cropped or zero-padded to the region wanted.
    """

    accesses: Mapping[str, Access]
    fill: float | None = None
    positional: bool = False
    """The target also takes ``out`` (the region wanted) and ``origin`` (that of its first map operand)."""
    heavy: bool = False
    """Does more than a few operations per element, so recomputing it is not free."""
    pointwise: bool = field(init=False)
    """Whether every output position reads the same position only, at little cost."""

    def __post_init__(self) -> None:
        pointwise = not self.heavy and all(
            axis.pointwise for access in self.accesses.values() for axis in access
        )
        object.__setattr__(self, "pointwise", pointwise)


@dataclass(frozen=True, slots=True)
class Node:
    """One operation, in the order of execution."""

    name: str
    kind: Kind
    target: Callable[..., Any] | None
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    spec: TensorSpec | tuple[TensorSpec, ...]
    axes: Axes | None = None
    local: Local | None = None
    reduction: Reduction | None = None
    source: str = ""
    """The submodule of the user's model that it comes from."""
    line: str = field(default="", compare=False)
    """The line of the user's code, with its file; empty if unknown."""
    note: str = ""
    """Reason why an operator is resident."""
    in_place: Callable[..., Any] | None = None
    """The in-place form of ``target``, if the user's model calls that."""
    grad: bool = True
    """Whether autograd records it: false in the model's ``no_grad`` blocks, and for operators that detach."""
    casts: Casts | None = None
    """Autocast as a block of the model sets it; ``None`` as it is around the pass."""
    view_of: str = ""
    """The operand whose memory a global value shares; empty if it has its own."""

    operands: tuple[str, ...] = field(init=False, compare=False)
    """Names of the nodes it reads, each once."""

    is_flat: bool = field(init=False, compare=False)
    """Whether refs are arguments themselves, and in no list, and none are keyword arguments."""
    nbytes: int = field(init=False, compare=False)
    """Bytes of all results."""
    size: tuple[int, int] = field(init=False, compare=False)
    """Spatial extents (H, W) of a map; (0, 0) for other values."""

    def __post_init__(self) -> None:
        refs = _refs((self.args, dict(self.kwargs)))
        object.__setattr__(self, "operands", _names(refs))
        object.__setattr__(self, "is_flat", len(refs) == sum(isinstance(arg, Ref) for arg in self.args))
        object.__setattr__(self, "nbytes", sum(spec.nbytes for spec in self.specs))
        size = (0, 0) if self.axes is None else tuple(self.tensor.shape[axis] for axis in self.axes)
        object.__setattr__(self, "size", size)

    @property
    def map_axes(self) -> Axes:
        """Positions of H and W in the shape of a map."""
        assert self.axes is not None, f"{self.name} is no map"
        return self.axes

    @property
    def specs(self) -> tuple[TensorSpec, ...]:
        """The specs of all results."""
        return self.spec if isinstance(self.spec, tuple) else (self.spec,)

    @property
    def tensor(self) -> TensorSpec:
        """The spec of a node with a single result."""
        assert isinstance(self.spec, TensorSpec), self.name
        return self.spec

    @property
    def is_map(self) -> bool:
        """Whether the value is a map."""
        return self.kind in (Kind.IMAGE, Kind.LOCAL, Kind.PROMOTED)


@dataclass(frozen=True, slots=True)
class Program:
    """A model captured at one input shape and mode."""

    nodes: Mapping[str, Node]
    """In topological order, the image and the states first."""
    image: str
    states: Mapping[str, str]
    """Node name to qualified name in the user's module."""
    maps: Mapping[str, str]
    """Other inputs that are read by regions: node name to the key of the argument."""
    outputs: Any
    """The model's result with a :class:`Ref` for each tensor."""
    updates: Mapping[str, str]
    """Qualified buffer name to the node that holds its new value."""
    constants: Mapping[str, torch.Tensor]
    """Node name to a tensor that the capture made itself."""
    zeroed: frozenset[str] = frozenset()
    """States that nothing reads and whose gradient is zero: the code cuts off what is computed from them."""
    _positions: Mapping[str, int] = field(init=False, compare=False)

    def __post_init__(self) -> None:
        positions = {name: index for index, name in enumerate(self.nodes)}
        object.__setattr__(self, "_positions", positions)

    @property
    def images(self) -> tuple[str, ...]:
        """The image and the maps that are read beside it."""
        return (self.image, *self.maps)

    def position(self, name: str) -> int:
        """Place of a node in the order of execution."""
        return self._positions[name]

    @property
    def output_names(self) -> tuple[str, ...]:
        """Nodes that the user's result refers to, each once."""
        return refs_in(self.outputs)

    @property
    def results(self) -> dict[str, str]:
        """Maps that stay stored, by the names under which outputs refer to them."""
        return {node.name: node.operands[0] for node in self.nodes.values() if node.kind is Kind.RESULT}

    @property
    def residents(self) -> tuple[Node, ...]:
        """Operators that run on a whole map because no rule covers them."""
        return tuple(node for node in self.nodes.values() if node.note)


def on_whole_maps(program: Program) -> tuple[Node, ...]:
    """The resident operators: global values computed from whole maps, directly or through others.

    Views are included; items of tuples are not.
    """
    found: set[str] = set()
    for node in program.nodes.values():
        if node.kind is Kind.GATHER or (node.kind is Kind.GLOBAL and not found.isdisjoint(node.operands)):
            found.add(node.name)
    nodes = (program.nodes[name] for name in program.nodes if name in found)
    return tuple(node for node in nodes if node.kind is Kind.GLOBAL and node.target is not operator.getitem)


def fed_reductions(program: Program, names: Iterable[str]) -> dict[str, dict[str, Reduction]]:
    """By map, the reductions that it feeds, by name; only those among ``names``."""
    fed: dict[str, dict[str, Reduction]] = {}
    for name in names:
        node = program.nodes[name]
        assert node.reduction is not None
        fed.setdefault(node.operands[0], {})[name] = node.reduction
    return fed


def has_gradient(dtype: torch.dtype) -> bool:
    """Whether autograd can differentiate values of ``dtype``: floating-point and complex ones."""
    return dtype.is_floating_point or dtype.is_complex


def sum_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which tiles' contributions to a gradient of ``dtype`` are summed: at least float32."""
    return torch.promote_types(dtype, torch.float32) if dtype.is_floating_point else dtype


def differentiated(program: Program, leaves: Iterable[str]) -> frozenset[str]:
    """The nodes that a gradient with respect to ``leaves`` passes through, with the leaves that it reaches.

    A leaf of which no result has a gradient, such as one that is detached, is left out: autograd would
    otherwise ask what it was computed from, perhaps an earlier pass, for gradients.
    """
    leaves = frozenset(leaves)
    found = _depending(program, leaves)
    asked = set(refs_in(program.outputs))
    for node in reversed(list(program.nodes.values())):
        if node.name in asked and node.name in found:
            asked.update(node.operands)
    return _depending(program, asked & leaves) | (program.zeroed & leaves)


def _depending(program: Program, leaves: Collection[str]) -> frozenset[str]:
    """The ``leaves``, and the nodes that have a gradient with respect to one."""
    found = set(leaves)
    for node in program.nodes.values():
        if (
            node.grad
            and any(has_gradient(spec.dtype) for spec in node.specs)
            and not found.isdisjoint(node.operands)
        ):
            found.add(node.name)
    return frozenset(found)


class Reader(Protocol):
    """A node of a program, or of a graph that is to become one."""

    @property
    def operands(self) -> tuple[str, ...]:
        """Names of the nodes it reads."""


def reached(nodes: Mapping[str, Reader], roots: Iterable[str]) -> Iterator[str]:
    """The ``roots`` and all that they are computed from, as far as they are among ``nodes``, each once."""
    found: set[str] = set()
    pending = list(roots)
    while pending:
        name = pending.pop()
        if name in nodes and name not in found:
            found.add(name)
            yield name
            pending.extend(nodes[name].operands)


def refs_in(structure: Any) -> tuple[str, ...]:
    """Names referred to in nested lists, tuples and dicts, each once, in order."""
    return _names(_refs(structure))


def _names(refs: Iterable[Ref]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(ref.name for ref in refs))


def _refs(structure: Any) -> list[Ref]:
    leaves = pytree.tree_leaves(structure, is_leaf=lambda value: isinstance(value, Ref))
    return [leaf for leaf in leaves if isinstance(leaf, Ref)]


_ATOMS = (int, float, type(None), torch.dtype)
"""Types that hold no refs."""


def substitute(structure: Any, value_of: Callable[[str], Any]) -> Any:
    """``structure`` with each :class:`Ref` replaced by ``value_of(name)``."""
    if isinstance(structure, Ref):
        return value_of(structure.name)
    if isinstance(structure, (list, tuple)):
        # Plain recursion, and none for numbers: it runs once per node and tile.
        return type(structure)(
            [item if isinstance(item, _ATOMS) else substitute(item, value_of) for item in structure]
        )
    if isinstance(structure, dict):
        return {key: substitute(item, value_of) for key, item in structure.items()}
    return structure


def arguments(node: Node, value_of: Callable[[str], Any]) -> tuple[Sequence[Any], Mapping[str, Any]]:
    """Positional and keyword arguments of a node with each :class:`Ref` replaced by ``value_of(name)``."""
    if node.is_flat:
        # Nearly all nodes, each evaluated once for each tile.
        return [value_of(arg.name) if type(arg) is Ref else arg for arg in node.args], node.kwargs
    return substitute(node.args, value_of), substitute(dict(node.kwargs), value_of)
