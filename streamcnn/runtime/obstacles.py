"""The parts of a model that are streamed, and those that run on whole maps, with reasons and remedies."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import nn

from streamcnn.graph.program import Kind, Node, Program, on_whole_maps
from streamcnn.runtime.plan_cache import module_dtype
from streamcnn.runtime.streaming_model import StreamingModel

_WITH_ONE_LAYOUT = "bring both to (N, C, H, W) before it"
_ON_SMALL_MAPS = "apply it to pooled features, or behind the last strided layer, where the map is small"
_IN_TWO_STEPS = "pool to a fixed size first, as AdaptiveAvgPool2d(1) does, and then change the shape"
_ON_MAPS = "apply it to maps (N, C, H, W), or to pooled features"
_WITHOUT_OTHERS = "apply it to the tokens of the map alone, before others are joined with them or after"
_BY_A_CONVOLUTION = "replace it by a convolution, which looks as far as its kernel"
_BY_POSITION = "let it treat every position alike, linearly in the gradient (docs/capture.md)"
_BY_A_RULE = "write a rule for it (docs/adding_an_operator.md), or use operators that have one"

REMEDIES = {
    "ATen's gradient is not that of its result": "give the size instead of the factor",
    "ATen's kernels differ in which position is nearest": "give another size or factor, or a whole one",
    "it has no rule for axes of space that are merged": _ON_MAPS,
    "it has no rule": _BY_A_RULE,
    "it has dropout between its layers": "stack layers of one, and nn.Dropout between them",
    "it has dropout": "switch dropout off there, or apply it to what comes out",
    "it has one position": "leave it so: a map of one position is small",
    "it is carried out as a whole": _BY_POSITION,
    "it does not treat every position alike": _BY_POSITION,
    "it has several results": "let it return one tensor",
    "it takes other operands than tensors": "give it tensors alone",
    "its code reads values": "let no branch of it depend on the values of a map",
    "it is not applied to a map of shape (N, C, H, W)": "bring the map to (N, C, H, W) before it",
    "it shuffles rows or columns": "bring the map to (N, C, H, W) before it",
    "its rows and columns are not those of the map": "bring the map to (N, C, H, W) before it",
    "it is not applied to images or tokens": "bring it to (N, C, H, W) or (N, C, H * W) before it",
    "tokens of a map and others that are joined with them meet in it": _WITHOUT_OTHERS,
    "it has no rule for tokens of a map that are joined with others": _WITHOUT_OTHERS,
    "it merges tokens of a map, and others that are joined with them": _WITHOUT_OTHERS,
    "its operands have their spatial axes at different places": _WITH_ONE_LAYOUT,
    "its operands have their axes of space merged differently": _WITH_ONE_LAYOUT,
    "its operands have matrices at different places": _WITH_ONE_LAYOUT,
    "its operands have different positions": _WITH_ONE_LAYOUT,
    "its mask": "give a mask that is no function of a map, or add its values to those attended to",
    "its equation": "name every axis by a letter, and those of the result",
    "one of its operands is a vector": "give it a second axis",
    "it gives a global value the shape of a map": "expand it from (N, C, 1, 1) instead",
    "it merges a spatial axis with another or splits it unevenly": _IN_TWO_STEPS,
    "it splits a spatial axis": _IN_TWO_STEPS,
    "it works along merged axes of space": _ON_SMALL_MAPS,
    "it finds the place of truth values": "convert the values to float32 before it",
    "it sums over all positions": _ON_SMALL_MAPS,
    "it repeats a spatial axis": "interpolate with mode='nearest' instead",
    "it repeats a map along space": "interpolate with mode='nearest' instead",
    "it repeats merged axes of space": "interpolate with mode='nearest' instead",
    "it repeats rows or columns": "interpolate with mode='nearest' instead",
    "it joins more than": "join fewer at once, or join them along the channels",
    "it takes one row or column of a map": _ON_SMALL_MAPS,
    "it takes a diagonal of positions": _ON_SMALL_MAPS,
    "it takes rows or columns": "take a slice with a step, or apply it to pooled features",
    "which entries it takes depends on the position": _ON_SMALL_MAPS,
    "the gradient of its table is sparse": "leave out sparse=True and scale_grad_by_freq=True",
    "it converts to another dtype while reducing": "convert first, and reduce without dtype=",
    "norms with dtype= or of order": "convert first, and take a norm of order 1 or more",
    "it returns several tensors per position": _ON_SMALL_MAPS,
    "it returns several tensors": _BY_A_RULE,
    "its windows reach along a spatial axis": _BY_A_CONVOLUTION,
    "it looks values up along a spatial axis": _ON_SMALL_MAPS,
    "its scores are no map of shape (N, C, H, W)": "bring the scores to (N, C, H, W) before it",
    "its targets have their spatial axes at other places": "give classes (N, H, W) or shares (N, C, H, W)",
    "the number of classes depends on the values": "pass num_classes=",
    "it runs along a spatial axis": _ON_SMALL_MAPS,
    "it runs along axes of space and others at once": "apply it along one axis after the other",
    "its batch has no positions": "let rows, columns or positions be the batch: (N * H, W, C)",
    "its first states or weights depend on the position": "compute them from pooled features",
    "its pairs lie along a spatial axis": "arrange the pairs along the channels",
    "its weight depends on the position": _BY_A_CONVOLUTION,
    "its parameters depend on the position": _BY_A_CONVOLUTION,
    "it mixes positions: it is applied along merged axes of space": _IN_TWO_STEPS,
    "it moves positions into other rows": "name the axes in dims=",
    "it mixes positions": _BY_A_CONVOLUTION,
    "its slopes depend on the position": "give each channel one slope",
    "it normalises over space and has an affine part that depends on the position": (
        "use GroupNorm(1, C), whose affine part is one for each channel"
    ),
    "where it reads depends on values": "warp the image before it goes in, or a small map",
    "its places are not as max pooling gave them": "hand on the indices of max_pool2d as they are",
    "its places are those of another size": "pass output_size=, that of the map that was pooled",
    "its windows overlap": "pool with a kernel no larger than the stride",
    "it pads other axes than the spatial ones": "join a map of zeros along the channels instead",
    "it is applied to complex values": "apply it to the real and the imaginary part",
    "it fills with a value that is a map": "use torch.where",
}
"""The usual remedy, by the beginning of the reason."""


@dataclass(frozen=True, slots=True)
class Obstacle:
    """An operator that cannot be streamed, at one place of the model."""

    operator: str
    reason: str
    remedy: str
    """The usual remedy."""
    module: str
    """The part of the model that calls it, and its class."""
    line: str
    """The line of the user's code, with its file; empty if unknown."""
    count: int
    """How often the operator is called there."""
    nbytes: int
    """Bytes of the whole maps that it reads, and of its results."""


@dataclass(frozen=True, slots=True)
class Streamability:
    """The parts of a model that are streamed for images of one shape, and those that are not."""

    shape: tuple[int, int, int, int]
    num_streamed: int
    """Operators that run tile by tile."""
    num_following: int
    """Operators that run on whole maps only because an obstacle comes before them."""
    obstacles: tuple[Obstacle, ...]
    """In the order of the forward pass."""
    plain_bytes: int
    """Projected peak of plain PyTorch on the whole image at once."""


def streamability(net: nn.Module, shape: tuple[int, int, int, int]) -> Streamability:
    """Find which parts of ``net``, in its present mode, are streamed for images of ``shape``; runs nothing.

    Raises
    ------
    UnsupportedModel
        If the module cannot be captured at this shape.
    """
    model = StreamingModel(net)
    # Small maps may run whole for speed; here the question is which must.
    model.resident_tail = False
    with torch.enable_grad():
        planned = model.planned(shape, module_dtype(net), image_gradient=False)
    program = planned.program
    whole = {node.name for node in on_whole_maps(program)}
    stopped = program.residents
    return Streamability(
        shape=shape,
        num_streamed=sum(node.kind in (Kind.LOCAL, Kind.REDUCTION) for node in program.nodes.values()),
        num_following=len(whole - {node.name for node in stopped}),
        obstacles=tuple(_obstacles(program, stopped)),
        plain_bytes=planned.plan.plain_bytes,
    )


def _obstacles(program: Program, stopped: Iterable[Node]) -> Iterable[Obstacle]:
    """One for each operator, reason and place."""
    found: dict[tuple[str, str, str], list[Node]] = {}
    for node in stopped:
        found.setdefault((node.note, node.source, node.line), []).append(node)
    for (note, module, line), nodes in found.items():
        operator, _, reason = note.partition(": ")
        operands = (_itself(program, name) for node in nodes for name in node.operands)
        read = {each.name: each.nbytes for each in operands if each.kind is Kind.GATHER}
        yield Obstacle(
            operator=operator,
            reason=reason,
            remedy=remedy_for(reason),
            module=module,
            line=line,
            count=len(nodes),
            nbytes=sum(read.values()) + sum(node.nbytes for node in nodes),
        )


def _itself(program: Program, name: str) -> Node:
    """A node, or the node of which it is a reshaped form."""
    node = program.nodes[name]
    while node.kind is Kind.GLOBAL and node.target is torch.Tensor.reshape:
        node = program.nodes[node.operands[0]]
    return node


def remedy_for(reason: str) -> str:
    """The usual remedy for an operator that is not streamed for ``reason``."""
    matching = (remedy for begins, remedy in REMEDIES.items() if reason.startswith(begins))
    return next(matching, _ON_SMALL_MAPS)
