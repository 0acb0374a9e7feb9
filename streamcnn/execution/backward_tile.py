"""The eager implementation of a backward step: compute the tile again with autograd, and differentiate it."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from streamcnn.execution.interpreter import TileRun
from streamcnn.execution.step import Input, Output, Sink, Source, Step
from streamcnn.geometry.regions import Region
from streamcnn.geometry.windows import crop
from streamcnn.graph.autocast import autocast


def run_backward(step: Step, inputs: list[Tensor]) -> list[Tensor | None]:
    """The outputs of a backward step: gradients of global values and of parts of input maps."""
    return BackwardTile(step, inputs).differentiate()


class BackwardTile:
    """One tile of a phase, computed again with autograd and differentiated."""

    def __init__(self, step: Step, inputs: list[Tensor]) -> None:
        self.step = step
        self.given = dict(zip(step.inputs, inputs, strict=True))
        inputs.clear()
        self.wanted = frozenset(step.outputs)
        self.leaves: dict[Output, Tensor] = {}
        """Tensors with respect to which the tile is differentiated, by output."""
        self.roots: list[tuple[Tensor, Tensor]] = []
        """Values that receive a gradient from outside, each with that gradient."""
        self.taps: list[Tensor] = []
        """Values inside the graph at which gradients from outside are added, in order."""

    def differentiate(self) -> list[Tensor | None]:
        """Compute the tile again and differentiate it; return gradients in the step's order."""
        with torch.enable_grad():
            self._recompute()
        self._reach_taps()
        leaves = [self.leaves[output] for output in self.step.outputs]
        if not self.roots or not leaves:
            return [None] * len(leaves)
        outputs, gradients = zip(*self.roots, strict=True)
        # The taps' graph nodes refer to this object; without this, only the collector would free the graph.
        self.roots.clear()
        self.taps.clear()
        with autocast(leaves[0].device, None):
            found: list[Tensor | None] = list(
                torch.autograd.grad(outputs, leaves, gradients, allow_unused=True)
            )
        del outputs, gradients
        return told_apart(found)

    def _recompute(self) -> None:
        step = self.step
        values = self._global_values()
        parts = self._input_parts(values)
        for name in step.parts:
            if name in step.owned:
                self._root(name, parts[name, step.owned[name].own])
        for name in TileRun(step, values, parts).evaluate():
            if name in step.owned:
                values[name] = self._observe(name, values[name])

    def _global_values(self) -> dict[str, Tensor]:
        names = [slot.name for slot in self.given if slot.source is Source.VALUE]
        return {
            name: self._leaf(Output(Sink.VALUE_GRADIENT, name), self.given.pop(Input(Source.VALUE, name)))
            for name in names
        }

    def _input_parts(self, values: dict[str, Tensor]) -> dict[tuple[str, Region], Tensor]:
        """A leaf for each input and part, since a slice inside the graph would cost a zero-filled copy.

        Inputs that an operator reads whole are added to ``values``.
        """
        parts = {}
        for name, operands in self.step.parts.items():
            whole = self.given.pop(Input(Source.MAP, name))
            for operand in operands:
                part = crop(whole, operand.axes, operand.covered, operand.part)
                leaf = self._leaf(Output(Sink.MAP_GRADIENT, name, operand.part), part)
                parts[name, operand.part] = leaf
                if operand.part == operand.covered:
                    values[name] = leaf
        return parts

    def _leaf(self, output: Output, value: Tensor) -> Tensor:
        """A value at which autograd stops, if its gradient is among the step's outputs."""
        if output not in self.wanted:
            return value
        self.leaves[output] = value.detach().requires_grad_()
        return self.leaves[output]

    def _observe(self, name: str, value: Tensor) -> Tensor:
        if not value.requires_grad:
            return value
        part = self.step.owned[name]
        if name not in self.step.consumed:
            # A tile of whole lines may compute more than its own part.
            self._root(name, crop(value, part.axes, part.covered, part.own))
            return value
        share = crop(value.detach(), part.axes, part.covered, part.own)

        def add(gradient: Tensor) -> Tensor:
            # Autograd may hand the same tensor to another consumer, so the tensor is not changed in place.
            if part.own == part.covered:
                return self.arriving(name, share, gradient)
            total = gradient.clone()
            crop(total, part.axes, part.covered, part.own).add_(self.arriving(name, share))
            return total

        tapped: Tensor = _Tap.apply(value, add)  # type: ignore[no-untyped-call]
        self.taps.append(tapped)
        return tapped

    def _root(self, name: str, value: Tensor) -> None:
        if value.requires_grad:
            self.roots.append((value, self.arriving(name, value.detach())))

    def arriving(self, name: str, share: Tensor, total: Tensor | None = None) -> Tensor:
        """``total``, if any, plus the gradient from outside on the tile's own part of a map.

        ``share`` has the values of that part. Neither ``share`` nor ``total`` is changed.
        """
        part = self.step.owned[name]
        if part.has_gradient:
            gradient = self.given.pop(Input(Source.GRADIENT, name))
            total = gradient if total is None else total + gradient
        values = self.given.pop(Input(Source.STORED, name)) if part.reads_values else share
        for reduction, rule in part.reductions.items():
            terms = [self.given[Input(Source.TERM, reduction, i)] for i in range(part.num_terms[reduction])]
            if total is None:
                total = rule.gradient(values, part.place, terms).expand_as(share)
            else:
                total = rule.added_gradient(total, values, part.place, terms)
        assert total is not None
        return total

    def _reach_taps(self) -> None:
        """Make each tap a root that no root reaches, because its readers stop the gradient."""
        if not self.taps:
            return
        reached: set[Any] = set()
        for root, _ in self.roots:
            _walk(root.grad_fn, reached)
        for tapped in reversed(self.taps):
            if tapped.grad_fn not in reached:
                nothing = torch.zeros((), dtype=tapped.dtype, device=tapped.device).expand_as(tapped)
                self.roots.append((tapped, nothing))
                _walk(tapped.grad_fn, reached)


def told_apart(gradients: Sequence[Tensor | None]) -> list[Tensor | None]:
    """Replace each gradient that somebody else holds too by a new tensor in the same memory.

    The memory's use count then shows that it is shared, so that nothing is added to it in place. Autograd may
    return one tensor for several leaves, and a user's function may keep the tensors that it returns.
    """
    (alone,) = _num_holders([torch.empty(0)])
    holders = _num_holders(gradients)
    return [
        each.detach() if each is not None and count > alone else each
        for each, count in zip(gradients, holders, strict=True)
    ]


def _num_holders(tensors: Sequence[Any]) -> list[int]:
    """The number of references to each tensor, including those of the sequence and of this function."""
    return [sys.getrefcount(tensor) for tensor in tensors]


def _walk(node: Any, reached: set[Any]) -> None:
    """Add the nodes of the autograd graph that ``node`` leads to, itself included."""
    pending = [node]
    while pending:
        node = pending.pop()
        if node is not None and node not in reached:
            reached.add(node)
            pending.extend(function for function, _ in node.next_functions)


class _Tap(torch.autograd.Function):
    """Identity whose backward pass adds the gradient that the value gets from outside the tile's graph."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, add: Callable[[Tensor], Tensor]) -> Tensor:
        ctx.add = add
        return value.view_as(value)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        add, ctx.add = ctx.add, None
        return add(grads[0]), None
