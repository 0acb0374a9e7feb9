"""Interfere with the operators of a tile while a pass evaluates them."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
from torch import Tensor

from streamcnn.execution.interpreter import TileRun

Evaluate = Callable[[], Tensor]


def around_operators(patch: pytest.MonkeyPatch, around: Callable[[Evaluate], Tensor]) -> None:
    """Let ``around`` return the value of each operator of a tile; it gets the function that evaluates it."""
    original = TileRun.evaluate_operator
    patch.setattr(TileRun, "evaluate_operator", lambda run, *args: around(partial(original, run, *args)))


def refuse_memory() -> None:
    """Raise an error, as the system does if no memory is left."""
    raise MemoryError("refused")


class RefusedOnce:
    """Evaluates operators, but is refused memory at one of them or, if ``always``, from there on."""

    def __init__(
        self, at: int, *, always: bool = False, refuse: Callable[[], object] = refuse_memory
    ) -> None:
        self.at = at
        self.always = always
        self.refuse = refuse
        self.calls = 0

    def __call__(self, evaluate: Evaluate) -> Tensor:
        self.calls += 1
        if self.calls == self.at or (self.always and self.calls > self.at):
            self.refuse()
        return evaluate()
