"""What an operator costs, declared beside its rule: operations, workspace, what is saved, what may alias.

Planning, the memory model and the interpreter ask here for what a node's target costs; none of them knows
an operator by name. An operator without a declaration is taken to save its operands and to need no workspace;
where it runs on whole values, PyTorch's own formulas count its operations.
"""

from __future__ import annotations

import inspect
import operator
from collections.abc import Callable, Collection, Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from enum import Enum
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch.utils import _pytree as pytree
from torch.utils.flop_counter import FlopCounterMode

from streamcnn.graph.program import Node, Program, TensorSpec, substitute
from streamcnn.graph.registry import Registry, is_seeded
from streamcnn.graph.schemas import bound, names_a_collective
from streamcnn.graph.whole import OnlyResult, Whole
from streamcnn.support.processes import all_processes


@dataclass(frozen=True, slots=True)
class Operand:
    """Stands for a tensor among the arguments of an :class:`Operation`."""

    spec: TensorSpec | tuple[TensorSpec, ...]
    is_trained: bool
    """Whether its gradient is wanted or passed on."""

    @property
    def specs(self) -> tuple[TensorSpec, ...]:
        """The specs of all tensors, where it is the result of an operator with several."""
        return self.spec if isinstance(self.spec, tuple) else (self.spec,)

    @property
    def tensor(self) -> TensorSpec:
        """The spec of a single tensor."""
        assert isinstance(self.spec, TensorSpec)
        return self.spec

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of a single tensor."""
        return self.tensor.shape


@dataclass(frozen=True, slots=True)
class Operation:
    """One call as formulas see it: shapes and types in place of tensors."""

    target: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    results: tuple[TensorSpec, ...]
    fuses_attention: bool = True
    """Whether the device computes attention as one kernel whatever its options."""

    @classmethod
    def of(
        cls,
        program: Program,
        node: Node,
        differentiated: Collection[str] = (),
        *,
        fuses_attention: bool = True,
    ) -> Operation:
        """A node's call on its whole operands; ``differentiated`` are the nodes that have a gradient."""
        assert node.target is not None

        def operand(name: str) -> Operand:
            return Operand(program.nodes[name].spec, name in differentiated)

        return cls(
            node.target,
            substitute(node.args, operand),
            substitute(dict(node.kwargs), operand),
            node.specs,
            fuses_attention,
        )

    def bind(self, *names: str) -> list[Any]:
        """Values of the arguments ``names`` of the operator or function, defaults filled in."""
        if isinstance(self.target, OpOverload):
            return bound(self.target, self.args, self.kwargs, *names)
        arguments = inspect.signature(self.target).bind(*self.args, **self.kwargs)
        arguments.apply_defaults()
        return [arguments.arguments[name] for name in names]

    @property
    def numel(self) -> int:
        """Elements of all results."""
        return sum(spec.numel for spec in self.results)


class CallBytes(NamedTuple):
    """Bytes of one call, on a tile or on whole values."""

    operands: int
    result: int
    weights: int
    """Of parameters, and of their gradients where those are made too."""
    itemsize: int
    """Of one element of the result."""

    @property
    def is_half(self) -> bool:
        """Whether it is in half precision, which sums and some other operators turn into float32 first."""
        return self.itemsize == 2


Formula = Callable[[Operation], int]


@dataclass(frozen=True, slots=True)
class Saves:
    """What autograd keeps of a call until its backward pass; parameters are there in any case."""

    operands: bool = False
    factors: bool = False
    """Operands of a product, each as far as another one has a gradient."""
    result: bool = False
    beside: Formula | None = None
    """Bytes of what is neither, such as the places of maxima."""


OPERANDS = Saves(operands=True)
FACTORS = Saves(factors=True)
RESULT = Saves(result=True)
NOTHING = Saves()


class Routine(Enum):
    """Kinds of operators for which libraries compile code or take buffers of their own."""

    CONVOLUTION = "convolution"
    MATRIX_PRODUCT = "matrix product"


@dataclass(frozen=True, slots=True)
class Cost:
    """What is declared of an operator."""

    operations: Formula | None = None
    """Floating-point operations of a forward call on whole operands."""
    workspace: Callable[[CallBytes], int] | None = None
    """Bytes that a call takes besides operands, parameters and result; None for none."""
    backward_workspace: Callable[[CallBytes], int] | None = None
    """Bytes that its backward pass takes besides those, their gradients and what is saved; None for as many
    as ``workspace``."""
    saves: Saves = OPERANDS
    inner: Formula | None = None
    """Bytes of a value that a call makes besides its result, and whose gradient it makes backward."""
    routine: Routine | None = None
    per_channel: Callable[[Operation], bool] | None = None
    """Whether it convolves every channel by itself, which hardware does at a rate of its own."""
    makes_new: bool = False
    """Whether its result is surely in memory of its own, which a later operator may overwrite."""
    stand_in: Callable[..., Tensor] | None = None
    """Given the result's shape and type, the arguments, and keyword arguments by name: a tensor with the
    result's gradient but without its values, for a backward pass that finds the result stored. None if it
    must be computed again."""
    pads: bool = False
    """Whether it takes ``padding``, (rows, columns) of its fill value on either side, and needs no padded
    copy then."""
    on_whole: Callable[..., Tensor] | None = None
    """What is called in its place on whole values, with its arguments, where that is faster."""
    detaches: bool = False
    """Whether no gradient passes through it."""
    draws: bool = False
    """Whether it takes random numbers from PyTorch's generators, if its tags do not say so."""
    is_opaque: bool = False
    """Whether its code does more than compute its result, or decides by values: a recording of the operators
    that it calls would leave that out."""
    meets_others: bool = False
    """Whether it waits for other processes, and they for it."""


_OF_TORCH = frozenset({"aten", "prim", "prims"})
"""Namespaces of operators whose tags say whether they draw."""
INDEX_BYTES = 8
"""Of a place that an operator returns or saves: one 64-bit integer."""
_HALVES = (torch.float16, torch.bfloat16)
_UNDECLARED = Cost()
_COSTS = Registry[Cost]("cost")


def declare(*targets: Any, cost: Cost, replace: bool = False) -> None:
    """Declare what operators cost.

    Parameters
    ----------
    targets
        Keys as of :class:`~streamcnn.graph.registry.Registry`: operators, overloads, or the functions that a
        rule records for them.
    replace
        Whether a target may have a cost already.

    Raises
    ------
    TypeError, ValueError
        For a target that is no operator or function, and without ``replace`` for one that has a cost.
    """
    _COSTS.add(targets, cost, replace=replace)


def cost_of(target: object) -> Cost:
    """What is declared of a node's target, or the default."""
    return _COSTS.get(target) or _UNDECLARED


def is_view(target: object) -> bool:
    """Whether a result is in the memory of the first operand."""
    if target is operator.getitem:
        return True
    return isinstance(target, OpOverload) and any(
        r.alias_info is not None and not r.alias_info.is_write for r in target._schema.returns
    )


def makes_new(target: object) -> bool:
    """Whether a target surely returns new memory: a view would reach its operand's."""
    aliases = isinstance(target, OpOverload) and any(r.alias_info is not None for r in target._schema.returns)
    return cost_of(target).makes_new and not aliases


def draws(target: object) -> bool:
    """Whether a call takes random numbers from PyTorch's generators."""
    return is_seeded(target) or cost_of(target).draws


def may_draw(target: object) -> bool:
    """Whether a call may take random numbers: code of the user's own need not say so."""
    # What overwrites its arguments may stand in something that copies them first.
    called = getattr(target, "target", target)
    is_other = isinstance(called, OpOverload) and called.namespace not in _OF_TORCH
    return is_other or isinstance(called, (Whole, OnlyResult)) or draws(target)


def meets_others(target: object) -> bool:
    """Whether a call waits for other processes, and they for it. PyTorch's collectives are told by name.

    Functions of the user's own need not say so: where there are other processes, they are taken to.
    """
    if isinstance(target, (Whole, OnlyResult)):
        everyone = all_processes()
        return everyone is not None and everyone[1] > 1
    return is_collective(target) or cost_of(target).meets_others


def is_collective(target: object) -> bool:
    """Whether it is one of PyTorch's collectives."""
    return names_a_collective(str(target))


def casts_of(program: Program, operators: Iterable[str]) -> dict[str, torch.dtype]:
    """Global values in float32 that autocast casts at the one operator that reads them, and to what.

    Those of several are left out: each of them has a gradient of its own, which are added in float32.
    """
    nodes = program.nodes
    found: dict[str, torch.dtype] = {}
    read: set[str] = set()
    for name in operators:
        node = nodes[name]
        for operand in node.operands:
            if operand in read:
                found.pop(operand, None)
            elif not nodes[operand].is_map and cost_of(node.target).routine is not None:
                given, dtype = nodes[operand].spec, node.tensor.dtype
                if isinstance(given, TensorSpec) and given.dtype == torch.float32 and dtype in _HALVES:
                    found[operand] = dtype
        read.update(node.operands)
    return found


def elements(operation: Operation) -> int:
    """One operation for each element of the result."""
    return operation.numel


def windows(operation: Operation) -> int:
    """What pooling over windows takes, of 3 x 3 positions: a product and a sum for each."""
    return 2 * 3 * 3 * operation.numel


def counted(operation: Operation) -> int:
    """Operations of the matrix products and convolutions that a call on whole values is made of.

    It is run on tensors without memory while PyTorch's own formulas count. The user's own Python is not: it
    may print, count, draw numbers or want values.
    """
    if isinstance(operation.target, Whole) and not operation.target.bodies:
        return 0

    def empty(value: Any) -> Any:
        if not isinstance(value, Operand):
            return value
        made = tuple(torch.empty(spec.shape, dtype=spec.dtype, device="meta") for spec in value.specs)
        return made if isinstance(value.spec, tuple) else made[0]

    args, kwargs = pytree.tree_map(empty, (operation.args, dict(operation.kwargs)), is_leaf=_is_operand)
    with FlopCounterMode(display=False) as counter, torch.no_grad(), _drawing_nothing(operation.target):
        try:
            operation.target(*args, **kwargs)
        except (RuntimeError, NotImplementedError, TypeError):
            # It makes a tensor of its own on another device, or has no form for tensors without memory.
            return 0
    return int(counter.get_total_flops())


def _drawing_nothing(target: object) -> AbstractContextManager[None]:
    """A block after which random numbers are as if ``target`` had not been called in it."""
    if not may_draw(target):
        return nullcontext()
    devices = range(torch.cuda.device_count() if torch.cuda.is_initialized() else 0)  # type: ignore[no-untyped-call]
    return torch.random.fork_rng(devices)


def _is_operand(value: object) -> bool:
    return isinstance(value, Operand)
