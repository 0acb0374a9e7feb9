"""Projected bytes of one step of a phase, term by term: a stage's largest tile, forward and backward."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace

from streamcnn.graph.costs import CallBytes
from streamcnn.graph.program import Kind
from streamcnn.plan.reading import NO_READING, READING, BatchCost
from streamcnn.plan.storage import MemoryTerm
from streamcnn.planning.backends import Backend
from streamcnn.planning.tiling import Outline, TiledStage

REDUCTION_COPIES = 2
"""The least number of temporary copies of a tile's own part while a reduction or its gradient is computed."""


@dataclass(frozen=True, slots=True)
class StepBytes:
    """Projected bytes at the worst operator of a step."""

    terms: tuple[MemoryTerm, ...]
    operator: str
    """The operator at which most memory is held."""
    reusable: int
    """Bytes in blocks that may be kept for reuse when they are freed."""
    reading: int = 0
    """Bytes that reading a region of an image takes beside tensors, perhaps at another moment of the step."""

    @property
    def nbytes(self) -> int:
        """The sum of the terms."""
        return total_bytes(self.terms)


def total_bytes(terms: Iterable[MemoryTerm]) -> int:
    """The sum of all terms."""
    return sum(term.nbytes for term in terms)


def steps(
    tiled: TiledStage, backend: Backend, reading: BatchCost = NO_READING, *, backward: bool
) -> tuple[StepBytes, StepBytes | None]:
    """Project the largest tile of a stage forward and, if ``backward``, backward."""
    tile = _LargestTile(tiled, backend, reading)
    return _forward_step(tile), _backward_step(tile) if backward else None


def overhead_terms(outline: Outline, backend: Backend, *, backward: bool) -> tuple[MemoryTerm, ...]:
    """Terms of the backend for a tile of any size: its values and, if ``backward``, their gradients."""
    # Matrix products of gradients mostly find buffers of their sizes.
    return backend.step_terms((3 if backward else 1) * outline.num_convolutions, outline.num_products)


def _forward_step(tile: _LargestTile) -> StepBytes:
    """Project one tile without autograd: values live from their operator to their last use."""
    tiled, owned = tile.tiled, set(tile.tiled.outline.owned)
    most = _PeakTracker()
    live = beside_reading = 0
    for name in tiled.stage.nodes:
        if tile.reads_image(name):
            beside_reading = max(beside_reading, live)
        live += tile.made(name)
        most.offer(name, live + tile.padded(name), tile.workspaces[name])
        if name in owned:
            most.offer(name, live, tile.observed(name))
        live -= sum(tile.made(dead) for dead in tiled.outline.releases.get(name, ()))
    regions = MemoryTerm("input regions", tile.reads())
    terms = (
        regions,
        MemoryTerm("live activations", most.held),
        MemoryTerm("operator workspace", most.workspace),
        MemoryTerm("parameters that autocast casts", tiled.outline.cast_bytes),
    )
    step = tile.step(terms, most.operator, backward=False)
    return tile.or_reading(step, (regions, MemoryTerm("live activations", beside_reading)), backward=False)


def _backward_step(tile: _LargestTile) -> StepBytes:
    """Project one tile with autograd: values are kept, gradients flow back operator by operator."""
    tiled = tile.tiled
    skipped = frozenset(tiled.outline.skipped)
    most = _PeakTracker()
    values = 0
    for name in tiled.stage.nodes:
        values += tile.padded(name)
        if name not in skipped:
            values += tile.made(name) + tile.saved_beside(name)
            most.offer(name, 0, tile.workspaces[name])
        most.offer(name, tile.nbytes[name] + tile.operands[name], tile.backward_workspaces[name])
    own = [tile.own(name) for name in tiled.outline.owned]
    # The gradients that arrive are computed before anything flows back.
    most.offer(most.operator, 0, max(map(tile.observed, tiled.outline.owned), default=0))
    before = (
        MemoryTerm("input regions and their gradients", 2 * tile.reads()),
        MemoryTerm("autograd graph of a tile", values),
    )
    terms = (
        *before,
        MemoryTerm("arriving gradients", sum(own)),
        MemoryTerm("gradients of activations", most.held),
        MemoryTerm("operator workspace", most.workspace),
        # The tile's own gradients, and their copies in the layouts that convolutions use.
        MemoryTerm("a tile's parameter gradients", 3 * tiled.outline.parameter_bytes),
    )
    return tile.or_reading(tile.step(terms, most.operator, backward=True), before, backward=True)


@dataclass(slots=True)
class _PeakTracker:
    """The operator at which most memory is held so far."""

    operator: str = ""
    held: int = 0
    workspace: int = 0

    def offer(self, operator: str, held: int, workspace: int) -> None:
        """Record an operator if it holds more."""
        if held + workspace > self.held + self.workspace:
            self.operator, self.held, self.workspace = operator, held, workspace


class _LargestTile:
    """Bytes of maps on the largest tile of a stage."""

    def __init__(self, tiled: TiledStage, backend: Backend, reading: BatchCost) -> None:
        self.backend = backend
        self.reading = reading
        self.program = tiled.program
        self.tiled = tiled
        self.images = [name for name in tiled.program.images if name in tiled.stage.inputs]
        """The images of which the stage reads regions."""
        outline, rows, cols = tiled.outline, tiled.rows.largest, tiled.cols.largest
        self.nbytes = {name: each * rows[name] * cols[name] for name, each in outline.position_bytes.items()}
        """Bytes of the part of each map that a tile needs."""
        self.operands = {
            name: sum([self.nbytes[operand] for operand in operands])
            for name, operands in outline.map_operands.items()
        }
        """Bytes of the map operands of each operator."""
        calls = {
            name: CallBytes(
                self.operands[name],
                self.nbytes[name],
                outline.weights[name],
                tiled.program.nodes[name].tensor.dtype.itemsize,
            )
            for name in outline.costs
        }
        self.workspaces = {name: backend.workspace(cost, calls[name]) for name, cost in outline.costs.items()}
        """Bytes that each operator takes besides operands, parameters and result."""
        self.backward_workspaces = {
            name: backend.backward_workspace(cost, calls[name]) for name, cost in outline.costs.items()
        }
        """Bytes that each operator's backward pass takes besides."""

    def made(self, name: str) -> int:
        """Bytes that an operator's value adds: none if it overwrites its operand."""
        return 0 if name in self.tiled.in_place else self.nbytes[name]

    def own(self, name: str) -> int:
        """Bytes of a tile's own part of an output."""
        return self.tiled.outline.position_bytes[name] * math.prod(self.tiled.largest_own(name))

    def observed(self, name: str) -> int:
        """Bytes taken while an output's own part is reduced, or its gradient is computed."""
        own, itemsize = self.own(name), self.program.nodes[name].tensor.dtype.itemsize
        rules = self.tiled.outline.fed.get(name, {}).values()
        return max((REDUCTION_COPIES * own, *(rule.workspace(own // itemsize, itemsize) for rule in rules)))

    def saved_beside(self, name: str) -> int:
        """Bytes that autograd saves for an operator beside operands and result."""
        rows, cols = self.tiled.largest(name)
        return self.tiled.outline.beside_bytes[name] * rows * cols

    def padded(self, name: str) -> int:
        """Bytes of the padded copies that an operator reads at the border of the map."""
        local = self.program.nodes[name].local
        assert local is not None
        return 0 if local.pointwise or local.fill is None else self.operands[name]

    def reads(self) -> int:
        """Bytes of the input regions: once for stored maps, twice for others, which are also converted."""
        nodes = self.program.nodes
        return sum(
            self.nbytes[name] * (1 if nodes[name].kind is Kind.LOCAL else 2)
            for name in self.tiled.stage.inputs
        )

    def reads_image(self, name: str) -> bool:
        """Whether an operator reads a region of the image, or of a map beside it."""
        local = self.program.nodes[name].local
        assert local is not None
        return any(image in local.accesses for image in self.images)

    def or_reading(self, step: StepBytes, beside: tuple[MemoryTerm, ...], *, backward: bool) -> StepBytes:
        """The step, or the moment in it when a region of an image is read, if that takes more.

        Parameters
        ----------
        beside
            Terms of bytes held while the region is read.
        """
        found = {n: self.reading.of_map(n, self.tiled.largest(n)).transient for n in self.images}
        image = max(found, key=found.__getitem__, default="")
        nbytes = found.get(image, 0)
        if not nbytes:
            return step
        overhead = overhead_terms(self.tiled.outline, self.backend, backward=backward)
        read = StepBytes((*beside, MemoryTerm(READING, nbytes), *overhead), image, step.reusable)
        return replace(read if read.nbytes > step.nbytes else step, reading=nbytes)

    def step(self, terms: tuple[MemoryTerm, ...], operator: str, *, backward: bool) -> StepBytes:
        """A step of these terms and the backend's."""
        overhead = overhead_terms(self.tiled.outline, self.backend, backward=backward)
        return StepBytes((*terms, *overhead), operator, int(self._reusable_share() * total_bytes(terms)))

    def _reusable_share(self) -> float:
        """The share of the tile's bytes in blocks that may be kept when they are freed."""
        sizes = self.nbytes.values()
        total, largest = sum(sizes), self.backend.reusable_bytes
        return sum([size for size in sizes if size < largest]) / total if total else 0.0
