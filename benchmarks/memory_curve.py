"""Memory over the time of a pass, plain and streamed: the picture on the front page.

    python -m benchmarks.memory_curve run resnet18 --size 4000 --budget 1GiB
    python -m benchmarks.memory_curve draw      # the last record into docs/images/memory_curve.png

Each kind runs in a process of its own, which makes one pass that is not measured and gives back the memory
that this pass has kept. During another pass, resident memory above that level is read every 10 ms. Images are
random; the picture shows one of UltraMNIST, with the tiles of the plan's first phase.
"""

from __future__ import annotations

import json
import sys
from operator import itemgetter
from pathlib import Path
from typing import Annotated, Any

import typer

from benchmarks.record import RESULTS, append
from benchmarks.speed.cases import Case
from benchmarks.speed.kinds import kinds_of
from benchmarks.speed.task import Task
from benchmarks.speed.worker import Worker
from streamcnn.data.ultramnist import Recipe, Spec, load_digits, make_image
from streamcnn.profiling.scales import bytes_ticks
from streamcnn.support.extras import require
from streamcnn.support.units import format_bytes, parse_bytes

PICTURE = Path(__file__).parents[1] / "docs" / "images" / "memory_curve.png"
_RECORDS = RESULTS / "memory_curve.jsonl"
_MOST_POINTS = 400
"""The most points of a recorded curve, each the highest of its stretch of time."""
_PLAIN, _PLAIN_WORDS, _STREAMED, _BUDGET = "#8a8f98", "#4b5058", "#1f6feb", "#c62828"
_LABEL = {"textcoords": "offset points", "fontsize": 9}
_DIGITS = (0, "test", 3)
"""Seed, split and index of the image that is shown."""

app = typer.Typer(add_completion=False)


@app.command()
def run(
    model: Annotated[str, typer.Argument(help="A timm name or package.module:factory.")],
    size: Annotated[int, typer.Option(help="Edge of the square image.", min=64)] = 4000,
    budget: Annotated[str, typer.Option(help="Ceiling of the streamed pass.")] = "1GiB",
    record: Annotated[bool, typer.Option(help="Append to results/memory_curve.jsonl.")] = True,
) -> None:
    """Measure a training pass of each kind; print one JSON line."""
    case = Case(model, size, (budget,))
    curves, plan = {}, None
    for kind in kinds_of(case, ("plain-kept", "plain", "streamed")):
        worker = Worker(Task(case, kind, "cpu", None))
        try:
            device = worker.ready()["device"]
            worker.make_pass()
            if not kind.keeps_heap:
                worker.rest()
            found, planned = worker.make_pass()
            (_, before), *_ = worker.readings
            readings = [(seconds, nbytes - before) for seconds, nbytes in worker.readings]
            curves[kind.name] = {"seconds": found["seconds"], "readings": thinned(readings)}
            plan = planned or plan
        finally:
            worker.close()
    fields = {"case": case.name, "device": device, "size": size, "budget": budget, "plan": plan}
    command = "python -m benchmarks.memory_curve " + " ".join(sys.argv[1:])
    print(append("memory_curve", command, **fields, **curves) if record else json.dumps({**fields, **curves}))


@app.command()
def draw(out: Annotated[Path, typer.Option(help="The picture, replaced if it is there.")] = PICTURE) -> None:
    """Draw the last record."""
    if not _RECORDS.exists():
        raise SystemExit(f"no {_RECORDS}: measure first, by python -m benchmarks.memory_curve run MODEL")
    found = json.loads(_RECORDS.read_text().splitlines()[-1])
    figure(found).savefig(out, dpi=130)
    print(out)


def thinned(readings: list[tuple[float, int]], most: int = _MOST_POINTS) -> list[tuple[float, int]]:
    """A curve thinned to its highest point in each stretch, so that no peak is lost."""
    step = -(-len(readings) // most)
    stretches = [readings[at : at + step] for at in range(0, len(readings), step)]
    return [
        (round(seconds, 2), nbytes)
        for seconds, nbytes in (max(each, key=itemgetter(1)) for each in stretches)
    ]


def figure(found: dict[str, Any]) -> Any:
    """A record as a matplotlib ``Figure``: the image in its tiles, and memory over time."""
    made = require("matplotlib.figure", extra="plots").Figure(figsize=(10, 4.2), layout="constrained")
    picture, axes = made.subplots(1, 2, width_ratios=(1, 1.75))
    _draw_tiles(picture, found)
    _draw_curves(axes, found)
    return made


def _draw_tiles(axes: Any, found: dict[str, Any]) -> None:
    seed, split, index = _DIGITS
    size, (height, width) = found["size"], found["plan"]["tile"]
    image = make_image(Spec(seed, Recipe.BALANCED, size), split, index, load_digits("uci"))
    axes.imshow(image.pixels[0], cmap="gray", interpolation="antialiased")
    edges = {"color": _STREAMED, "linewidth": 1.2}
    for at in range(height, size, height):
        axes.axhline(at, **edges)
    for at in range(width, size, width):
        axes.axvline(at, **edges)
    axes.set_axis_off()
    axes.set_title(f"{size} x {size} pixels, in tiles", fontsize="medium")


def _draw_curves(axes: Any, found: dict[str, Any]) -> None:
    plain, kept, streamed = (found[kind] for kind in ("plain", "plain-kept", "streamed"))
    budget = parse_bytes(found["budget"])
    for curve, color in ((plain, _PLAIN), (streamed, _STREAMED)):
        seconds, nbytes = zip(*curve["readings"], strict=True)
        axes.fill_between(seconds, nbytes, color=color, alpha=0.15, linewidth=0)
        axes.plot(seconds, nbytes, color=color)
    axes.axhline(budget, color=_BUDGET, linestyle="--", linewidth=1.2)
    top = max(nbytes for _, nbytes in plain["readings"])
    end = max(plain["seconds"], streamed["seconds"])
    axes.annotate(f"budget: {found['budget']}", (end, budget), (0, 4), color=_BUDGET, ha="right", **_LABEL)
    words = f"plain PyTorch: {format_bytes(top)}, {plain['seconds']:.0f} s\n"
    words += f"(with its heap kept: {kept['seconds']:.0f} s)"
    axes.annotate(
        words, (0.45 * plain["seconds"], 0.6 * top), (0, 0), color=_PLAIN_WORDS, ha="center", **_LABEL
    )
    most = max(nbytes for _, nbytes in streamed["readings"])
    words = f"streamcnn: {format_bytes(most)}, {streamed['seconds']:.0f} s, the same gradients"
    axes.annotate(words, (end, budget), (0, 20), color=_STREAMED, ha="right", **_LABEL)
    axes.set_yticks(*zip(*bytes_ticks(int(1.1 * top)), strict=True))
    axes.set_ylim(0, 1.1 * top)
    axes.set_xlim(0, 1.02 * end)
    axes.set_xlabel("time of a forward and backward pass [s]")
    axes.set_title(
        f"memory of a training pass of {found['case']}, {found['device']}",
        fontsize="medium",
        parse_math=False,
    )
    axes.spines[["top", "right"]].set_visible(False)


if __name__ == "__main__":
    app()
