"""Resident tails: how many of the last operators may run on whole maps, and their time and bytes.

A tail holds memory while no tile does: after the last forward step and before the first backward one.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import takewhile

from streamcnn.graph.program import Kind, Node
from streamcnn.planning.candidates import TilingCandidate, TilingCandidates
from streamcnn.planning.cost_model import plain_time
from streamcnn.planning.step_bytes import overhead_terms, total_bytes

TAIL_COPIES = 2
"""Copies of its maps that a tail is assumed to hold: values and gradients."""


@dataclass(frozen=True, slots=True)
class Tail:
    """Operators at the end of the program that run on whole maps."""

    start: str
    """The captured call with which the tail begins."""
    seconds: float
    """Projected time, forward and backward."""
    flops: int


def whole_program(tilings: TilingCandidates) -> Tail | None:
    """All operators as a tail, as plain PyTorch runs them; None if there are none."""
    return _tail(tilings, sys.maxsize, len(_local(tilings)))


def can_be_whole(tilings: TilingCandidates) -> bool:
    """Whether the backend's kernels are made for maps as large as the program's largest."""
    return _longest(tilings) == len(_local(tilings))


def tails_to_try(
    tilings: TilingCandidates, chosen: Sequence[TilingCandidate], spare_bytes: int
) -> list[Tail]:
    """A tail that takes no more than the largest step, and one that also fills the rest of the budget.

    Parameters
    ----------
    chosen
        The tiling of each stage of the program without a tail.
    spare_bytes
        Bytes of the budget that those leave; 0 if there is no budget to fill.
    """
    # Without the backend's bytes for a step, since a tail has its own.
    backend, backward = tilings.backend, bool(tilings.differentiated)
    steps = (
        tiling.nbytes - total_bytes(overhead_terms(tiling.tiled.outline, backend, backward=backward))
        for tiling in chosen
    )
    largest, longest = max(steps, default=0), _longest(tilings)
    found = (_tail(tilings, allowed, longest) for allowed in (largest, largest + spare_bytes))
    return list({tail.start: tail for tail in found if tail is not None}.values())


def _local(tilings: TilingCandidates) -> list[Node]:
    """The operators that may be in a tail, in order."""
    return [node for node in tilings.program.nodes.values() if node.kind is Kind.LOCAL]


def _longest(tilings: TilingCandidates) -> int:
    """The number of last operators whose maps are no larger than the backend's kernels are made for."""
    most, nodes = tilings.backend.most_elements, tilings.program.nodes

    def is_suited(node: Node) -> bool:
        maps = (node, *(nodes[name] for name in node.operands if nodes[name].is_map))
        return all(each.tensor.numel <= most for each in maps)

    return sum(1 for _ in takewhile(is_suited, reversed(_local(tilings))))


def _tail(tilings: TilingCandidates, allowed: int, longest: int) -> Tail | None:
    """The longest tail, of ``longest`` operators at most, whose maps take no more than ``allowed`` bytes."""
    nodes = _local(tilings)
    total, length = 0, 0
    for node in reversed(nodes[len(nodes) - longest :]):
        total += TAIL_COPIES * node.nbytes
        if total > allowed:
            break
        length += 1
    if not length:
        return None
    works = {node.name: tilings.works[node.name] for node in nodes[-length:]}
    backend = tilings.backend
    backward = bool(tilings.differentiated)
    time = plain_time(works, tilings.hardware, backend, backward=backward, keeps_blocks=backend.keeps_blocks)
    return Tail(nodes[-length].name.partition(".")[0], time.seconds, time.flops)
