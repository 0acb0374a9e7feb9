"""Operators' costs, declared beside their rules: operations, workspace, saved values, aliasing.

Planning, the memory model and the interpreter look up the cost of a node's target here; none of them knows
an operator by name. An operator without a declaration is assumed to save its operands and to need no
workspace. If it runs on whole values, PyTorch's own formulas count its operations.
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
        """The specs of all tensors, if this is the result of an operator with several results."""
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
    """One call as formulas see it, with shapes and dtypes in place of tensors."""

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
        """Number of elements of all results."""
        return sum(spec.numel for spec in self.results)


class CallBytes(NamedTuple):
    """Bytes of one call, on a tile or on whole values."""

    operands: int
    result: int
    weights: int
    """Bytes of parameters, and of their gradients if the call makes them."""
    itemsize: int
    """Bytes of one element of the result."""

    @property
    def is_half(self) -> bool:
        """Whether the call is in half precision, which sums and some other operators convert to float32."""
        return self.itemsize == 2


Formula = Callable[[Operation], int]


@dataclass(frozen=True, slots=True)
class Saves:
    """What autograd saves of a call until its backward pass, besides parameters, which exist anyway."""

    operands: bool = False
    factors: bool = False
    """Operands of a product, each only if another operand has a gradient."""
    result: bool = False
    beside: Formula | None = None
    """Bytes of other saved values, such as the indices of maxima."""


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
    """The declared costs of an operator."""

    operations: Formula | None = None
    """Floating-point operations of a forward call on whole operands."""
    workspace: Callable[[CallBytes], int] | None = None
    """Bytes that a call takes besides operands, parameters and result; None for none."""
    backward_workspace: Callable[[CallBytes], int] | None = None
    """Bytes that its backward pass takes besides those, their gradients and saved values; None for the same
    as ``workspace``."""
    saves: Saves = OPERANDS
    inner: Formula | None = None
    """Bytes of an intermediate value of the call that also has a gradient in the backward pass."""
    routine: Routine | None = None
    per_channel: Callable[[Operation], bool] | None = None
    """Whether it is a depthwise convolution, which hardware computes at a rate of its own."""
    makes_new: bool = False
    """Whether its result certainly has memory of its own, which a later operator may overwrite."""
    stand_in: Callable[..., Tensor] | None = None
    """Given the result's shape and type, the arguments, and keyword arguments by name: a tensor with the
    result's gradient but without its values, for a backward pass that finds the result stored. None if it
    must be computed again."""
    pads: bool = False
    """Whether it takes ``padding``, (rows, columns) of its fill value on either side, and needs no padded
    copy then."""
    on_whole: Callable[..., Tensor] | None = None
    """A faster function to call instead on whole values, with the same arguments."""
    together: Callable[..., list[Tensor]] | None = None
    """Computes the values of several calls at once, without gradients: it takes a list for each argument, of
    tensors of any shapes but one dtype, or of numbers of one type."""
    detaches: bool = False
    """Whether no gradient passes through it."""
    draws: bool = False
    """Whether it takes random numbers from PyTorch's generators, if its tags do not say so."""
    is_opaque: bool = False
    """Whether its code has side effects or branches on values, which a recording of the operators that it
    calls would leave out."""
    meets_others: bool = False
    """Whether it waits for other processes, and they for it."""


_OF_TORCH = frozenset({"aten", "prim", "prims"})
"""Namespaces of operators whose tags say whether they draw."""
INDEX_BYTES = 8
"""Bytes of an index that an operator returns or saves: a 64-bit integer."""
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
        Whether to replace the cost of a target that has one.

    Raises
    ------
    TypeError, ValueError
        For a target that is no operator or function, and for one that has a cost, unless ``replace`` is set.
    """
    _COSTS.add(targets, cost, replace=replace)


def cost_of(target: object) -> Cost:
    """The declared costs of a node's target, or the default."""
    return _COSTS.get(target) or _UNDECLARED


def is_view(target: object) -> bool:
    """Whether the result is a view of the first operand."""
    if target is operator.getitem:
        return True
    return isinstance(target, OpOverload) and any(
        r.alias_info is not None and not r.alias_info.is_write for r in target._schema.returns
    )


def makes_new(target: object) -> bool:
    """Whether a target certainly returns new memory, and never a view of an operand."""
    aliases = isinstance(target, OpOverload) and any(r.alias_info is not None for r in target._schema.returns)
    return cost_of(target).makes_new and not aliases


def draws(target: object) -> bool:
    """Whether a call draws random numbers from PyTorch's generators."""
    return is_seeded(target) or cost_of(target).draws


def may_draw(target: object) -> bool:
    """Whether a call may draw random numbers; the user's own code is assumed to."""
    # An operator that overwrites its arguments may be wrapped in one that copies them first.
    called = getattr(target, "target", target)
    is_other = isinstance(called, OpOverload) and called.namespace not in _OF_TORCH
    return is_other or isinstance(called, (Whole, OnlyResult)) or draws(target)


def meets_others(target: object) -> bool:
    """Whether a call waits for other processes, as PyTorch's collectives do, which are recognised by name.

    If there are several processes, the user's own functions are assumed to.
    """
    if isinstance(target, (Whole, OnlyResult)):
        everyone = all_processes()
        return everyone is not None and everyone[1] > 1
    return is_collective(target) or cost_of(target).meets_others


def is_collective(target: object) -> bool:
    """Whether a target is one of PyTorch's collectives."""
    return names_a_collective(str(target))


def casts_of(program: Program, operators: Iterable[str]) -> dict[str, torch.dtype]:
    """Global float32 values that autocast casts at their only reader, with the dtypes that they are cast to.

    Values with several readers are left out: each reader gives a gradient, and these are added in float32.
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
    """Operations of pooling with 3 x 3 windows: a product and a sum for each position."""
    return 2 * 3 * 3 * operation.numel


def counted(operation: Operation) -> int:
    """Operations of the matrix products and convolutions in a call on whole values.

    The call runs on meta tensors while PyTorch's own formulas count. The user's Python does not run, as it
    may print, count, draw numbers or need values: it counts as 0.
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
            # The operator creates a tensor on another device, or has no meta kernel.
            return 0
    return int(counter.get_total_flops())


def _drawing_nothing(target: object) -> AbstractContextManager[None]:
    """Restore the random state after the block, if ``target`` may draw."""
    if not may_draw(target):
        return nullcontext()
    devices = range(torch.cuda.device_count() if torch.cuda.is_initialized() else 0)  # type: ignore[no-untyped-call]
    return torch.random.fork_rng(devices)


def _is_operand(value: object) -> bool:
    return isinstance(value, Operand)
