"""A captured forward pass: a flat list of functional ATen calls.

Tracing and planning start from a :class:`RawGraph`: in-place operators are functional calls, changes of
states are named results, and each call knows the ``no_grad`` and autocast blocks around it. The graph decides
nothing about streaming, and of the user's Python it holds only functions that run whole.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch._ops import OpOverload
from torch.utils import _pytree as pytree

from streamcnn.geometry.windows import Axes
from streamcnn.graph.autocast import Casts
from streamcnn.graph.program import refs_in
from streamcnn.graph.whole import Whole

CUMULATIVE = math.nan
"""Stands for batch norm's ``momentum=None`` (a cumulative average) in a captured call."""


@dataclass(frozen=True, slots=True)
class RawNode:
    """One functional call of a captured graph."""

    name: str
    target: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    source: str
    in_place: Callable[..., Any] | None = None
    """The user's own operator, if it overwrites its first argument."""
    overwrites: str = ""
    """The value that the result overwrites, in that value's dtype; empty for none."""
    grad: bool = True
    """Whether autograd would record the call."""
    casts: Casts | None = None
    """Autocast as a block of the model sets it; ``None`` as it is around the pass."""
    line: str = field(default="", compare=False)
    """The line of the user's code, with its file; empty if unknown."""
    operands: tuple[str, ...] = field(init=False, compare=False)
    """Names of the values that the call reads, each once."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "operands", refs_in((self.args, dict(self.kwargs))))


@dataclass(frozen=True, slots=True)
class Given:
    """A result of the model that is one of its input tensors."""

    key: str


@dataclass(frozen=True, slots=True)
class RawGraph:
    """A captured forward pass before any decision is taken."""

    nodes: tuple[RawNode, ...]
    image: str
    image_shape: tuple[int, ...]
    states: Mapping[str, str]
    """Node name to key of a parameter, a buffer or a further argument: qualified names for those of the
    module."""
    maps: Mapping[str, Axes]
    """Of the states, further arguments that are maps, with their spatial axes."""
    constants: Mapping[str, Tensor]
    outputs: tuple[Any, ...]
    """The results: refs, :class:`Given` ones, and plain values; then values that are checked."""
    updates: Mapping[str, str]
    """Key of each state that the pass changes, to the node that holds its new value."""
    enables_grad: bool = False
    """Whether a block of the model enables gradients inside one that disables them."""
    num_checks: int = 0
    """Number of the last results that are values which the model only makes assertions about."""
    changes_image: bool = False
    """Whether the model overwrites the image, as ``x.sub_(mean)`` does."""
    marks_image: bool = False
    """Whether the model changes ``requires_grad`` of the image, as ``x.requires_grad_()`` does."""
    key: str = field(init=False, compare=False)
    """Equal for graphs that are planned alike."""

    def __post_init__(self) -> None:
        nodes = (
            f"{n.name}={_text(n.target)}{n.args}{n.kwargs}{n.grad}{n.casts}{n.overwrites}" for n in self.nodes
        )
        constants = ((name, tuple(c.shape), c.dtype) for name, c in self.constants.items())
        rest = (self.image, self.image_shape, self.states, self.maps, self.outputs, self.updates)
        object.__setattr__(self, "key", "\n".join([*nodes, *map(str, constants), *map(str, rest)]))


def _text(target: Callable[..., Any]) -> str:
    """A target as part of a graph's key; for a user's function, everything that plans depend on."""
    if isinstance(target, Whole):
        return target.outline
    return str(target) if isinstance(target, OpOverload) else getattr(target, "__name__", str(target))


def moved(statistic: Tensor, normalised: Tensor) -> Tensor:
    """A placeholder for a running statistic as updated by the norm that returned ``normalised``.

    The norm's rule computes the value; this function is never called."""
    raise AssertionError("it stands for a value, and is not called")


ARGUMENT = "argument "
"""How the keys of further arguments begin."""


def named_arguments(arguments: Any) -> Iterator[tuple[str, Tensor]]:
    """Keys and tensors among a call's further arguments, given as ``(args, kwargs)``."""
    for path, leaf in pytree.tree_leaves_with_path(arguments):
        if isinstance(leaf, Tensor):
            yield f"{ARGUMENT}{pytree.keystr(path[1:])}", leaf


def module_states(net: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers by qualified name; a tied one appears under each of its names."""
    parameters = net.named_parameters(remove_duplicate=False)
    return {**dict(parameters), **dict(net.named_buffers(remove_duplicate=False))}


def device_of(net: nn.Module) -> torch.device:
    """The device of a module's first parameter or buffer, for the image of a pass; the CPU if it has none."""
    first = next(chain(net.parameters(), net.buffers()), None)
    return torch.device("cpu") if first is None else first.device


def is_argument(key: str) -> bool:
    """Whether a state's key is that of a further argument."""
    return key.startswith(ARGUMENT)


def outside_key(name: str) -> str:
    """The key of a tensor outside the module that the pass changes, from its name in the graph."""
    return f"a tensor from outside of the module ({name})"


def spatial_axes(shape: tuple[int, ...], image_shape: tuple[int, ...]) -> Axes | None:
    """The spatial axes of an argument: those with the image's size, or the last two of four axes."""
    size = image_shape[2:]
    for first in (len(shape) - 2, len(shape) - 3):
        if first >= 0 and shape[first : first + 2] == size and size != (1, 1):
            return first, first + 1
    return (2, 3) if len(shape) == 4 and min(shape[2:]) > 1 else None
