"""Operator families. Importing this package fills the registry of rules."""

from streamcnn.graph.ops import (
    convolution,
    dropout,
    normalization,
    pointwise,
    pooling,
    reductions,
    resampling,
    shape,
    user_functions,
    writing,
)
from streamcnn.graph.ops.rules import Sample

FAMILIES = (
    convolution,
    dropout,
    normalization,
    pointwise,
    pooling,
    reductions,
    resampling,
    shape,
    user_functions,
    writing,
)


def samples() -> tuple[Sample, ...]:
    """Small modules that together use every rule."""
    return tuple(sample for family in FAMILIES for sample in family.SAMPLES)
