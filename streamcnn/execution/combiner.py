"""The order in which a phase's tiles run, and how their outputs are combined."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from streamcnn.execution.global_graph import GlobalGraph
from streamcnn.execution.maps import Maps
from streamcnn.geometry.regions import Region
from streamcnn.graph.ops.reduction_types import Partials
from streamcnn.graph.program import Program
from streamcnn.plan.plan import Phase

_MOST_PARTIALS = 64
"""Most tiles whose partial results of a reduction are merged at once."""
_MOST_BYTES = 2**18
"""Bytes of partial results beyond which fewer tiles' are merged at once."""


class Combiner:
    """Orders tiles by rows, and merges or adds each tile's outputs to those of earlier tiles.

    Only this class knows the order and adds up outputs.
    """

    def __init__(self, program: Program, maps: Maps, global_graph: GlobalGraph) -> None:
        self._program = program
        self._maps = maps
        self._global_graph = global_graph
        self._partials: dict[str, list[Partials]] = {}

    def tiles(self, phase: Phase) -> Iterator[tuple[int, int]]:
        """Row and column of each tile to run, in order."""
        return ((row, col) for row in range(len(phase.rows)) for col in range(len(phase.cols)))

    def merge(self, name: str, partial: Partials) -> None:
        """Keep partial results of a reduction, and merge those of several tiles once they are many."""
        known = self._partials.setdefault(name, [])
        known.append(partial)
        nbytes = len(known) * sum(each.nbytes for each in partial)
        if len(known) == _MOST_PARTIALS or nbytes > _MOST_BYTES:
            self._partials[name] = [self._merged(name, known)]

    def take_merged(self, name: str) -> Partials:
        """Remove and return the merged partial results of all tiles."""
        return self._merged(name, self._partials.pop(name))

    def _merged(self, name: str, parts: Sequence[Partials]) -> Partials:
        rule = self._program.nodes[name].reduction
        assert rule is not None
        return parts[0] if len(parts) == 1 else rule.merge(parts)

    def add_value_gradient(self, name: str, gradient: Tensor | None) -> None:
        """Add a tile's share to the gradient of a global value; ``None`` adds nothing."""
        self._global_graph.accumulate(name, gradient)

    def add_map_gradient(self, name: str, part: Region, gradient: Tensor | None) -> None:
        """Add a tile's share to the gradient of a region of a map; ``None`` adds nothing."""
        if gradient is not None:
            self._maps.add_gradient(name, part, gradient, may_keep=_is_unshared(gradient))


def _is_unshared(tensor: Tensor) -> bool:
    """Whether no other tensor uses the memory of ``tensor``, such as one that autograd has saved."""
    return _num_uses(tensor) == _num_uses(torch.empty(1))


def _num_uses(tensor: Tensor) -> int:
    """The number of references to a tensor's memory, one of which is made here."""
    return torch._C._storage_Use_Count(tensor.untyped_storage()._cdata)
