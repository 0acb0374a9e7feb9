"""Time planning of each model in a fresh process, and then in another process that finds the plans.

    python -m benchmarks.planning_time run resnet50 tf_efficientnet_b7 --size 4000 --budgets 2GiB,8GiB

Capture, tracing and the search are timed separately, and so is asking for the plan again and for images of
other sizes. No pass is run. The machine's rates are measured beforehand.
"""

from __future__ import annotations

import json
import os
import sys
import time
from tempfile import TemporaryDirectory
from typing import Annotated, Any

import torch
import typer

from benchmarks.record import append, in_fresh_process
from streamcnn import StreamingModel
from streamcnn.runtime import plan_cache
from streamcnn.runtime.calibration import hardware_profile
from streamcnn.runtime.plan_files import VARIABLE
from streamcnn.support.models import load_model

app = typer.Typer(add_completion=False)


@app.command()
def run(
    models: list[str],
    size: Annotated[int, typer.Option(help="Edge of the square image.")] = 4000,
    budgets: Annotated[str, typer.Option(help="One for each model, separated by commas.")] = "2GiB,8GiB",
    record: Annotated[bool, typer.Option(help="Append to results/planning_time.jsonl.")] = True,
) -> None:
    """Plan each model under its budget and print one JSON line each."""
    command = "python -m benchmarks.planning_time " + " ".join(sys.argv[1:])
    for model, budget in zip(models, budgets.split(","), strict=True):
        with TemporaryDirectory() as plans:
            os.environ[VARIABLE] = plans
            made, found = (
                in_fresh_process("benchmarks.planning_time", "one", model, str(size), budget)
                for _ in range(2)
            )
        afterwards = {f"found_{name}": found[name] for name in ("seconds", "further_sizes_seconds")}
        fields = {"case": f"{model} {size}x{size} {budget}", **made, **afterwards}
        print(append("planning_time", command, **fields) if record else json.dumps(fields), flush=True)


@app.command(hidden=True)
def one(model: str, size: int, budget: str) -> None:
    """Plan in this process; the seconds as JSON on the last line."""
    hardware_profile(torch.device("cpu"))
    net = load_model(model).train()
    seconds: dict[str, float] = {}
    for name in ("Trace", "make_plan"):
        _time(name, seconds)
    start = time.perf_counter()
    model = StreamingModel(net, budget)
    plan = model.plan((1, 3, size, size))
    total = time.perf_counter() - start
    seconds["capture"] = total - sum(seconds.values())
    start = time.perf_counter()
    model.plan((1, 3, size, size))
    seconds["again"] = time.perf_counter() - start
    parts = {f"{name.lower()}_seconds": round(value, 4) for name, value in seconds.items()}
    # These are timed as well.
    sizes = [_plan_seconds(model, size + 64 * number) for number in range(1, 5)]
    found = {"seconds": round(total, 2), **parts, "further_sizes_seconds": sizes}
    print(json.dumps({**found, "phases": len(plan.phases), "fits": plan.fits}))


def _plan_seconds(model: StreamingModel, size: int) -> float:
    """Seconds that planning for images of a size takes."""
    start = time.perf_counter()
    model.plan((1, 3, size, size))
    return round(time.perf_counter() - start, 2)


def _time(name: str, seconds: dict[str, float]) -> None:
    """Patch ``plan_cache`` so that its calls of ``name`` note how long they take."""
    original = getattr(plan_cache, name)

    def timed(*args: Any, **options: Any) -> Any:
        start = time.perf_counter()
        result = original(*args, **options)
        seconds[name] = time.perf_counter() - start
        return result

    setattr(plan_cache, name, timed)


if __name__ == "__main__":
    app()
