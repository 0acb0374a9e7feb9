"""What calls give on fake tensors, for shapes and types: each kind of call is worked out once.

Networks repeat their blocks, so most calls look like one before.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch.utils import _pytree as pytree

from streamcnn.capture.capture import RawNode
from streamcnn.graph.autocast import as_recorded
from streamcnn.graph.fakes import memory_of


class FakeCalls:
    """Results that are known, by what they are functions of."""

    def __init__(self) -> None:
        self._known: dict[Any, Any] = {}

    def called(
        self, raw: RawNode | None, target: Callable[..., Any], args: Any, kwargs: Any
    ) -> tuple[Any, int | None]:
        """A call's fake result, and which of the tensors among its arguments has the memory that it is in.

        ``raw`` is the captured call that it belongs to.
        """

        def call() -> tuple[Any, int | None]:
            result = target(*args, **kwargs)
            return result, _shares(result, (args, kwargs))

        casts = raw.casts if raw is not None else None
        key = (target, casts, look(args), look(kwargs))
        with as_recorded(grad=True, casts=casts):
            found: tuple[Any, int | None] = self.once(key, call)
        return found

    def once(self, key: Any, make: Callable[[], Any]) -> Any:
        """What ``make`` gives, made once for each key that can be one."""
        try:
            if key not in self._known:
                self._known[key] = make()
        except TypeError:
            return make()
        return self._known[key]


def target_name(raw: RawNode | None) -> str:
    """The operator of a captured call, for messages."""
    target = raw.target if raw is not None else None
    return str(target.overloadpacket) if isinstance(target, OpOverload) else str(target)


def look(value: Any) -> Any:
    """What the shape and type of a call's result can depend on, in an argument."""
    if isinstance(value, Tensor):
        strides = value.stride() if value.layout is torch.strided else ()
        return (value.layout, value.shape, strides, value.dtype, value.device)
    if isinstance(value, (list, tuple)):
        return (type(value), *map(look, value))
    if isinstance(value, dict):
        return tuple((key, look(item)) for key, item in value.items())
    return (type(value), value)


def _shares(result: Any, arguments: Any) -> int | None:
    """Which of the tensors in ``arguments`` has the memory that the first tensor of ``result`` is in."""
    results, tensors = (
        [memory_of(leaf) for leaf in pytree.tree_leaves(each) if isinstance(leaf, Tensor)]
        for each in (result, arguments)
    )
    memory = results[0] if results else None
    return None if memory is None or memory not in tensors else tensors.index(memory)
