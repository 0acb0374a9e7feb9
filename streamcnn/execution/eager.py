"""The default implementation of a step's computation."""

from __future__ import annotations

from functools import partial

from streamcnn.execution.backward_tile import run_backward
from streamcnn.execution.interpreter import run_forward
from streamcnn.execution.step import Compute, Step


def compute_eagerly(step: Step) -> Compute:
    """The function that computes a step by PyTorch's operators, one after the other."""
    return partial(run_forward if step.direction == "forward" else run_backward, step)
