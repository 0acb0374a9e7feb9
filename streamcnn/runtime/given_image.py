"""The image of a call as users give it: by position or by name, or as a shape for a plan."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from numbers import Integral
from typing import Any, TypeGuard

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from streamcnn.capture.capture import RawGraph
from streamcnn.capture.subclasses import has_own_functions
from streamcnn.data.reader import Image
from streamcnn.errors import DatasetMismatch, UnsupportedModel
from streamcnn.graph.program import Ref
from streamcnn.support.sizes import is_size


def image_by_name(net: nn.Module, kwargs: Mapping[str, Any]) -> tuple[Image, dict[str, Any]]:
    """The image that was passed by the name of the module's first parameter, and the other arguments.

    Raises
    ------
    TypeError
        If no image was passed so, or the parameter cannot be passed by position as well.
    """
    first = next(iter(inspect.signature(net.forward).parameters.values()), None)
    if first is None or first.kind in (first.VAR_POSITIONAL, first.VAR_KEYWORD, first.POSITIONAL_ONLY):
        raise TypeError(
            f"the image is missing: forward() of {type(net).__name__} has no name for it; pass it first, "
            "as in model(image)"
        )
    name = first.name
    if first.kind is first.KEYWORD_ONLY:
        raise TypeError(
            f"forward() of {type(net).__name__} takes '{name}' by name alone: allowed is an image that "
            f"can be passed by position, too; write forward(self, {name}, ...), without * in front"
        )
    if name not in kwargs:
        raise TypeError(f"the image is missing: pass it first, or by its name '{name}'")
    return kwargs[name], {key: value for key, value in kwargs.items() if key != name}


def require_values(device: torch.device, image: Image) -> None:
    """Check that the model's device holds values, and that regions of an image can be read.

    Raises
    ------
    UnsupportedModel
        If the model is on the meta device.
    DatasetMismatch
        If the image is a sparse, nested or quantized tensor, or on the meta device.
    """
    if device.type == "meta":
        raise UnsupportedModel(
            "the model is on the meta device, where parameters have no values: give it some first, by "
            "to_empty() and an initialisation, or by load_state_dict(assign=True)"
        )
    if not isinstance(image, Tensor):
        return
    kinds = {"nested": image.is_nested, "quantized": image.is_quantized, "on the meta device": image.is_meta}
    found = [kind for kind, is_so in kinds.items() if is_so]
    if not found and image.layout is torch.strided:
        return
    raise DatasetMismatch(
        f"image tensor is {found[0] if found else str(image.layout).removeprefix('torch.')}: allowed is a "
        "dense one (N, C, H, W) with values, as to_dense(), dequantize() or torch.stack() gives"
    )


def is_image(image: tuple[int, int, int, int] | Image) -> TypeGuard[Image]:
    """Whether ``image`` is an image, and not the numbers of a shape."""
    return not isinstance(image, (tuple, list)) or not any(isinstance(each, Integral) for each in image)


def as_shape(shape: Any) -> tuple[int, int, int, int]:
    """``shape`` as whole numbers (N, C, H, W).

    Raises
    ------
    ValueError
        If it is not a shape of images.
    """
    if len(shape) != 4 or any(not isinstance(each, Integral) or each < 1 for each in shape):
        raise ValueError(
            f"shape={tuple(shape)}: allowed are four positive whole numbers (N, C, H, W), or images as for "
            "the model itself"
        )
    n, c, h, w = map(int, shape)
    return (n, c, h, w)


def like_image(image: Image, results: Any) -> Any:
    """The results of a module, as tensors of the image's class if that is a subclass of Tensor.

    Plain PyTorch returns tensors of that class. In a pass some are of it, and others, read from stores, are
    not. A class with its own ``__torch_function__``, such as MONAI's MetaTensor, gets each result as that of
    a function of the image.
    """
    kind: Any = type(image)
    if not isinstance(image, Tensor) or kind is Tensor:
        return results
    own = has_own_functions(kind)
    return pytree.tree_map_only(
        Tensor,
        lambda each: _of_function(image, each) if own else _of_class(kind, each),
        results,
        is_leaf=is_size,
    )


def with_own_image(results: Sequence[Any], graph: RawGraph, image: Image) -> list[Any]:
    """The results of a pass, of which one that is the image is the very tensor that the caller gave."""

    def is_own(output: Any, result: Any) -> bool:
        return (
            type(image) in (Tensor, nn.Parameter)
            and output == Ref(graph.image)
            and _kind(result) == _kind(image)
        )

    return [
        image if is_own(output, result) else result
        for output, result in zip(graph.outputs, results, strict=False)
    ]


def _kind(tensor: Any) -> tuple[torch.device, torch.dtype]:
    return tensor.device, tensor.dtype


def _of_class(kind: type[Tensor], result: Tensor) -> Tensor:
    return result.as_subclass(kind) if type(result) is Tensor else result


def _of_function(image: Tensor, result: Tensor) -> Any:
    """The result as the image's class returns it from a function of the image."""

    def streamed(image: Tensor) -> Tensor:
        return result

    kind: Any = type(image)
    found: Any = kind.__torch_function__(streamed, (kind,), (image,), {})
    return result if found is NotImplemented else found
