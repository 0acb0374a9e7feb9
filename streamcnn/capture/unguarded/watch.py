"""A mode that follows, notes or refuses what tracing alone would miss of a forward pass on fake tensors."""

from __future__ import annotations

import traceback
import weakref
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensor,
    FakeTensorMode,
    UnsupportedOperatorException,
)
from torch.fx import Proxy
from torch.fx.experimental.proxy_tensor import (
    disable_proxy_modes_tracing,
    get_proxy_mode,
    track_tensor_tree,
)
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree
from torch.utils.hooks import RemovableHandle

from streamcnn.capture.lines import TORCH_FOLDER, called_by_user
from streamcnn.capture.refused_functions import refuse_address, refuse_function, refuse_of_image
from streamcnn.capture.unguarded.blind import BLIND
from streamcnn.capture.unguarded.known_shapes import KnownShapes
from streamcnn.capture.unguarded.known_values import KnownValues, called_on_values
from streamcnn.capture.unguarded.removable_hooks import RemovableHook
from streamcnn.capture.unguarded.replaced_functions import refuse_bound
from streamcnn.errors import UnsupportedModel
from streamcnn.graph.flattening import drawn_between
from streamcnn.graph.in_place import resized
from streamcnn.graph.monkeypatches import refuse_replaced
from streamcnn.graph.whole import beside_the_trace, proxy_of, record_hook
from streamcnn.support.sizes import is_size

T = TypeVar("T")

_PLAIN = (Tensor, nn.Parameter)
_COPIES = frozenset(
    getattr(Tensor, name) for name in ("item", "tolist", "__bool__", "__float__", "__index__", "__int__")
)
_ASKED = (
    _COPIES
    | {getattr(place, name) for place in (torch, Tensor) for name in ("equal", "allclose", "is_nonzero")}
    | {getattr(Tensor, name) for name in ("__complex__", "__contains__", "__format__", "__repr__")}
)
"""Functions that return to Python what they find in values."""
_READS = _COPIES | {getattr(Tensor, name) for name in ("numpy", "__array__")}
"""Methods that return a tensor's values to Python; the last two share its memory."""
_WITHOUT_VALUES = (
    UnsupportedModel,
    DataDependentOutputException,
    DynamicOutputShapeException,
    UnsupportedOperatorException,
    NotImplementedError,
)
"""Errors that are due to missing values, and not to the user's code."""
_STANDING_FOR_OPERATORS = tuple(
    str(Path(TORCH_FOLDER, name)) for name in ("_refs", "_prims", "_subclasses", "_decomp", "_meta_")
)
"""How paths of PyTorch's code begin that computes shapes in place of operators."""


@dataclass(slots=True)
class Noted:
    """Notes on what a forward pass has done."""

    hooks: dict[str, RemovableHook] = field(default_factory=dict)
    """Hooks on gradients, by the names of the traced calls that set them."""
    made: list[weakref.ref[Tensor]] = field(default_factory=list)
    """Tensors that functions have returned."""
    marks_image: bool = False
    """Whether the pass has changed ``requires_grad`` of the image."""
    refusal: Exception | None = None
    """The first error that plain PyTorch would not have raised; the code may have caught it, and then have
    continued differently from plain PyTorch."""

    def note_refusal(self, error: Exception) -> None:
        """Note an error that plain PyTorch would not have raised, unless there is one."""
        self.refusal = self.refusal or error

    def forget(self, error: Exception) -> None:
        """Ignore an error that was noted."""
        self.refusal = None if self.refusal is error else self.refusal

    def noting(self, function: Callable[..., T]) -> Callable[..., T]:
        """Wrap a replacement for a PyTorch function so that its refusals are noted."""

        def noted(*args: Any, **kwargs: Any) -> T:
            try:
                return function(*args, **kwargs)
            except UnsupportedModel as error:
                self.note_refusal(error)
                raise

        return noted


def _needs_values(func: Any, args: tuple[Any, ...]) -> bool:
    """Whether a failed call would have succeeded on a tensor with values."""
    if func in (Tensor.numpy, Tensor.__array__):
        return not args[0].requires_grad
    return func in _READS or func is Tensor.__format__


def _is_of_stand_ins(error: Exception) -> bool:
    """Whether an error comes from what stands for an operator on tensors without values."""
    *_, (frame, _) = traceback.walk_tb(error.__traceback__)
    return frame.f_code.co_filename.startswith(_STANDING_FOR_OPERATORS)


def is_plain_tensor(tensor: Tensor) -> bool:
    """Whether a tensor is a plain ``Tensor`` or ``Parameter``, and of no subclass."""
    return type(tensor) in _PLAIN


class Watch(TorchFunctionMode):
    """A mode that sees each PyTorch function that the forward pass calls.

    Parameters
    ----------
    mode
        The mode of the fake tensors.
    image_name
        Name of the image in the trace.
    known
        The values of the pass's states.
    noted
        Collects what the pass does.
    """

    def __init__(self, mode: FakeTensorMode, image_name: str, known: KnownValues, noted: Noted) -> None:
        super().__init__()
        self.mode = mode
        self.image_name = image_name
        self.known = known
        self.noted = noted
        self.infers = torch.is_inference_mode_enabled()
        self.stand_ins: dict[int, tuple[Tensor, Tensor]] = {}
        """Tensors from outside, each with its stand-in, by ``id``."""
        self._known_shapes = KnownShapes(known.of, self._constant)

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        try:
            return self._called(func, args, kwargs or {})
        except Exception as error:
            if isinstance(error, _WITHOUT_VALUES) or _needs_values(func, args):
                self.noted.note_refusal(error)
            if type(error) in (ValueError, AssertionError) and _is_of_stand_ins(error):
                # The code may catch what the real operator would raise.
                raise RuntimeError(*error.args) from error
            raise

    def _called(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if torch.is_inference_mode_enabled() and not self.infers:
            raise UnsupportedModel(
                "the forward pass enters torch.inference_mode(), whose tensors have no gradient anywhere: "
                "use torch.no_grad() for the block"
            )
        refuse_replaced(func)
        if func in _READS and self._is_from_outside(args[0]):
            with beside_the_trace():
                return func(*args, **kwargs)
        if func is Tensor.data_ptr and called_by_user() and not self._is_from_outside(args[0]):
            refuse_address()
        if func in _ASKED:
            found = called_on_values(func, args, kwargs, self._values)
            if found is not NotImplemented:
                return found
        func = BLIND.get(func, func)
        args, kwargs = pytree.tree_map_only(Tensor, self.traced, (args, kwargs), is_leaf=is_size)
        found = self._as_traced(func, args, kwargs)
        if found is not NotImplemented:
            return found
        if func is Tensor.requires_grad_ or func == Tensor.requires_grad.__set__:  # type: ignore[attr-defined]
            self._mark(*args, **kwargs)
        refuse_function(func)
        if args and isinstance(args[0], Tensor) and self._is_image(args[0]) and args[0].requires_grad:
            refuse_of_image(func)
        if get_proxy_mode() is not None:
            # Else it is what runs whole, whose own results autograd looks at.
            refuse_bound((args, kwargs))
        result = self._known_shapes.call(func, args, kwargs)
        if result is NotImplemented:
            result = self._known_shapes.with_numbers(func, args, kwargs)
        if isinstance(result, FakeTensor):
            self.noted.made.append(weakref.ref(result))
        return result

    def _as_traced(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The result of a function that is carried out otherwise in a trace; NotImplemented for any other."""
        if func == Tensor.data.__get__:  # type: ignore[attr-defined]
            return args[0].detach()
        if func == Tensor._version.__get__:  # type: ignore[attr-defined]
            return self.known.version_of(args[0])
        if func is Tensor.__deepcopy__:
            return _deep_copy(*args)
        if func == Tensor.grad_fn.__get__:  # type: ignore[union-attr]
            return _without_hooks(func(*args))
        if func is Tensor.register_hook:
            return self._hook(*args)
        if func == Tensor.data.__set__:  # type: ignore[attr-defined]
            return _set_data(*args)
        if func is Tensor.random_ and len(args) == 3 and not kwargs:
            return drawn_between(*args)
        if func is Tensor.resize_ and not kwargs:
            return _resized(*args)
        return NotImplemented

    def traced(self, tensor: Tensor) -> Tensor:
        """The stand-in for a tensor; for one from outside, it is made at first use.

        Otherwise writes to such a tensor, and reads by NumPy, would bypass the trace.
        """
        mode = get_proxy_mode()
        if mode is None or not is_plain_tensor(tensor):
            return tensor
        if id(tensor) not in self.stand_ins:
            # Making it is not part of the forward pass.
            with disable_proxy_modes_tracing(), torch._C.DisableTorchFunction():
                fake = self.mode.from_tensor(tensor)
            node: Any = mode.tracer.create_arg(tensor)
            track_tensor_tree(fake, Proxy(node, mode.tracer), constant=None, tracer=mode.tracer)
            self.stand_ins[id(tensor)] = (tensor, fake)
        return self.stand_ins[id(tensor)][1]

    def _constant(self, tensor: Tensor) -> Tensor:
        """A traced copy of a tensor that was computed beside the trace."""
        return self.traced(tensor).clone()

    def _values(self, tensor: Tensor) -> Tensor | None:
        """The present values of a tensor; None if they depend on the image."""
        _, stand_in = self.stand_ins.get(id(tensor), (tensor, tensor))
        return self.known.of(stand_in)

    def _is_from_outside(self, tensor: Tensor) -> bool:
        """Whether a tensor comes from outside, and the pass has not overwritten it."""
        _, stand_in = self.stand_ins.get(id(tensor), (tensor, None))
        return is_plain_tensor(tensor) and (stand_in is None or stand_in._version == 0)

    def _is_image(self, tensor: Tensor) -> bool:
        proxy = proxy_of(tensor)
        return proxy is not None and proxy.node.name == self.image_name

    def _mark(self, tensor: Tensor, requires_grad: bool = True) -> None:
        """Note a change of ``requires_grad`` of the image; refuse one of a state after its first use."""
        proxy = proxy_of(tensor)
        node = None if proxy is None else proxy.node
        if node is None or node.op != "placeholder" or tensor.requires_grad == requires_grad:
            return
        if node.name == self.image_name:
            self.noted.marks_image = True
        elif node.users:
            raise UnsupportedModel(
                "the forward pass freezes or releases a tensor (requires_grad) that it has used already: do "
                "so before its first use, or outside of the forward pass"
            )

    def _hook(self, tensor: Tensor, hook: Callable[..., Any]) -> RemovableHandle:
        proxy = proxy_of(tensor)
        node = None if proxy is None else proxy.node
        if node is None or (node.op == "placeholder" and node.name != self.image_name):
            raise UnsupportedModel(
                "the forward pass sets a hook on the gradient of a parameter, a buffer or a tensor from "
                "outside: set it once, outside of the forward pass"
            )
        noted = self.noted.hooks[record_hook(tensor)] = RemovableHook(hook)
        return noted.handle


_OF_NODES = ("name", "next_functions", "metadata")


class _Recorded:
    """A tensor's ``grad_fn`` while tracing: the node itself, on which hooks are refused."""

    def __init__(self, node: Any) -> None:
        self._node = node

    def __getattr__(self, name: str) -> Any:
        if name in ("register_hook", "register_prehook"):
            raise UnsupportedModel(
                f"the forward pass calls grad_fn.{name}(), and a streamed pass has other nodes in its graph: "
                "set the hook on the tensor itself (Tensor.register_hook)"
            )
        if name in _OF_NODES or name.startswith("_saved"):
            raise UnsupportedModel(
                f"the forward pass reads grad_fn.{name}, and a streamed pass has other nodes in its graph: "
                "ask only whether there is one (grad_fn is None, requires_grad)"
            )
        return getattr(self._node, name)


def _without_hooks(node: Any) -> _Recorded | None:
    return None if node is None else _Recorded(node)


def _resized(tensor: Tensor, *size: Any) -> Tensor:
    """``tensor.resize_(size)``, which quantisation observers call each time."""
    wanted = tuple(size[0] if len(size) == 1 and not isinstance(size[0], int) else size)
    if wanted == tuple(tensor.shape):
        return tensor
    if tensor.numel():
        return tensor.resize_(wanted)
    raise resized("the forward pass calls resize_(), which changes", tensor.shape, wanted)


def _deep_copy(tensor: Tensor, memo: dict[int, Any]) -> Tensor:
    """``copy.deepcopy`` of a tensor: a detached copy of its values."""
    if id(tensor) in memo:
        found: Tensor = memo[id(tensor)]
        return found
    if not tensor.is_leaf:
        raise RuntimeError("copy.deepcopy of a tensor that was computed: only leaves can be copied by it")
    found = memo[id(tensor)] = tensor.detach().clone()
    with disable_proxy_modes_tracing():
        return found.requires_grad_(tensor.requires_grad)


def _set_data(tensor: Tensor, value: Tensor) -> None:
    """``tensor.data = value``, which autograd does not see."""
    if value.shape != tensor.shape or value.dtype != tensor.dtype:
        raise UnsupportedModel(
            f"the forward pass assigns a tensor of shape {tuple(value.shape)} to the .data of one of shape "
            f"{tuple(tensor.shape)}: do so outside of it"
        )
    with torch.no_grad():
        tensor.detach().copy_(value)
