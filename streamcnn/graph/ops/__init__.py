"""Operator families. Importing this package fills the registries of rules and costs.

It also exports what rules in other packages need: see ``docs/adding_an_operator.md``.
"""

from streamcnn.geometry.axis_maps import (
    Adaptive,
    All,
    Broadcast,
    Gathered,
    Line,
    Repeated,
    Reversed,
    Same,
    Sliding,
    Transposed,
)
from streamcnn.graph.costs import CallBytes, Cost, Operand, Operation, Routine, Saves, declare
from streamcnn.graph.ops import (
    adaptive_pooling,
    along_axes,
    attention,
    convolution,
    dropout,
    fourier,
    images,
    joining,
    lookup,
    losses,
    normalization,
    padding,
    pointwise,
    pooling,
    products,
    recurrent,
    reductions,
    resampling,
    shape,
    shared_statistics,
    sliding_blocks,
    user_functions,
    writing,
)
from streamcnn.graph.ops.rules import Call, NotStreamable, Sample, Tracer, rule
from streamcnn.graph.program import Access, Ref
from streamcnn.graph.registry import rules_version

__all__ = [
    "FAMILIES",
    "Access",
    "Adaptive",
    "All",
    "Broadcast",
    "Call",
    "CallBytes",
    "Cost",
    "Gathered",
    "Line",
    "NotStreamable",
    "Operand",
    "Operation",
    "Ref",
    "Repeated",
    "Reversed",
    "Routine",
    "Same",
    "Sample",
    "Saves",
    "Sliding",
    "Tracer",
    "Transposed",
    "declare",
    "rule",
    "rules_version",
    "samples",
]

FAMILIES = (
    adaptive_pooling,
    along_axes,
    attention,
    convolution,
    dropout,
    fourier,
    images,
    joining,
    lookup,
    losses,
    normalization,
    padding,
    pointwise,
    pooling,
    products,
    recurrent,
    reductions,
    resampling,
    shape,
    shared_statistics,
    sliding_blocks,
    user_functions,
    writing,
)


def samples() -> tuple[Sample, ...]:
    """Small modules that together use every rule."""
    return tuple(sample for family in FAMILIES for sample in family.SAMPLES)
