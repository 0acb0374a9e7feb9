"""Operators on images that lie at every position of a map, as windows do."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from streamcnn.graph.costs import CallBytes, Cost, Operation, counted, declare, windows
from streamcnn.graph.ops.rules import Call, NotStreamable, Sample, Tracer, rule
from streamcnn.graph.ops.samples import chain
from streamcnn.graph.program import Access, Ref

aten = torch.ops.aten


@rule(
    aten.adaptive_avg_pool1d.default,
    aten.avg_pool1d.default,
    aten.conv1d.default,
    aten.conv1d.padding,
    aten.conv_transpose1d.default,
    aten.max_pool1d.default,
)
def along_one_axis(tracer: Tracer, call: Call) -> NotStreamable:
    """Operators on (N, C, L), which a map with two spatial axes never has, unless they are merged."""
    return NotStreamable("its windows reach along a spatial axis")


def each_by_itself(tracer: Tracer, call: Call, ref: Ref, count: int, like: Tensor) -> Ref | NotStreamable:
    """Record a call whose batch axis is the first ``count`` axes of a map, among them both spatial ones.

    ``like`` is a fake tensor of the whole result as the call returns it.
    """
    if not isinstance(like, Tensor):
        return NotStreamable("it returns several tensors")
    axes, extents = tracer.axes(ref), tracer.spec(ref).shape
    assert axes is not None
    assert max(axes) < count
    return tracer.local(
        of_each_image,
        (call.target, count, ref, *call.args[1:]),
        call.kwargs,
        like=torch.empty((*extents[:count], *like.shape[1:]), dtype=like.dtype, device=like.device),
        axes=axes,
        accesses={ref.name: Access()},
        heavy=True,
    )


def of_each_image(target: Callable[..., Tensor], count: int, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """Apply ``target`` to images ``x`` (..., C, h, w) whose first ``count`` axes are the batch."""
    result = target(x.flatten(0, count - 1), *args, **kwargs)
    return result.reshape(*x.shape[:count], *result.shape[1:])


def _operations(operation: Operation) -> int:
    """Operations of a convolution, or of pooling."""
    return max(counted(operation), windows(operation))


def _workspace(nbytes: CallBytes) -> int:
    """Bytes of the images as a dense tensor, and of a convolution's copies."""
    return 2 * nbytes.operands + nbytes.result + nbytes.weights


declare(of_each_image, cost=Cost(operations=_operations, workspace=_workspace))


class _OfWindows(nn.Module):
    """Convolutions and pooling within windows of 4 x 4 positions, and along the tokens of each."""

    def __init__(self) -> None:
        super().__init__()
        self.square = nn.Sequential(nn.Conv2d(4, 6, 3, padding=1), nn.MaxPool2d(2))
        self.norms = nn.Sequential(nn.GroupNorm(2, 6), nn.BatchNorm2d(6))
        self.line = nn.Sequential(nn.Conv1d(6, 4, 3, padding="same"), nn.AvgPool1d(2))

    def forward(self, x: Tensor) -> Tensor:
        n, c, h, w = x.shape
        windows = x.view(n, c, h // 4, 4, w // 4, 4).permute(0, 2, 4, 1, 3, 5).reshape(-1, c, 4, 4)
        tokens: Tensor = self.line(torch.flatten(self.norms(self.square(windows)), 2))
        return tokens.reshape(n, h // 4, w // 4, -1).permute(0, 3, 1, 2)


SAMPLES = (
    Sample("images at every position", lambda: chain(nn.Conv2d(3, 4, 4), _OfWindows()), (2, 3, 43, 35)),
)
