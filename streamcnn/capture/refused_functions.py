"""Functions of PyTorch's that a forward pass cannot call where it is captured without values, and what to do
instead."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, NoReturn

from torch import Tensor

from streamcnn.errors import UnsupportedModel

_GRADIENT = (
    "{name}(), and a map that is streamed has no gradient of its own: return the map as a further result and "
    "ask autograd.grad for its gradient"
)
_COPY = (
    "copy.copy() or pickles a tensor, which has no values yet: use x.clone() for a copy with a gradient, "
    "x.detach().clone() for one without; plain PyTorch's copy.copy() lets no gradient through"
)
_MEMORY = "{name}() on a tensor that has no memory yet: call it on what goes in, or on the results"
_PIECES = (
    "{name}() of a sparse tensor, and how many values that holds is not known yet: work it out outside of "
    "the forward pass, and keep indices and values as buffers"
)
_ONE_BY_ONE = (
    "{name}(), which gives a Python function the values of a tensor one by one, and there are none yet: use "
    "operators, or call it outside of the forward pass"
)
_EXPORT = (
    "{name}() and so hands the memory of a tensor to another library, and it has none yet: return the "
    "tensor, and hand it on outside of the forward pass"
)
_SPARSE = ("_nnz", "_indices", "_values", "indices", "values", "crow_indices", "col_indices")
SPARSE_PIECES = frozenset(_SPARSE[1:])
"""Operators that give the parts of a sparse tensor, whose sizes its values decide."""

_REFUSED: Mapping[Callable[..., Any], str] = MappingProxyType(
    {
        Tensor.retain_grad: _GRADIENT,
        Tensor.register_post_accumulate_grad_hook: _GRADIENT,
        Tensor.__reduce_ex__: _COPY,
        Tensor.share_memory_: _MEMORY,
        Tensor.is_set_to: _MEMORY,
        Tensor.__dlpack__: _EXPORT,
        **dict.fromkeys((Tensor.apply_, Tensor.map_, Tensor.map2_), _ONE_BY_ONE),
        **{getattr(Tensor, name): _PIECES for name in (*_SPARSE, "ccol_indices", "row_indices")},
    }
)
_OF_IMAGE = MappingProxyType(
    {
        Tensor.grad.__get__: "grad",  # type: ignore[union-attr]
        Tensor.is_leaf.__get__: "is_leaf",  # type: ignore[attr-defined]
    }
)


def refuse_function(function: Callable[..., Any]) -> None:
    """Refuse ``function`` if a captured forward pass cannot call it.

    Raises
    ------
    UnsupportedModel
        If it cannot.
    """
    text = _REFUSED.get(function)
    if text is not None:
        raise UnsupportedModel(f"the forward pass calls {text.format(name=function.__name__)}")


def refuse_of_image(function: Callable[..., Any]) -> None:
    """Refuse to read attributes of an image with a gradient that only the caller's own image has.

    Raises
    ------
    UnsupportedModel
        If ``function`` reads such an attribute.
    """
    name = _OF_IMAGE.get(function)
    if name is not None:
        raise UnsupportedModel(
            f"the forward pass reads .{name} of the image, which the image that it is captured with does not "
            "share with the caller's: pass to the model, as a further argument, what is to depend on it"
        )


def refuse_address() -> NoReturn:
    """Refuse to tell where the values of a tensor are that the forward pass has made, or of one that goes in.

    Raises
    ------
    UnsupportedModel
        Always.
    """
    raise UnsupportedModel(
        "the forward pass calls data_ptr(), and a tensor that is streamed has no address: tell tensors apart "
        "by 'is', or by names of your own"
    )


def refuse_multi_grad_hook(*args: Any, **kwargs: Any) -> NoReturn:
    """Replace ``torch.autograd.graph.register_multi_grad_hook``, which is refused."""
    raise UnsupportedModel(
        "the forward pass calls register_multi_grad_hook(), and a streamed pass has other nodes in its "
        "graph: set a hook on each tensor (Tensor.register_hook), or return them as further results and set "
        "it on those"
    )
