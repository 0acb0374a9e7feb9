"""Results of calls on fake tensors, for shapes and dtypes; each kind of call is run once.

Networks repeat their blocks, so most calls are like an earlier one.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch._subclasses.fake_tensor import DataDependentOutputException
from torch.utils import _pytree as pytree

from streamcnn.capture.capture import RawNode
from streamcnn.errors import UnsupportedModel
from streamcnn.graph.autocast import as_recorded
from streamcnn.graph.fakes import memory_of

aten = torch.ops.aten
_OF_ONE_DTYPE = frozenset(
    {
        *(aten.conv1d, aten.conv2d, aten.conv3d),
        *(aten.conv_transpose1d, aten.conv_transpose2d, aten.conv_transpose3d),
        *(aten.linear, aten.matmul, aten.mm, aten.mv, aten.bmm, aten.addmm, aten.baddbmm),
    }
)
"""Operators whose operands have one dtype. Most of them do not check that on tensors without values."""


class FakeCalls:
    """A cache of fake results, by everything that a result's shape and dtype depend on."""

    def __init__(self) -> None:
        self._known: dict[Any, Any] = {}

    def called(
        self, raw: RawNode | None, target: Callable[..., Any], args: Any, kwargs: Any
    ) -> tuple[Any, int | None]:
        """A call's fake result, and the index of the tensor argument whose memory it shares; None if none.

        ``raw`` is the captured call, whose autocast block applies.

        Raises
        ------
        UnsupportedModel
            If the operands' dtypes differ where the operator does not allow it, or it looks at their values.
        """

        def call() -> tuple[Any, int | None]:
            _refuse_several_dtypes(raw, target, (args, kwargs))
            try:
                result = target(*args, **kwargs)
            except DataDependentOutputException as error:
                raise _refusal_of_values(raw, target, error) from error
            return result, _shares(result, (args, kwargs))

        casts = raw.casts if raw is not None else None
        key = (target, casts, look(args), look(kwargs))
        with as_recorded(grad=True, casts=casts):
            found: tuple[Any, int | None] = self.once(key, call)
        return found

    def once(self, key: Any, make: Callable[[], Any]) -> Any:
        """The result of ``make()``, cached by ``key`` if that is hashable."""
        try:
            if key not in self._known:
                self._known[key] = make()
        except TypeError:
            return make()
        return self._known[key]


def _refuse_several_dtypes(raw: RawNode | None, target: Callable[..., Any], arguments: Any) -> None:
    if not isinstance(target, OpOverload) or target.overloadpacket not in _OF_ONE_DTYPE:
        return
    if target._overloadname.startswith("dtype"):
        # Their results have another dtype than the factors.
        return
    operands = [leaf for leaf in pytree.tree_leaves(arguments) if isinstance(leaf, Tensor)]
    dtypes = dict.fromkeys(each.dtype for each in operands)
    if len(dtypes) == 1 or torch.is_autocast_enabled(operands[0].device.type):
        return
    raise UnsupportedModel(
        f"{target.overloadpacket}{_place(raw)} is given tensors of {' and '.join(map(str, dtypes))}: allowed "
        "is one dtype; convert the image, by image.to() or preprocess=, or the model, or use torch.autocast"
    )


def _refusal_of_values(
    raw: RawNode | None, target: Callable[..., Any], error: DataDependentOutputException
) -> UnsupportedModel:
    name = target.overloadpacket if isinstance(target, OpOverload) else target
    return UnsupportedModel(
        f"{name}{_place(raw)} looks at the values of its operands ({error.func}), which are not known when a "
        "pass is planned: use operators that do not, as torch.fft.irfft and F.fold instead of torch.istft"
    )


def _place(raw: RawNode | None) -> str:
    return f" in {raw.source}" if raw is not None and raw.source else ""


def target_name(raw: RawNode | None) -> str:
    """The operator of a captured call, for messages."""
    target = raw.target if raw is not None else None
    return str(target.overloadpacket) if isinstance(target, OpOverload) else str(target)


def look(value: Any) -> Any:
    """The properties of an argument that the shape and dtype of a result can depend on."""
    if isinstance(value, Tensor):
        strides = value.stride() if value.layout is torch.strided else ()
        return (value.layout, value.shape, strides, value.dtype, value.device)
    if isinstance(value, (list, tuple)):
        return (type(value), *map(look, value))
    if isinstance(value, dict):
        return tuple((key, look(item)) for key, item in value.items())
    return (type(value), value)


def _shares(result: Any, arguments: Any) -> int | None:
    """The index of the tensor in ``arguments`` that shares memory with the first tensor of ``result``."""
    results, tensors = (
        [memory_of(leaf) for leaf in pytree.tree_leaves(each) if isinstance(leaf, Tensor)]
        for each in (result, arguments)
    )
    memory = results[0] if results else None
    return None if memory is None or memory not in tensors else tensors.index(memory)
