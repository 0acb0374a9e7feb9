"""One tile of the backward pass: recomputed with autograd, differentiated, its gradients handed out."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Protocol

import torch
from torch import Tensor

from streamcnn.execution.global_graph import GlobalGraph
from streamcnn.execution.interpreter import TileRun
from streamcnn.geometry.regions import Region
from streamcnn.geometry.windows import Axes, crop
from streamcnn.graph.autocast import autocast
from streamcnn.graph.program import has_gradient
from streamcnn.plan.plan import Phase, Plan


class TileContext(Protocol):
    """What a tile reads from and delivers to: the execution it belongs to."""

    plan: Plan
    global_graph: GlobalGraph
    device: torch.device
    autocast: torch.dtype | None

    def fetch(self, name: str, part: Region) -> Tensor:
        """A region of one of the phase's inputs; not to be written to."""

    def axes(self, name: str) -> Axes:
        """Spatial axes of a map."""

    def share_gradient(
        self, phase: Phase, own: Region, name: str, reductions: tuple[str, ...], share: Tensor
    ) -> Tensor | None:
        """What arrives at a tile's own part of ``name`` from outside the tile."""

    def add_gradient(self, name: str, part: Region, gradient: Tensor) -> None:
        """Add to the gradient map of an input."""


class BackwardTile:
    """One tile of a phase, recomputed with autograd and differentiated."""

    def __init__(
        self,
        execution: TileContext,
        tile: TileRun,
        feeds: Mapping[str, tuple[str, ...]],
        global_values: Mapping[str, Tensor],
    ) -> None:
        self.execution = execution
        self.tile = tile
        self.feeds = feeds
        self.global_values = global_values
        self.leaves: dict[tuple[str, Region], Tensor] = {}
        self.roots: list[tuple[Tensor, Tensor]] = []
        self.taps: list[Tensor] = []
        """Values that gradients from outside the tile's graph join, in order."""

    def run(self) -> None:
        """Recompute, differentiate and hand out the gradients."""
        execution, phase = self.execution, self.tile.phase
        device, casts = execution.device, execution.autocast
        with torch.enable_grad(), autocast(device, casts, cache=False):
            for name in self.feeds:
                if name in phase.inputs:
                    self._root(name, self._fetch(name, phase.own(self.tile.row, self.tile.col, name)))
            self.tile.run(self._fetch, self.global_values, self._observe)
        self._reach_taps()
        global_values = {name: leaf for name, leaf in self.global_values.items() if leaf.requires_grad}
        maps = {key: leaf for key, leaf in self.leaves.items() if leaf.requires_grad}
        inputs = [*global_values.values(), *maps.values()]
        if not self.roots or not inputs:
            return
        outputs, gradients = zip(*self.roots, strict=True)
        # The taps' graph nodes know this object: let go of the graph, or only the collector would free it.
        self.roots.clear()
        self.taps.clear()
        with autocast(device, None):
            found = torch.autograd.grad(outputs, inputs, gradients, allow_unused=True)
        for name, gradient in zip(global_values, found, strict=False):
            execution.global_graph.accumulate(name, gradient)
        for (name, part), gradient in zip(maps, found[len(global_values) :], strict=True):
            if gradient is not None:
                execution.add_gradient(name, part, gradient)

    def _fetch(self, name: str, part: Region) -> Tensor:
        """A leaf per input and region: a slice inside the graph would cost a zero-filled copy."""
        if (name, part) not in self.leaves:
            leaf = self.execution.fetch(name, part).detach()
            wanted = name in self.execution.plan.differentiated and has_gradient(leaf.dtype)
            self.leaves[name, part] = leaf.requires_grad_(wanted)
        return self.leaves[name, part]

    def _observe(self, name: str, value: Tensor) -> Tensor:
        phase = self.tile.phase
        if (name not in phase.stored and name not in self.feeds) or not value.requires_grad:
            return value
        if name not in phase.consumed:
            self._root(name, value)
            return value
        own = phase.own(self.tile.row, self.tile.col, name)
        needed = phase.needed(self.tile.row, self.tile.col, name)
        axes = self.execution.axes(name)
        share = crop(value.detach(), axes, needed, own)

        def add(gradient: Tensor) -> Tensor:
            part = self._share_gradient(name, share)
            if part is None:
                return gradient
            # The engine may hand the same tensor to another consumer, so it is not changed in place.
            total = gradient.clone()
            crop(total, axes, needed, own).add_(part)
            return total

        tapped: Tensor = _Tap.apply(value, add)  # type: ignore[no-untyped-call]
        self.taps.append(tapped)
        return tapped

    def _reach_taps(self) -> None:
        """Make a root of each tap that no root leads to, since its readers stop the gradient."""
        reached: set[Any] = set()
        for root, _ in self.roots:
            _walk(root.grad_fn, reached)
        for tapped in reversed(self.taps):
            if tapped.grad_fn not in reached:
                nothing = torch.zeros((), dtype=tapped.dtype, device=tapped.device).expand_as(tapped)
                self.roots.append((tapped, nothing))
                _walk(tapped.grad_fn, reached)

    def _root(self, name: str, value: Tensor) -> None:
        if not value.requires_grad:
            return
        gradient = self._share_gradient(name, value)
        if gradient is not None:
            self.roots.append((value, gradient))

    def _share_gradient(self, name: str, share: Tensor) -> Tensor | None:
        own = self.tile.phase.own(self.tile.row, self.tile.col, name)
        reductions = self.feeds.get(name, ())
        return self.execution.share_gradient(self.tile.phase, own, name, reductions, share)


def _walk(node: Any, reached: set[Any]) -> None:
    """Add the nodes of the autograd graph that ``node`` leads to, itself included."""
    pending = [node]
    while pending:
        node = pending.pop()
        if node is not None and node not in reached:
            reached.add(node)
            pending.extend(function for function, _ in node.next_functions)


class _Tap(torch.autograd.Function):
    """Identity whose backward adds what arrives at the value from outside the tile's graph."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, add: Callable[[Tensor], Tensor]) -> Tensor:
        ctx.add = add
        return value.view_as(value)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        add, ctx.add = ctx.add, None
        return add(grads[0]), None
