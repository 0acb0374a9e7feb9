"""In-place operators and views: overwritten values, functional forms, and writes through views."""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch.fx import Node as FxNode
from torch.utils import _pytree as pytree

from streamcnn.errors import UnsupportedModel
from streamcnn.graph.costs import Cost, declare, draws
from streamcnn.graph.entries import ENTRY, entry_overwritten
from streamcnn.graph.fakes import is_fake, memory_of
from streamcnn.graph.program import Ref
from streamcnn.graph.scattering import entry_replaced, imag_replaced, real_replaced, slice_replaced
from streamcnn.graph.schemas import bound, name_in_library, operator_name, places_of_axes

aten = torch.ops.aten

_SAME_VALUES = frozenset({"alias", "detach", "contiguous", "to", "type_as", "lift_fresh", "real"})
_REGROUPED = frozenset(
    {
        *("view", "reshape", "flatten", "unflatten", "_unsafe_view", "view_as", "reshape_as"),
        *("squeeze", "unsqueeze"),
    }
)
_PERMUTED = frozenset(
    {
        *("permute", "transpose", "t", "movedim", "moveaxis", "swapaxes", "swapdims", "numpy_T", "matrix_H"),
        *("mT", "mH", "adjoint"),
    }
)
_ADJOINTS = frozenset({"matrix_H", "mH", "adjoint"})
_DIVIDED = frozenset({"split", "split_with_sizes", "chunk", "unbind", "tensor_split"})
_SLICE: dict[bool, Callable[..., Any]] = {False: aten.slice_scatter.default, True: slice_replaced}
"""What replaces a range along an axis, by whether values are complex."""
_ENTRY: dict[bool, Callable[..., Any]] = {False: aten.select_scatter.default, True: entry_replaced}
"""What replaces one entry of an axis."""
_COMPLEX_PARTS: dict[str, Callable[..., Any]] = {"real": real_replaced, "imag": imag_replaced}
_SHAPES = frozenset(
    {"unsqueeze_", "squeeze_", "transpose_", "t_", "swapaxes_", "swapdims_", "detach_", "as_strided_"}
)
_DROPOUTS = {
    "dropout_": aten.dropout.default,
    "feature_dropout_": aten.feature_dropout.default,
    "alpha_dropout_": aten.alpha_dropout.default,
    "feature_alpha_dropout_": aten.feature_alpha_dropout.default,
}
_STORAGE = frozenset({"set_", "resize_", "resize_as_", "swap_"})


def overwritten(node: FxNode) -> tuple[Any, ...]:
    """The values that a call overwrites; an argument that is a list gives a tuple."""
    target = node.target
    if not isinstance(target, OpOverload):
        return ()
    found: list[Any] = []
    for position, argument in enumerate(target._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            value = node.args[position] if position < len(node.args) else node.kwargs.get(argument.name)
            if isinstance(value, FxNode):
                found.append(value)
            elif isinstance(value, (tuple, list)):
                found.append(tuple(value))
    return tuple(found)


def changes_shape(target: object) -> bool:
    """Whether an in-place call changes the shape of its argument, such as ``squeeze_``."""
    return operator_name(target) in _SHAPES


def is_elementwise(target: object) -> bool:
    """Whether an in-place call computes each element from those at the same place in its operands."""
    return isinstance(target, OpOverload) and (
        torch.Tag.pointwise in target.tags or operator_name(target) == "copy_"
    )


def own_name(target: object) -> bool:
    """Whether a target is an operator's in-place form, such as ``relu_``, rather than one with ``out=``."""
    return isinstance(target, OpOverload) and name_in_library(target).endswith("_")


# --- functional forms ------------------------------------------------------------------------------------


def functional_of(node: FxNode, source: str) -> tuple[Callable[..., Any], tuple[Any, ...], dict[str, Any]]:
    """Target and arguments of the call that returns what the in-place ``node`` would write.

    Raises
    ------
    UnsupportedModel
        If the node changes the memory itself.
    """
    target = node.target
    assert isinstance(target, OpOverload)
    name = operator_name(target)
    if name == "copy_" or _exchanges_data(node):
        return _copy(node)
    if name in _STORAGE:
        raise UnsupportedModel(
            f"'{node.name}' ({source}) uses {target}, which exchanges or resizes a tensor's memory: "
            "use an operator that returns a new tensor instead"
        )
    args, kwargs = _with_defaults(node, target)
    overload = _overload_of(target)
    if overload is not None:
        outs = {argument.name for argument in target._schema.arguments if argument.is_out}
        return overload, args, {key: value for key, value in kwargs.items() if key not in outs}
    return OnCopy(target), args, kwargs


def exchanges_memory(node: FxNode) -> bool:
    """Whether a call is ``x.data = y``."""
    return node.target is aten.set_.source_Tensor


def _exchanges_data(node: FxNode) -> bool:
    """Whether a call is ``x.data = y`` with ``y`` of the same shape and dtype."""
    if not exchanges_memory(node):
        return False
    into, given = (arg.meta["val"] for arg in node.args[:2] if isinstance(arg, FxNode))
    return bool(into.shape == given.shape and into.dtype == given.dtype)


def _copy(node: FxNode) -> tuple[Callable[..., Any], tuple[Any, ...], dict[str, Any]]:
    """The functional form of ``copy_``: the source's values in the target's dtype and shape."""
    target, source = node.args[0], node.args[1]
    assert isinstance(target, FxNode)
    assert isinstance(source, FxNode)
    into, given = target.meta["val"], source.meta["val"]
    if given.shape == into.shape:
        return aten.to.dtype, (source, into.dtype), {}
    return copied, (source, tuple(into.shape), into.dtype), {}


def copied(source: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """``source`` in another dtype, broadcast to ``shape``."""
    return source.to(dtype).expand(shape)


def _overload_of(target: OpOverload) -> OpOverload | None:
    """The overload that takes the same arguments and returns a new tensor."""
    if operator_name(target) in _DROPOUTS:
        # Their schemas have another name for the operand.
        return _DROPOUTS[operator_name(target)]
    if operator_name(target).startswith("bernoulli_"):
        return aten.bernoulli.p if target._overloadname == "float" else None
    packet, name = target.overloadpacket, name_in_library(target)
    if name.endswith("_"):
        packet = getattr(getattr(torch.ops, target.namespace), name.removesuffix("_"), None)
    wanted = [(a.name, str(a.type)) for a in target._schema.arguments if not a.is_out]
    for overload in () if packet is None else packet.overloads():
        found: OpOverload = getattr(packet, overload)
        alike = [(a.name, str(a.type)) for a in found._schema.arguments] == wanted
        if alike and found is not target and not draws(found):
            return found
    return None


def _with_defaults(node: FxNode, target: OpOverload) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The node's arguments, with the default probability of ``bernoulli_`` filled in."""
    args, kwargs = tuple(node.args), dict(node.kwargs)
    if operator_name(target) == "bernoulli_" and target._overloadname == "float" and len(args) == 1:
        kwargs = {key: value for key, value in kwargs.items() if key != "p"}
        args = (*args, node.kwargs.get("p", 0.5))
    return args, kwargs


class OnCopy:
    """An in-place operator without a functional form, applied to copies.

    It returns the operator's own results, if any, and then the copies.
    """

    def __init__(self, target: OpOverload) -> None:
        self.target = target
        self.tags = target.tags
        self.__name__ = str(target)
        self._written = tuple(
            (a.name, position)
            for position, a in enumerate(target._schema.arguments)
            if a.alias_info is not None and a.alias_info.is_write
        )
        self.num_results = sum(each.alias_info is None for each in target._schema.returns)
        """Number of results other than overwritten values."""
        self.returns_written = self.num_results < len(target._schema.returns)
        """Whether it returns what it overwrites."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        given: dict[Any, Any] = {**dict(enumerate(args)), **kwargs}
        copies: list[Tensor] = []
        for name, position in self._written:
            place = position if position < len(args) else name
            if place in given:
                given[place] = pytree.tree_map_only(Tensor, torch.clone, given[place])
                copies += [leaf for leaf in pytree.tree_leaves(given[place]) if isinstance(leaf, Tensor)]
        shapes = [copy.shape for copy in copies]
        positional = [given.pop(position) for position in range(len(args))]
        results = self.target(*positional, **given)
        self._refuse_resized(shapes, copies)
        if self.num_results == 0:
            return copies[0] if len(copies) == 1 else tuple(copies)
        return (results, *copies) if self.num_results == 1 else (*results, *copies)

    def _refuse_resized(self, shapes: list[torch.Size], copies: list[Tensor]) -> None:
        for before, copy in zip(shapes, copies, strict=True):
            if copy.shape != before:
                raise resized(f"the forward pass uses {self.target}, which changes", before, copy.shape)

    def __repr__(self) -> str:
        return self.__name__


def resized(what_changes: str, before: Sequence[int], after: Sequence[int]) -> UnsupportedModel:
    """The error for a call that gives elements to a tensor without any."""
    return UnsupportedModel(
        f"{what_changes} the shape of a tensor from {tuple(before)} to {tuple(after)}, as observers of "
        "quantisation do when they are called first: call the module itself on a small image once"
    )


# --- writes that autograd does not see, and checks -------------------------------------------------------


class _Revalued(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, old: Tensor, new: Tensor) -> Tensor:
        return new.view_as(new)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0], None


def revalued(old: Tensor, new: Tensor) -> Tensor:
    """The value of ``new`` with the gradient of ``old``: a write that autograd does not see."""
    result: Tensor = _Revalued.apply(old, new)  # type: ignore[no-untyped-call]
    return result


def asserted(condition: Tensor, message: str) -> Tensor:
    """Return ``condition``, which has to be true.

    Raises
    ------
    AssertionError
        If it is not.
    """
    if not is_fake(condition) and not bool(condition):
        raise AssertionError(message)
    return condition


declare(asserted, cost=Cost(is_opaque=True))


def is_detached(node: FxNode) -> bool:
    """Whether a view cuts the gradient off."""
    return operator_name(node.target).rstrip("_") == "detach"


# --- views -----------------------------------------------------------------------------------------------


def is_view(node: FxNode) -> FxNode | None:
    """The base of a call's result, if that is a view; else None."""
    if node.target is operator.getitem:
        parts = node.args[0]
        assert isinstance(parts, FxNode)
        return is_view(parts) if _is_divided(parts) else None
    if not isinstance(node.target, OpOverload) or not node.args:
        return None
    schema = node.target._schema.arguments
    alias = schema[0].alias_info if schema else None
    parent = node.args[0]
    if changes_shape(node.target) and isinstance(parent, FxNode):
        return parent
    if alias is None or alias.is_write or not isinstance(parent, FxNode):
        return None
    return parent if _is_divided(node) or _shares_memory(node, parent) else None


def _is_divided(node: FxNode) -> bool:
    return operator_name(node.target) in _DIVIDED


def _shares_memory(node: FxNode, parent: FxNode) -> bool:
    """Whether the traced values share memory, as ``reshape`` and ``contiguous`` may copy."""
    given, viewed = (each.meta.get("val") for each in (node, parent))
    if not isinstance(given, Tensor) or not isinstance(viewed, Tensor):
        return True
    memory = memory_of(given)
    return memory is not None and memory == memory_of(viewed)


def scattered(
    view: FxNode, before: Ref, value: Ref, source: str
) -> tuple[Callable[..., Any], tuple[Any, ...]]:
    """The call that writes ``value`` into the base of ``view``, whose other values stay as in ``before``.

    Its arguments may hold nodes of the flat graph.

    Raises
    ------
    UnsupportedModel
        If there is no such call for this kind of view.
    """
    if view.target is operator.getitem:
        return _into_part(view, before, value)
    if view.target is ENTRY:
        return entry_overwritten, (before, value, *view.args[1:])
    assert isinstance(view.target, OpOverload)
    name, shape = operator_name(view.target).rstrip("_"), _parent_shape(view)
    if name == "view" and view.target._overloadname == "dtype":
        name = "a view of another type"
    parent = view.args[0]
    assert isinstance(parent, FxNode)
    is_complex: bool = parent.meta["val"].is_complex()
    if name in _ADJOINTS and is_complex:
        # Values are conjugated too, and the adjoint of the adjoint is the matrix itself.
        return view.target, (value,)
    if name in ("conj", "_conj"):
        return aten.conj_physical.default, (value,)
    if name in _COMPLEX_PARTS and is_complex:
        return _COMPLEX_PARTS[name], (before, value)
    if name in _PERMUTED:
        return aten.permute.default, (value, _inverse(view, shape))
    if name in ("slice", "narrow"):
        return _SLICE[is_complex], (before, value, *_sliced(view, name, shape))
    if name == "select":
        return _ENTRY[is_complex], (before, value, *_bound(view, "dim", "index"))
    if name == "diagonal":
        return aten.diagonal_scatter.default, (before, value, *_bound(view, "offset", "dim1", "dim2"))
    if name in _SAME_VALUES and _shape(view) == shape:
        return aten.alias.default, (value,)
    if name in _REGROUPED and _shape(view).numel() == shape.numel():
        return aten.reshape.default, (value, list(shape))
    if name == "view_as_real":
        return aten.view_as_complex.default, (value,)
    if name == "view_as_complex":
        return aten.view_as_real.default, (value,)
    raise UnsupportedModel(
        f"'{view.name}' ({source}) is a view by {view.target} and is changed in place: "
        "use operators that return new tensors instead"
    )


def _shape(node: FxNode) -> torch.Size:
    shape: torch.Size = node.meta["val"].shape
    return shape


def _parent_shape(view: FxNode) -> torch.Size:
    parent = view.args[0]
    assert isinstance(parent, FxNode)
    return _shape(parent)


def _bound(view: FxNode, *names: str) -> list[Any]:
    """Arguments of a view's call by name, defaults filled in."""
    return bound(view.target, view.args, view.kwargs, *names)


def _sliced(view: FxNode, name: str, shape: torch.Size) -> tuple[int, int, int, int]:
    if name == "narrow":
        dim, start, length = _bound(view, "dim", "start", "length")
        start = start % shape[dim] if start < 0 else start
        return dim, start, start + length, 1
    dim, start, stop, step = _bound(view, "dim", "start", "end", "step")
    first, last, _ = slice(start, stop, step).indices(shape[dim])
    return dim, first, last, step


def _inverse(view: FxNode, shape: torch.Size) -> list[int]:
    """The inverse of a view's permutation."""
    assert callable(view.target)
    return places_of_axes(view.target, len(shape), view.args[1:], view.kwargs)


def _into_part(view: FxNode, before: Ref, value: Ref) -> tuple[Callable[..., Any], tuple[Any, ...]]:
    """One of the parts of a split, written back. Autograd lets nobody change it, so it needs no gradient."""
    parts, index = view.args
    assert isinstance(parts, FxNode)
    assert isinstance(parts.target, OpOverload)
    assert isinstance(index, int)
    (dim,) = _bound(parts, "dim")
    if operator_name(parts.target) == "unbind":
        return aten.select_scatter.default, (before, value, dim, index)
    sizes = [part.shape[dim] for part in parts.meta["val"]]
    start = sum(sizes[:index])
    return aten.slice_scatter.default, (before, value, dim, start, start + sizes[index], 1)
