"""Entries of a table by a map of indices: embeddings, codebooks, palettes, class weights."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from streamcnn.graph.costs import CallBytes, Cost, declare
from streamcnn.graph.ops.rules import Call, NotStreamable, Sample, Tracer, rule
from streamcnn.graph.program import Access, Ref

aten = torch.ops.aten


def looked_up(table: Tensor, index: Tensor) -> Tensor:
    """The entries of ``table`` (K, ...) at ``index``, of any shape, with negative ones from the end."""
    return table[index]


@rule(aten.embedding.default, looked_up)
def look_up(tracer: Tracer, call: Call) -> Ref | NotStreamable:
    """The entries of a global table, along new last axes."""
    table, index = call.args[:2]
    axes = tracer.axes(index)
    if axes is None or tracer.axes(table) is not None:
        return NotStreamable("which entries it takes depends on the position")
    if call.target is aten.embedding.default and any(call.bind("scale_grad_by_freq", "sparse")):
        return NotStreamable("the gradient of its table is sparse, or scaled by how often an entry is taken")
    return tracer.local(
        call.target,
        call.args,
        call.kwargs,
        like=tracer.fake(call),
        axes=axes,
        accesses={index.name: Access()},
    )


def _sorting(nbytes: CallBytes) -> int:
    """Backward, a GPU sorts the indices, with their places and room for both."""
    return 4 * nbytes.operands


declare(aten.embedding, looked_up, cost=Cost(backward_workspace=_sorting))


class _Coded(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.codes = nn.Embedding(6, 4)
        self.shades = nn.Parameter(torch.linspace(-1, 1, 6))

    def forward(self, x: Tensor) -> Tensor:
        codes = x.argmax(1)
        found = self.codes(codes).permute(0, 3, 1, 2) * x[:, :4]
        flat = self.codes(codes.flatten(1)).sin().mean(1)
        return torch.cat((found.mean((2, 3)), flat, (self.shades[codes] * x[:, 0]).sum((1, 2))[:, None]), 1)


def _sample() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 6, 3, padding=1), _Coded())


SAMPLES: tuple[Any, ...] = (Sample("embeddings and tables of values by a map of indices", _sample),)
