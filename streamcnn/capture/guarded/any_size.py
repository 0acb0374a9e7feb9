"""Captures that hold for images of any height and width, where sizes keep changing.

Dynamo replaces height and width by symbols. Its graph is then lowered for each new size, which takes a
fraction of the time of following the code. This is exact if the code looks at no height or width, as most
convolutional networks do not. Dynamo would follow code that does, but what it computes with a symbol is not
always what Python computes with the number (``64 in x.shape``, ``int(-h / 3)``, ``h % 1.5``, ``is``), and it
does not say so.

With symbols Dynamo takes two or three times as long as without, and longer if sizes pass through many
layers. So symbols are tried only after several sizes, and under a time limit.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from copy import copy
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch.fx import GraphModule
from torch.utils import _pytree as pytree

from streamcnn.capture.capture import named_arguments, spatial_axes
from streamcnn.geometry.windows import Axes
from streamcnn.graph.flattening import is_plain

MANY_SIZES = 2
"""After images of so many sizes, further ones are expected."""
_SLOWER = 5
"""Following code with symbols may take so many times as long as without,"""
_AT_LEAST = 10.0
"""or so many seconds: Dynamo loads more code when it uses symbols first."""


class NotOfAnySize(Exception):
    """The capture is valid for one size alone, or takes too long with symbols for sizes."""


def outline(image: Tensor, arguments: Any) -> tuple[Any, ...]:
    """A description of a call's image and further arguments, without tensors' values and the image's size."""
    leaves, structure = pytree.tree_flatten(arguments)
    rest = tuple(_outline(leaf, image) for leaf in leaves)
    return image.shape[:2], image.dtype, image.device, image.requires_grad, structure, rest


def _outline(value: Any, image: Tensor) -> Any:
    if not isinstance(value, Tensor):
        return value if isinstance(value, (bool, int, float, str)) else type(value)
    axes = _axes_of_the_size(value, image) or ()
    shape = tuple(None if axis in axes else size for axis, size in enumerate(value.shape))
    return shape, value.dtype, value.device, value.requires_grad


def _axes_of_the_size(argument: Tensor, image: Tensor) -> Axes | None:
    """The axes of an argument that are the image's height and width, if it has them."""
    axes = spatial_axes(tuple(argument.shape), tuple(image.shape))
    return axes if axes and tuple(argument.shape[axis] for axis in axes) == image.shape[2:] else None


@contextmanager
def with_symbols(image: Tensor, arguments: Any) -> Iterator[None]:
    """Let Dynamo replace the image's height and width by symbols, where it can, for the block."""
    import torch._dynamo

    marked = [(image, (2, 3))]
    for _, argument in named_arguments(arguments):
        if axes := _axes_of_the_size(argument, image):
            marked.append((argument, axes))
    before = [(tensor, _marks(tensor)) for tensor, _ in marked]
    try:
        for tensor, axes in marked:
            # A stronger mark would turn code that fixes a size into an error.
            torch._dynamo.maybe_mark_dynamic(tensor, list(axes))
        yield
    finally:
        for tensor, marks in before:
            for name in _marks(tensor):
                delattr(tensor, name)
            vars(tensor).update(marks)


def _marks(tensor: Tensor) -> dict[str, Any]:
    """A copy of what Dynamo has noted on a tensor."""
    return {name: copy(value) for name, value in vars(tensor).items() if "dynamo" in name}


@contextmanager
def given_up_in_time(seconds: float) -> Iterator[None]:
    """Stop following code in the block once it looks at a symbol, or takes too long.

    ``seconds`` is the time of a capture without symbols, from which the limit is derived.

    Raises
    ------
    NotOfAnySize
        Inside Dynamo, when the code gets a symbol, or at the first instruction after the limit.
    """
    from torch._dynamo.symbolic_convert import InstructionTranslatorBase
    from torch._dynamo.variables.tensor import SymNodeVariable

    deadline, here = time.perf_counter() + max(_SLOWER * seconds, _AT_LEAST), threading.get_ident()
    step, init = InstructionTranslatorBase.step, SymNodeVariable.__init__

    def step_in_time(self: Any) -> bool:
        if time.perf_counter() > deadline and threading.get_ident() == here:
            raise NotOfAnySize("sizes go through many operators")
        return step(self)

    def get_no_symbol(self: Any, *args: Any, **kwargs: Any) -> None:
        if threading.get_ident() == here:
            raise NotOfAnySize("the code looks at a size")
        init(self, *args, **kwargs)

    with (
        patch.object(InstructionTranslatorBase, "step", step_in_time),
        patch.object(SymNodeVariable, "__init__", get_no_symbol),
    ):
        yield


def check_any_size(module: GraphModule) -> None:
    """Make sure that a graph is valid for images of any size.

    Raises
    ------
    NotOfAnySize
        If a size is fixed, the graph reads sizes other than those of its input tensors, or a call has a
        graph of its own as its body.
    """
    if not is_plain(module):
        raise NotOfAnySize("some calls have bodies of their own")
    values = [node.meta["example_value"] for node in module.graph.nodes if node.op == "placeholder"]
    symbols = {str(value) for value in values if isinstance(value, torch.SymInt)}
    tensors = [value for value in values if isinstance(value, Tensor)]
    sizes = {str(size) for tensor in tensors for size in tensor.shape if isinstance(size, torch.SymInt)}
    if not symbols or sizes != symbols or not all(symbol.isidentifier() for symbol in symbols):
        raise NotOfAnySize("a size is fixed, or others go in")
