"""Captures that hold for images of any height and width, where sizes keep changing.

Dynamo puts symbols in the place of height and width. The graph that it gives is then lowered for each size
that comes, which takes a fraction of the time that following the code takes. It holds where the code looks at
no height or width, as most convolutional networks do not. Dynamo would follow code that does, too; but what
it makes of a symbol is not always what Python makes of its number (``64 in x.shape``, ``int(-h / 3)``,
``h % 1.5``, ``is``), and it says nothing where it is not.

With symbols Dynamo takes two or three times as long as without, and longer where sizes go through many
layers: so it is tried once there have been several sizes, and given up in time.
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
    """A capture holds for one size alone, or takes too long with symbols for sizes."""


def outline(image: Tensor, arguments: Any) -> tuple[Any, ...]:
    """What a call's image and further arguments are, but for values of tensors and the image's size."""
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
    """A block in which Dynamo puts symbols in the place of the image's height and width, if it can."""
    import torch._dynamo

    marked = [(image, (2, 3))]
    for _, argument in named_arguments(arguments):
        if axes := _axes_of_the_size(argument, image):
            marked.append((argument, axes))
    before = [(tensor, _marks(tensor)) for tensor, _ in marked]
    try:
        for tensor, axes in marked:
            # A firmer mark would make an error of code that fixes a size.
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
    """A block in which code is followed as long as it looks at no symbol, and not for long.

    ``seconds`` is what that takes without symbols.

    Raises
    ------
    NotOfAnySize
        Within Dynamo, where the code gets a symbol, or at the first instruction after too long.
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
    """Refuse a graph that does not say all that it does for images of any size.

    Raises
    ------
    NotOfAnySize
        If a size is fixed, others than those of the image and of arguments as large go in, or calls have
        bodies of their own.
    """
    if not is_plain(module):
        raise NotOfAnySize("some calls have bodies of their own")
    values = [node.meta["example_value"] for node in module.graph.nodes if node.op == "placeholder"]
    symbols = {str(value) for value in values if isinstance(value, torch.SymInt)}
    tensors = [value for value in values if isinstance(value, Tensor)]
    sizes = {str(size) for tensor in tensors for size in tensor.shape if isinstance(size, torch.SymInt)}
    if not symbols or sizes != symbols or not all(symbol.isidentifier() for symbol in symbols):
        raise NotOfAnySize("a size is fixed, or others go in")
