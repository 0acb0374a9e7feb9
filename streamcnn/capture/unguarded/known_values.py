"""Values that are known while a pass is traced on fake tensors: those of states, constants and random
numbers, and of functions of them.

The code may branch on a flag or counter in a buffer (``if not self.initialized``, ``int(self.pointer)``), on
a tensor made from numbers (``(torch.tensor(sigma) > 0).all()``) or on a draw (``if torch.rand(1) < 0.1``). We
repeat all operations of the pass on such tensors with their values, so that a value changed in place or
through a view is up to date. Draws give the same numbers as in the pass, which starts from the same generator
state.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch.fx import Node as FxNode
from torch.fx.experimental.proxy_tensor import get_proxy_mode
from torch.fx.node import map_arg
from torch.utils import _pytree as pytree

from streamcnn.graph.costs import may_draw
from streamcnn.graph.fakes import memory_of
from streamcnn.graph.flattening import UPDATING
from streamcnn.graph.registry import is_seeded
from streamcnn.graph.whole import Whole, beside_the_trace, proxy_in, proxy_of
from streamcnn.support.sizes import is_size

_MOST_DRAWN = 2**16
"""Random numbers of one call that are drawn to know what comes behind them."""


@dataclass(frozen=True, slots=True)
class _Known:
    """A state with its value."""

    version: int
    """The version of its stand-in before the pass."""
    value: Tensor


class KnownValues:
    """Known values in a trace that has just begun; ``states`` maps each stand-in to its state."""

    def __init__(self, states: Mapping[Tensor, Tensor]) -> None:
        mode = get_proxy_mode()
        assert mode is not None
        self._tracer = mode.tracer
        self._constants: Any = getattr(self._tracer, "root", None)
        self._states = {
            proxy_of(stand_in).node.name: _Known(stand_in._version, value)
            for stand_in, value in states.items()
            # A source passed beside the image is a tensor without memory here.
            if value.layout is not torch.strided or 0 not in value.stride()
        }

    def version_of(self, tensor: Tensor) -> int:
        """The version of a traced tensor; of a state, the real tensor's plus this pass's writes."""
        proxy = proxy_of(tensor)
        known = None if proxy is None else self._states.get(proxy.node.name)
        return tensor._version + (0 if known is None else known.value._version - known.version)

    def of(self, tensor: Tensor) -> Tensor | None:
        """The present values of a traced tensor; None if they depend on the image or are not known."""
        # Also inside functions that run whole, which are not recorded: their arguments are.
        proxy = proxy_in(self._tracer, tensor)
        if proxy is None:
            return None
        with (
            beside_the_trace(),
            torch._C.DisableTorchFunction(),
            torch.no_grad(),
            _generator_kept(),
        ):
            return self._computed(proxy.node)

    def _computed(self, node: FxNode) -> Tensor | None:
        values: dict[FxNode, Any] = {}
        history = _history(node)
        overwrites = any(map(_written_by, history))
        for each in history:
            if each.op == "call_function" and _can_be_repeated(each):
                assert callable(each.target)
                args, kwargs = map_arg((each.args, each.kwargs), values.__getitem__)
                values[each] = each.target(*args, **kwargs)
            elif (given := self._given(each)) is not None:
                # Overwrites are repeated here, so on copies.
                values[each] = given.clone() if overwrites else given
            else:
                return None
        found = values[node]
        return found if isinstance(found, Tensor) else None

    def _given(self, node: FxNode) -> Tensor | None:
        """The values of a state or a constant before the pass."""
        if node.op == "get_attr":
            constant = getattr(self._constants, str(node.target), None)
            return constant if isinstance(constant, Tensor) else None
        known = self._states.get(node.name) if node.op == "placeholder" else None
        return None if known is None else known.value


def called_on_values(
    function: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    values_of: Callable[[Tensor], Tensor | None],
) -> Any:
    """The result of a function on the values of traced tensors; ``NotImplemented`` if some are not known.

    ``values_of`` gives the values of a tensor, or None.
    """
    given, structure = pytree.tree_flatten((args, dict(kwargs)), is_leaf=is_size)
    values = [values_of(each) if isinstance(each, Tensor) else each for each in given]
    if any(isinstance(each, Tensor) and value is None for each, value in zip(given, values, strict=True)):
        return NotImplemented
    args, kwargs = pytree.tree_unflatten(values, structure)
    with beside_the_trace():
        return function(*args, **kwargs)


def _history(node: FxNode) -> list[FxNode]:
    """The calls that determine the present value of ``node``, in order: those it is computed from, and those
    that have overwritten any of their values."""
    found: set[FxNode] = set()
    memory: set[int] = set()

    def add(first: FxNode) -> None:
        pending = [first]
        while pending:
            each = pending.pop()
            if each not in found:
                found.add(each)
                memory.update(_memory_of(each))
                pending.extend(each.all_input_nodes)

    def lacking() -> list[FxNode]:
        more = [each for each, places in writing.items() if places & memory]
        # A draw depends on the draws before it.
        last = max((place for place, each in enumerate(drawing) if each in found), default=-1)
        return [each for each in (*more, *drawing[: last + 1]) if each not in found]

    writing = {
        each: {place for written in _written_by(each) for place in _memory_of(written)}
        for each in node.graph.nodes
    }
    drawing = [each for each in node.graph.nodes if _draws(each)]
    add(node)
    while more := lacking():
        for each in more:
            add(each)
    return [each for each in node.graph.nodes if each in found]


def _memory_of(node: FxNode) -> Iterator[int]:
    """Identifiers of the memory that a value uses; a view has its base's."""
    for leaf in pytree.tree_leaves(node.meta.get("val")):
        memory = memory_of(leaf) if isinstance(leaf, Tensor) else None
        if memory is not None:
            yield memory


def _written_by(node: FxNode) -> list[FxNode]:
    """The operands that a call overwrites."""
    if not isinstance(node.target, OpOverload):
        return []
    if node.target in UPDATING:
        return [each for each in node.args[3:5] if isinstance(each, FxNode)]
    written: list[FxNode] = []
    for index, argument in enumerate(node.target._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            given = node.args[index] if index < len(node.args) else node.kwargs.get(argument.name)
            written += [each for each in pytree.tree_leaves(given) if isinstance(each, FxNode)]
    return written


def _can_be_repeated(node: FxNode) -> bool:
    """Whether repeating a call gives the same result and has no effects except on its operands."""
    target = node.target
    if target is operator.getitem or isinstance(target, Whole):
        return True
    if not isinstance(target, OpOverload) or target in UPDATING:
        return False
    if is_seeded(target):
        # Repeating it would advance a generator of the user's.
        return _is_small(node) and node.kwargs.get("generator") is None
    return target.namespace in ("aten", "prim") or not target._schema.is_mutable


def _draws(node: FxNode) -> bool:
    """Whether a call may draw from a generator; some calls of dropout do not."""
    if not may_draw(node.target):
        return False
    probability, train = (*node.args[1:3], None, None)[:2]
    return "dropout" not in str(node.target) or (train is not False and probability not in (0, 1))


def _is_small(node: FxNode) -> bool:
    """Whether a result is on the CPU, and small enough not to be a whole map."""
    leaves = [leaf for leaf in pytree.tree_leaves(node.meta.get("val")) if isinstance(leaf, Tensor)]
    return all(leaf.device.type == "cpu" and leaf.numel() <= _MOST_DRAWN for leaf in leaves)


@contextmanager
def _generator_kept() -> Iterator[None]:
    state = torch.default_generator.get_state()
    try:
        yield
    finally:
        torch.default_generator.set_state(state)
