"""Hand-made profiles, and the model that the profiler's tests measure."""

from __future__ import annotations

import dataclasses

from streamcnn.profiling import TileProfile
from streamcnn.profiling.sketch import PhaseSketch, PlanSketch, StoredMap
from streamcnn.profiling.timeline import BETWEEN, TAIL, Span, Timeline

MIB = 2**20
SHAPE = (1, 3, 160, 130)
FACTORY = """
from torch import nn

def make():
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4),
    )

def wrong():
    raise RuntimeError("the factory's own fault")
"""

WHOLE = ((0.0, 1.0), (0.0, 1.0))
PHASES = (
    PhaseSketch(
        level=1,
        operators=(("conv2d", 1),),
        inputs=("x",),
        stored=(StoredMap("conv2d", 60 * MIB, "disk"),),
        reductions=(("batch_norm", 1),),
        grid=(4, 2),
        extent=(160, 80),
        halo=(8, 4),
        own=((0.5, 0.75), (0.5, 1.0)),
        needed=((0.45, 0.8), (0.45, 1.0)),
    ),
    PhaseSketch(
        level=2,
        operators=(("batch_norm", 1), ("relu", 1), ("conv2d", 2), ("max_pool2d", 1), ("a<b", 3)),
        inputs=("conv2d",),
        stored=(StoredMap("conv2d_1", 20 * MIB, "memory"), StoredMap("conv2d_2", 10 * MIB, "host")),
        reductions=(("batch_norm", 2),),
        grid=(1, 1),
        extent=(80, 40),
        halo=(0, 0),
        own=WHOLE,
        needed=WHOLE,
    ),
    PhaseSketch(
        level=3,
        operators=(("add", 1),),
        inputs=("conv2d", "conv2d_1", "conv2d_2"),
        stored=(StoredMap("add", 10 * MIB, "memory"),),
        reductions=(),
        grid=(40, 40),
        extent=(80, 40),
        halo=(0, 0),
        own=((0.5, 0.525), (0.5, 0.525)),
        needed=((0.5, 0.525), (0.5, 0.525)),
    ),
)
SKETCH = PlanSketch("x", (1, 3, 160, 80), PHASES, (("adaptive_avg_pool2d", 1), ("linear", 2)))

TIMELINE = Timeline(
    spans=(
        Span("phase", 1, "forward", 0.0, 1.0),
        Span("phase", 2, "forward", 1.0, 1.5),
        Span(TAIL, 2, "forward", 1.5, 2.0),
        Span(BETWEEN, 2, "", 2.0, 2.25),
        Span(TAIL, 2, "backward", 2.25, 3.0),
        Span("phase", 2, "backward", 3.0, 3.5),
        Span("phase", 1, "backward", 3.5, 5.0),
    ),
    running=(0, 0, 1, 2, 3, 4, 5, 6),
    seconds=(0.25, 1.0, 1.25, 1.75, 2.125, 2.5, 3.25, 4.0),
    nbytes=(10 * MIB, 20 * MIB, 30 * MIB, 40 * MIB, 35 * MIB, 60 * MIB, 80 * MIB, 50 * MIB),
)


def made(tile: int, **fields: object) -> TileProfile:
    """A profile of a tile size that ran, with ``fields`` changed."""
    ran = TileProfile(
        tile=tile,
        projected_bytes=90 * MIB,
        measured_bytes=80 * MIB,
        reading="VmHWM",
        seconds=2.0,
        recomputation=1.25,
        bytes_moved=300 * MIB,
        budget=100 * MIB,
        plain_bytes=120 * MIB,
        refusal=None,
        explanation="plan <of this tile>",
        plan=SKETCH,
        timeline=TIMELINE,
    )
    return dataclasses.replace(ran, **fields)


REFUSED = {
    "projected_bytes": 700 * MIB,
    "measured_bytes": None,
    "reading": "not run",
    "seconds": None,
    "bytes_moved": None,
    "refusal": "no plan fits </script><b>",
    "timeline": None,
}
LOWER = dataclasses.replace(TIMELINE, nbytes=tuple(nbytes // 2 for nbytes in TIMELINE.nbytes))
PROFILES = [
    made(128, projected_bytes=50 * MIB, measured_bytes=40 * MIB, seconds=5.0, timeline=LOWER),
    made(256),
    made(512, **REFUSED),
]
