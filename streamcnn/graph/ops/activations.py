"""Activations that can be fused into kernels of norms, with their parameters."""

from __future__ import annotations

from typing import NamedTuple

from streamcnn.graph.ops.rules import Call
from streamcnn.graph.schemas import operator_name


class Activation(NamedTuple):
    """An activation that is applied to each value of a map."""

    kind: str
    low: float = 0.0
    """The lower bound of a hardtanh, or the slope of a leaky ReLU."""
    high: float = 0.0
    """The upper bound of a hardtanh."""


IDENTITY = Activation("identity")
RELU = Activation("relu")


def activation_of(call: Call) -> Activation | None:
    """The activation that a call computes, in place or not; ``None`` for any other call."""
    match operator_name(call.target).removesuffix("_"):
        case "relu" | "silu" | "hardswish" as kind:
            return Activation(kind)
        case "relu6":
            return Activation("hardtanh", 0.0, 6.0)
        case "hardtanh":
            low, high = call.bind("min_val", "max_val")
            return Activation("hardtanh", float(low), float(high))
        case "leaky_relu":
            (slope,) = call.bind("negative_slope")
            return Activation("leaky_relu", float(slope))
        case _:
            return None
