"""Cases: each is the smallest net that shows one kind of code, and the script that trains it.

Most faults appear on the second pass, so a case is a script and not one call. The script runs twice, once on
the plain net and once on a streamed one, and everything it records must agree.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from benchmarks.compatibility.snapshot import Snapshot, snapshot
from streamcnn import StreamingModel

TILE = 16
SHAPE = (2, 3, 29, 37)
WIDTH = 6
"""Channels of the maps in `Small`."""
SAME = "same"
SAME_OR_REFUSED = "same or refused"

Shape = tuple[int, int, int, int]
Build = Callable[[], Any]
Steps = Callable[[Any, nn.Module, "Record"], None]


@dataclass(frozen=True, slots=True)
class Case:
    """One kind of code, and the expected result."""

    name: str
    kind: str
    build: Build
    """Makes the net, or a pair of the net and the objects outside it that its code changes."""
    shape: Shape
    """Shape (N, C, H, W) of the images."""
    steps: Steps
    expected: str
    """``same``, ``same or refused``, or a regular expression of the refusal's text."""
    dtype: torch.dtype = torch.float64
    tolerance: float = 1e-9
    slow: bool = False


class Record:
    """Runs a script's passes, and records what the script did, by name."""

    def __init__(self, case: Case, net: nn.Module, world: Any, *, streamed: bool) -> None:
        self.case = case
        self.net = net
        self.world = world
        self.streamed = streamed
        self.values: dict[str, Snapshot] = {}
        """Snapshots by group; the floor of errors is that of the group."""
        self.num_passes = 0
        self.before = snapshot(net)

    def __call__(self, name: str, value: Any) -> None:
        """Record ``value`` as it is now, under a name that must be new."""
        assert name not in self.values, f"'{name}' is recorded twice"
        self.values[name] = snapshot(value)

    def stream(self, net: nn.Module) -> nn.Module:
        """``net`` itself for the plain script, or streamed for the streamed one."""
        if not self.streamed:
            return net
        model = StreamingModel(net, tile=TILE)
        model.resident_tail = False
        return model

    def image(self, seed: int = 0, shape: Shape | None = None, *, grad: bool = True) -> Tensor:
        """A random image (N, C, H, W) of the case's type."""
        generator = torch.Generator().manual_seed(seed)
        image = torch.randn(shape or self.case.shape, generator=generator, dtype=torch.float64)
        return image.to(self.case.dtype).requires_grad_(grad)

    def mark(self) -> None:
        """Record the net as it is now; a refusal from here on must leave it so."""
        self.before = snapshot(self.net)

    def run(
        self,
        model: Any,
        *args: Any,
        image: Tensor | None = None,
        shape: Shape | None = None,
        backward: bool = True,
        **kwargs: Any,
    ) -> Any:
        """Run one seeded pass, record its outputs, gradients and buffers, and drop the gradients."""
        self.num_passes += 1
        name = f"pass {self.num_passes}"
        self.mark()
        image = self.image(self.num_passes, shape) if image is None else image
        seed_everything(self.num_passes)
        outputs = model(image, *args, **kwargs)
        self(f"{name} output", outputs)
        if backward:
            # Forward has moved buffers: a refusal from here on must leave them so.
            self.mark()
            backpropagate(outputs, self.num_passes)
        self.gradients(f"{name} gradient", image, args, kwargs)
        self(f"{name} buffer", dict(self.net.named_buffers()))
        return outputs

    def gradients(self, name: str, *inputs: Any) -> None:
        """Record the gradients of all parameters and of the tensors in ``inputs``, and drop them."""
        leaves = {key: p for key, p in self.net.named_parameters() if not nn.parameter.is_lazy(p)}
        for index, leaf in enumerate(pytree.tree_leaves(inputs)):
            if isinstance(leaf, Tensor) and leaf.is_leaf:
                leaves["image" if index == 0 else f"input {index}"] = leaf
        self(name, {key: leaf.grad for key, leaf in leaves.items()})
        for leaf in leaves.values():
            leaf.grad = None


def seed_everything(seed: int) -> None:
    """Seed Python's, NumPy's and PyTorch's generators."""
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def backpropagate(outputs: Any, seed: int = 0, **options: Any) -> None:
    """Run a backward pass from random gradients of all outputs that require one."""
    generator = torch.Generator().manual_seed(seed)
    tensors = [leaf for leaf in _leaves(outputs) if leaf.requires_grad]
    # Drawn in float64, so that real types differ in rounding alone.
    arriving = [
        torch.randn(leaf.shape, generator=generator, dtype=torch.float64).to(leaf.dtype) for leaf in tensors
    ]
    if tensors:
        torch.autograd.backward(tensors, arriving, **options)


def _leaves(outputs: Any) -> list[Tensor]:
    """The tensors of a pytree, or of an object's attributes."""
    found = []
    for leaf in pytree.tree_leaves(outputs):
        if isinstance(leaf, Tensor):
            found.append(leaf)
        elif hasattr(leaf, "__dict__"):
            found += _leaves(list(vars(leaf).values()))
    return found


# --- scripts -----------------------------------------------------------------------------------------


def one_pass(model: Any, net: nn.Module, record: Record) -> None:
    """Run one pass, forward and backward."""
    record.run(model)


def passes(number: int) -> Steps:
    """A script of ``number`` passes, forward and backward."""

    def steps(model: Any, net: nn.Module, record: Record) -> None:
        for _ in range(number):
            record.run(model)

    return steps


def between(*changes: Callable[[Any], Any]) -> Steps:
    """A script of a pass and, for every change of the net, the change and another pass."""

    def steps(model: Any, net: nn.Module, record: Record) -> None:
        record.run(model)
        for change in changes:
            change(net)
            record.run(model)

    return steps


def given(*args: Any, **kwargs: Any) -> Steps:
    """A script of one pass for each of ``args``, which make the pass's further arguments from the record."""

    def steps(model: Any, net: nn.Module, record: Record) -> None:
        for make in args:
            made = make(record)
            if isinstance(made, dict):
                record.run(model, **made, **kwargs)
            else:
                record.run(model, *(made if isinstance(made, tuple) else (made,)), **kwargs)

    return steps


# --- nets --------------------------------------------------------------------------------------------


class Small(nn.Module):
    """Convolution, batch norm, the code on a map, pooling, the code on a vector, linear.

    The convolution has no bias, whose true gradient before batch norm would be zero.
    """

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, WIDTH, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(WIDTH)
        self.head = nn.Linear(WIDTH, 4)

    def middle(self, x: Tensor) -> Any:
        """The code on a map (N, C, H, W); cases override it."""
        return x

    def late(self, v: Tensor) -> Any:
        """The code on a vector (N, C); cases override it."""
        return v

    def maps(self, x: Tensor) -> Tensor:
        """The map (N, C, H, W) before the code."""
        return self.norm(self.conv(x))

    def forward(self, x: Tensor) -> Any:
        return self.head(self.late(F.relu(self.middle(self.maps(x))).mean((2, 3))))


class Applied(Small):
    """`Small` with a function of the map, of the vector, or both."""

    def __init__(
        self, middle: Callable[..., Any] | None = None, late: Callable[..., Any] | None = None
    ) -> None:
        super().__init__()
        self.on_map = middle
        self.on_vector = late

    def middle(self, x: Tensor) -> Any:
        return x if self.on_map is None else self.on_map(x)

    def late(self, v: Tensor) -> Any:
        return v if self.on_vector is None else self.on_vector(v)


class Cases(list[Case]):
    """The cases of one kind; called, it is a decorator that adds one."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind

    def add(
        self,
        name: str,
        build: Build,
        steps: Steps = one_pass,
        *,
        expected: str = SAME,
        shape: Shape = SHAPE,
        **options: Any,
    ) -> None:
        """Add the case of nets that ``build`` makes."""
        assert all(case.name != name for case in self), f"there are two cases '{name}'"
        self.append(Case(name, self.kind, build, shape, steps, expected, **options))

    def __call__(self, name: str, steps: Steps = one_pass, **options: Any) -> Callable[[Build], Build]:
        """Add the case of nets that the decorated class or function makes."""

        def decorate(build: Build) -> Build:
            self.add(name, build, steps, **options)
            return build

        return decorate

    def on_map(
        self, name: str, function: Callable[..., Any], steps: Steps = one_pass, **options: Any
    ) -> None:
        """Add the case of a function of a map in `Small`."""
        self.add(name, lambda: Applied(middle=function), steps, **options)

    def on_vector(
        self, name: str, function: Callable[..., Any], steps: Steps = one_pass, **options: Any
    ) -> None:
        """Add the case of a function of the pooled vector in `Small`."""
        self.add(name, lambda: Applied(late=function), steps, **options)
