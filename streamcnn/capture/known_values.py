"""Values that are known while a pass is traced on fake tensors: those of states, and functions of states.

A flag or counter in a buffer decides what a pass does (``if not self.initialized``, ``int(self.pointer)``).
A pass that is captured anew may read it, for as long as the pass itself has not changed it.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch._subclasses.fake_tensor import unset_fake_temporarily
from torch.fx import Graph
from torch.fx import Node as FxNode
from torch.fx.experimental.proxy_tensor import disable_proxy_modes_tracing
from torch.fx.node import map_arg

from streamcnn.graph.flattening import UPDATING, proxy_of


@dataclass(frozen=True, slots=True)
class _Known:
    """A state."""

    stand_in: Tensor
    version: int
    """That of the stand-in before the pass."""
    value: Tensor

    @property
    def has_changed(self) -> bool:
        return self.stand_in._version != self.version


class KnownValues:
    """The values of a pass's states, given what stands for each in the trace that has just begun."""

    def __init__(self, states: Mapping[Tensor, Tensor]) -> None:
        self._states = {
            proxy_of(stand_in).node.name: _Known(stand_in, stand_in._version, value)
            for stand_in, value in states.items()
            # A source that is passed beside the image is a tensor without memory here.
            if 0 not in value.stride()
        }

    def version_of(self, tensor: Tensor) -> int:
        """How often a traced tensor was overwritten: of a state, in all its time."""
        proxy = proxy_of(tensor)
        known = None if proxy is None else self._states.get(proxy.node.name)
        return tensor._version + (0 if known is None else known.value._version - known.version)

    def of(self, tensor: Tensor) -> Tensor | None:
        """The values of a traced tensor that is a function of states alone, unless the pass changes those."""
        proxy = proxy_of(tensor)
        return None if proxy is None else _value_of(proxy.node, self._states)


def _value_of(node: FxNode, known: Mapping[str, _Known]) -> Tensor | None:
    order = _ancestors([node])
    changed = _ancestors(_written(node.graph))
    values: dict[FxNode, Any] = {}
    for each in reversed(order):
        if each.op == "placeholder" and each.name in known:
            if each in changed or known[each.name].has_changed:
                return None
            values[each] = known[each.name].value
        elif not _is_pure(each.target):
            return None
        else:
            assert callable(each.target)
            args, kwargs = map_arg((each.args, each.kwargs), values.__getitem__)
            with disable_proxy_modes_tracing(), unset_fake_temporarily(), torch._C.DisableTorchFunction():
                values[each] = each.target(*args, **kwargs)
    found = values[node]
    return found if isinstance(found, Tensor) else None


def _ancestors(nodes: Iterable[FxNode]) -> dict[FxNode, None]:
    """``nodes`` and what they are functions of, each after all that read it."""
    order: dict[FxNode, None] = {}
    pending = list(nodes)
    while pending:
        each = pending.pop()
        order.pop(each, None)
        order[each] = None
        pending.extend(each.all_input_nodes)
    return order


def _written(graph: Graph) -> Iterator[FxNode]:
    """What is overwritten without a count of its changes: statistics of norms, and by custom operators."""
    for node in graph.nodes:
        if node.target in UPDATING:
            yield from (each for each in node.args[3:5] if isinstance(each, FxNode))
        elif isinstance(node.target, OpOverload) and node.target.namespace not in ("aten", "prim"):
            yield from (node.all_input_nodes if node.target._schema.is_mutable else ())


def _is_pure(target: object) -> bool:
    """Whether a call gives the same again and changes nothing."""
    if target is operator.getitem:
        return True
    return (
        isinstance(target, OpOverload)
        and not target._schema.is_mutable
        and target not in UPDATING
        and torch.Tag.nondeterministic_seeded not in target.tags
    )
