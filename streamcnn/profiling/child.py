"""The process that measures one tile size: prints one :class:`TileProfile` as a line of JSON.

    python -m streamcnn.profiling.child MODEL FOLDER TILE BUDGET REPEATS OPTIONS

FOLDER holds the images of the batch; BUDGET is bytes or ``none``; REPEATS the
updates that follow the first; OPTIONS a JSON object, the model's arguments.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor

from streamcnn.data.sources import ZarrSource
from streamcnn.errors import BudgetExceeded, PlanDoesNotFit, StreamError
from streamcnn.graph.program import has_gradient
from streamcnn.plan.plan import Plan
from streamcnn.profiling.recorder import Recorder
from streamcnn.profiling.sketch import sketch_plan
from streamcnn.profiling.tile_profile import TileProfile
from streamcnn.profiling.timeline import Timeline
from streamcnn.runtime.report import Report
from streamcnn.runtime.streaming_model import StreamingModel
from streamcnn.support.models import load_model


@dataclass(frozen=True, slots=True)
class _Update:
    """The measurements of one update."""

    report: Report
    timeline: Timeline | None


def measure(
    model: str,
    folder: Path,
    tile: int,
    budget: int | None,
    repeats: int,
    options: Mapping[str, Any] | None = None,
) -> TileProfile:
    """Measure updates with tiles of that size in this process, on the images in ``folder``.

    The first update is not timed unless it is the only one, but its peak counts.

    Raises
    ------
    UnsupportedModel
        If the model cannot be captured at the size of the images.
    ValueError
        If there is no model of that name.
    """
    torch.manual_seed(0)
    streamed = StreamingModel(
        load_model(model, **(options or {})).train(),
        budget,
        tile=tile,
        spill=folder,
        preprocess=lambda pixels: pixels / 255 - 0.5,
    )
    sources = [ZarrSource(path) for path in sorted(folder.glob("image-*.zarr"))]
    plan = streamed.plan(sources)
    refusal, updates = _run(streamed, sources, plan, 1 + repeats)
    most = max(updates, key=lambda update: update.report.measured_bytes or 0, default=None)
    return TileProfile(
        tile=tile,
        projected_bytes=plan.projected_bytes,
        measured_bytes=None if most is None else most.report.measured_bytes,
        reading="not run" if most is None else most.report.reading,
        seconds=median(update.report.seconds for update in updates[1:] or updates) if updates else None,
        recomputation=plan.recomputation,
        bytes_moved=None if most is None else most.report.bytes_moved,
        budget=plan.budget,
        plain_bytes=plan.plain_bytes,
        refusal=refusal,
        explanation=plan.explain(),
        plan=sketch_plan(plan),
        timeline=None if most is None else most.timeline,
    )


def _run(
    streamed: StreamingModel, sources: list[ZarrSource], plan: Plan, count: int
) -> tuple[str | None, list[_Update]]:
    """Measure ``count`` updates; if the budget does not allow one, return the reason and no updates."""
    updates = []
    for _ in range(count):
        tail = max(segment.level for segment in plan.segments) if plan.num_resident else None
        with Recorder(tail) as recorder:
            streamed.observer = recorder.observe
            refusal = make_update(streamed, sources)
        if refusal is not None:
            return refusal, []
        report = streamed.last_report
        assert report is not None
        baseline = report.baseline_bytes
        updates.append(_Update(report, None if baseline is None else recorder.timeline(baseline)))
        streamed.zero_grad()
    return None, updates


def make_update(streamed: StreamingModel, sources: list[ZarrSource]) -> str | None:
    """Make one forward and backward pass; return the reason if the budget does not allow it."""
    try:
        outputs = streamed(sources)
        loss = torch.stack([_mean_square(output) for output in _floats(outputs)]).sum()
        loss.backward()  # type: ignore[no-untyped-call]
    except (PlanDoesNotFit, BudgetExceeded) as error:
        return str(error)
    assert streamed.last_report is not None
    if streamed.last_report.num_smaller_plans:
        return "memory was refused in the middle; the update went on by a smaller plan"
    return None


def _floats(outputs: Any) -> list[Tensor]:
    """The floating-point and complex tensors among a model's outputs."""
    if isinstance(outputs, Tensor):
        return [outputs] if has_gradient(outputs.dtype) else []
    members = outputs.values() if isinstance(outputs, dict) else outputs
    return [tensor for member in members for tensor in _floats(member)]


def _mean_square(output: Tensor) -> Tensor:
    return (output.abs() if output.is_complex() else output).float().square().mean()


def main(arguments: Sequence[str]) -> None:
    """Measure and print; an error that a user can act on is one line on standard error."""
    model, folder, tile, budget, repeats, options = arguments
    limit = None if budget == "none" else int(budget)
    try:
        profile = measure(model, Path(folder), int(tile), limit, int(repeats), json.loads(options))
    except (StreamError, ValueError) as error:
        raise SystemExit(f"{type(error).__name__}: {error}") from error
    print(profile.to_json())


if __name__ == "__main__":
    main(sys.argv[1:])
