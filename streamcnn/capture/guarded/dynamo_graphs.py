"""Conversion of Dynamo's graph of a call to a raw graph, whose inputs have the keys of states."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import GraphModule
from torch.utils._sympy.symbol import SymT, symbol_is_type

from streamcnn.capture.capture import RawGraph, module_states, named_arguments
from streamcnn.capture.flat.functional import functionalized
from streamcnn.capture.guarded.guarded_image import as_image
from streamcnn.capture.refused_functions import SPARSE_PIECES
from streamcnn.graph.fakes import let_go
from streamcnn.graph.flattening import CannotFlatten, Inliner, flatten, reads_values


@dataclass(frozen=True, slots=True, eq=False)
class KeyedGraph:
    """A raw graph, and the keys of the inputs of Dynamo's graph."""

    graph: RawGraph
    keys: tuple[str | None, ...]
    """For each input that is a tensor, the key of a state, or None for the image."""

    def states(self, inputs: Sequence[Any]) -> dict[str, Tensor]:
        """The states among the inputs of a call, by key."""
        tensors = (given for given in inputs if isinstance(given, Tensor))
        return {key: given for key, given in zip(self.keys, tensors, strict=True) if key is not None}


def keyed_graph(net: nn.Module, arguments: Any, module: GraphModule, inputs: Sequence[Any]) -> KeyedGraph:
    """Convert Dynamo's graph ``module`` of a call of ``net``, for inputs of these sizes; ints are sizes.

    ``arguments`` are the call's further arguments, as ``(args, kwargs)``.
    """
    placeholders = [node for node in module.graph.nodes if node.op == "placeholder"]
    images = {
        node.args[0] for node in module.graph.nodes if node.op == "call_function" and node.target is as_image
    }
    given = [pair for pair in zip(placeholders, inputs, strict=True) if isinstance(pair[1], Tensor)]
    named = _names(net, arguments)
    keys = tuple(None if node in images else named.get(id(value), node.name) for node, value in given)
    fakes = [_fake_of(node, value, is_image=node in images) for node, value in given]
    mode = fakes[0].fake_mode  # type: ignore[attr-defined]
    try:
        return KeyedGraph(_raw(module, inputs, keys, fakes, mode), keys)
    finally:
        let_go(mode)


def _raw(
    module: GraphModule,
    inputs: Sequence[Any],
    keys: tuple[str | None, ...],
    fakes: list[Tensor],
    mode: FakeTensorMode,
) -> RawGraph:
    grad = torch.is_grad_enabled()

    def of_these_sizes(*tensors: Tensor) -> Any:
        remaining = iter(tensors)
        values = (next(remaining) if isinstance(value, Tensor) else value for value in inputs)
        return Inliner(module, through=as_image).run(*values)

    flat = flatten(of_these_sizes, fakes, mode, grad=grad)
    if any(reads_values(node.target) for node in flat.graph.nodes):
        raise CannotFlatten("a number is read from a tensor")
    if any(getattr(node.target, "_opname", "") in SPARSE_PIECES for node in flat.graph.nodes):
        raise CannotFlatten("a sparse tensor is taken apart")
    if _has_unknown_sizes(mode):
        raise CannotFlatten("a shape depends on values")
    shape = next((tuple(fake.shape) for fake, key in zip(fakes, keys, strict=True) if key is None), ())
    device = fakes[0].device
    return functionalized(flat, keys, shape, grad=grad, device=device, path_of=_path_of)


def _has_unknown_sizes(mode: FakeTensorMode) -> bool:
    """Whether a traced call returned a tensor whose size depends on values."""
    sizes = () if mode.shape_env is None else mode.shape_env.var_to_range
    return any(symbol_is_type(size, SymT.UNBACKED_INT) for size in sizes)


def _fake_of(node: torch.fx.Node, given: Tensor, *, is_image: bool) -> Tensor:
    """The fake tensor that stands for an input while its graph is flattened."""
    fake: Tensor = node.meta["example_value"]
    has_symbols = any(isinstance(size, torch.SymInt) for size in fake.shape)
    if not is_image and not has_symbols:
        return fake
    with fake.fake_mode:  # type: ignore[attr-defined]
        if is_image:
            return torch.empty(given.shape, dtype=fake.dtype, device=fake.device)
        alike = torch.empty_strided(given.shape, given.stride(), dtype=fake.dtype, device=fake.device)
        return alike.requires_grad_(given.requires_grad)


def _names(net: nn.Module, arguments: Any) -> dict[int, str]:
    """Keys of tensors by ``id``: qualified names, or places among further arguments."""
    named: dict[int, str] = {}
    for key, tensor in (*named_arguments(arguments), *module_states(net).items()):
        named.setdefault(id(tensor), key)
    return named


def _path_of(place: str) -> str:
    """A submodule's qualified name, from Dynamo's name of its place."""
    path = re.sub(r"\._modules\['([^']*)'\]", r".\1", place).removeprefix("L['net']")
    return re.sub(r"\[['\"]?([^\]'\"]*)['\"]?\]", r".\1", path).strip(".")
