"""The compiler of functions of tensors, and the layouts for which they are compiled."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeAlias, cast

import torch
from torch import Tensor, nn

from streamcnn.graph.costs import cost_of
from streamcnn.graph.program import Node


class Layout(NamedTuple):
    """A tensor's layout in memory, and whether autograd follows it."""

    shape: torch.Size
    stride: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device
    requires_grad: bool

    @classmethod
    def of(cls, tensor: Tensor) -> Layout:
        """The layout of a tensor."""
        return cls(tensor.shape, tensor.stride(), tensor.dtype, tensor.device, tensor.requires_grad)

    def empty(self) -> Tensor:
        """An uninitialised tensor of this layout."""
        return torch.empty_strided(
            self.shape, self.stride, dtype=self.dtype, device=self.device, requires_grad=self.requires_grad
        )


Layouts: TypeAlias = tuple[Layout, ...]
Run: TypeAlias = Callable[..., Sequence[Tensor]]
"""Takes tensors as arguments and returns a list or tuple of tensors."""
Compile: TypeAlias = Callable[[nn.Module, list[Tensor]], Run]
"""Compiles a module that is a :data:`Run`, for inputs like those given, which have no memory."""


@dataclass(frozen=True, slots=True)
class Candidate:
    """A part of a pass that can be compiled."""

    name: str
    """The part's name in messages to the user."""
    compile: Callable[[], None]


class CannotCompile(Exception):
    """A part of a pass cannot be compiled."""


def refuse_opaque(nodes: Iterable[Node]) -> None:
    """Refuse operators of which a recorded graph would miss a part.

    Raises
    ------
    CannotCompile
        Naming the first such operator.
    """
    for node in nodes:
        if cost_of(node.target).is_opaque:
            raise CannotCompile(f"'{node.name}' does more than compute, or decides by values")


def by_inductor(module: nn.Module, inputs: list[Tensor]) -> Run:
    """Compile a module by Inductor, as ``torch.compile`` does, but keep the layouts of its inputs.

    The compiled module draws the same random numbers as PyTorch without a compiler. If inputs have gradients,
    so have its results, and its backward pass, which runs outside of autocast, is compiled with it.

    Autotuning is off. On a GPU it would time several forms of each kernel when the kernel first runs: in a
    pass, beside its maps and within its limit, with a buffer of the cache's size and copies of the tensors
    that the kernel overwrites.
    """
    from torch._functorch import config
    from torch._inductor import compile as compile_graph

    options = {
        "layout_optimization": False,
        "fallback_random": True,
        "triton.autotune_pointwise": False,
    }
    with config.patch(backward_pass_autocast="off", force_non_lazy_backward_lowering=True):
        return cast("Run", compile_graph(cast("Any", module), cast("Any", inputs), options))


def lacks_a_compiler(error: Exception) -> bool:
    """Whether an error says that nothing can be compiled here."""
    from torch._inductor import exc

    reason = getattr(error, "inner_exception", error)
    return isinstance(reason, (exc.InvalidCxxCompiler, exc.TritonMissing, exc.GPUTooOldForTriton))
