"""The process that measures one tile size: prints one :class:`TileProfile` as a line of JSON.

    python -m streamcnn.profiling.child MODEL FOLDER TILE BUDGET REPEATS

FOLDER holds the images of the batch; BUDGET is bytes or ``none``; REPEATS the
updates that follow the first.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor

from streamcnn.data.sources import ZarrSource
from streamcnn.errors import BudgetExceeded, PlanDoesNotFit, StreamError
from streamcnn.models import load_model
from streamcnn.plan import AxisStep, Plan
from streamcnn.profiling.recorder import Recorder
from streamcnn.profiling.sketch import sketch_plan
from streamcnn.profiling.tile_profile import TileProfile
from streamcnn.profiling.timeline import Timeline
from streamcnn.regions import Interval
from streamcnn.report import Report
from streamcnn.streaming_model import StreamingModel


def halo_overhead(plan: Plan) -> float:
    """Positions that all tiles of all phases compute in one forward pass, over those of the maps.

    A position counts once per operator, whatever its channels: 1.0 where tiles share nothing, 1.2
    where a fifth is computed again in halos. Operators on whole maps are left out.
    """
    computed = whole = 0
    for phase in plan.phases:
        for name in phase.nodes:
            rows, cols = _computed(phase.rows, name), _computed(phase.cols, name)
            computed += rows * cols
            whole += _extent(phase.rows, name) * _extent(phase.cols, name)
    return computed / whole if whole else 1.0


@dataclass(frozen=True, slots=True)
class _Update:
    """What one update took."""

    report: Report
    timeline: Timeline | None


def measure(model: str, folder: Path, tile: int, budget: int | None, repeats: int) -> TileProfile:
    """Updates with tiles of that size in this process, on the images in ``folder``.

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
        load_model(model).train(),
        budget,
        tile=tile,
        spill=folder,
        preprocess=lambda pixels: pixels / 255 - 0.5,
    )
    sources = [ZarrSource(path) for path in sorted(folder.glob("image-*.zarr"))]
    channels, height, width = sources[0].shape
    plan = streamed.plan((len(sources), channels, height, width))
    refusal, updates = _run(streamed, sources, plan, 1 + repeats)
    most = max(updates, key=lambda update: update.report.measured_bytes or 0, default=None)
    return TileProfile(
        tile=tile,
        projected_bytes=plan.projected_bytes,
        measured_bytes=None if most is None else most.report.measured_bytes,
        reading="not run" if most is None else most.report.reading,
        seconds=median(update.report.seconds for update in updates[1:] or updates) if updates else None,
        recomputation=halo_overhead(plan),
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
    """That many updates; or, if the budget does not allow one of them, the reason and none."""
    updates = []
    for _ in range(count):
        tail = max(segment.level for segment in plan.segments) if plan.num_resident else None
        with Recorder(tail) as recorder:
            streamed.observer = recorder.observe
            refusal = _refusal(streamed, sources)
        if refusal is not None:
            return refusal, []
        report = streamed.last_report
        assert report is not None
        baseline = report.baseline_bytes
        updates.append(_Update(report, None if baseline is None else recorder.timeline(baseline)))
        streamed.zero_grad()
    return None, updates


def _refusal(streamed: StreamingModel, sources: list[ZarrSource]) -> str | None:
    """Forward and backward; the reason if the budget does not allow them."""
    try:
        outputs = streamed(sources)
        loss = torch.stack([_mean_square(output) for output in _floats(outputs)]).sum()
        loss.backward()  # type: ignore[no-untyped-call]
    except (PlanDoesNotFit, BudgetExceeded) as error:
        return str(error)
    assert streamed.last_report is not None
    if streamed.last_report.num_retries:
        return "memory was refused in the middle; the update went on with smaller tiles"
    return None


def _floats(outputs: Any) -> list[Tensor]:
    """The floating-point tensors among a model's outputs."""
    if isinstance(outputs, Tensor):
        return [outputs] if outputs.is_floating_point() else []
    members = outputs.values() if isinstance(outputs, dict) else outputs
    return [tensor for member in members for tensor in _floats(member)]


def _mean_square(output: Tensor) -> Tensor:
    return output.float().square().mean()


def _computed(steps: Sequence[AxisStep], name: str) -> int:
    """Positions along one axis that all tiles together compute."""
    return sum(step.needed[name].size for step in steps if name in step.needed)


def _extent(steps: Sequence[AxisStep], name: str) -> int:
    """The extent of the map along the axis: from the first position needed to the last."""
    needed = [step.needed[name] for step in steps if name in step.needed and step.needed[name].size]
    return reduce(Interval.hull, needed).size if needed else 0


def main(arguments: Sequence[str]) -> None:
    """Measure and print; an error that a user can act on is one line on standard error."""
    model, folder, tile, budget, repeats = arguments
    limit = None if budget == "none" else int(budget)
    try:
        profile = measure(model, Path(folder), int(tile), limit, int(repeats))
    except (StreamError, ValueError) as error:
        raise SystemExit(f"{type(error).__name__}: {error}") from error
    print(profile.to_json())


if __name__ == "__main__":
    main(sys.argv[1:])
