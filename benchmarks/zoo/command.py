"""``python -m benchmarks zoo``: models that nobody here wrote, streamed and planned."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Annotated

import typer

from benchmarks.harness.processes import Deadline
from benchmarks.zoo import results
from benchmarks.zoo.examination import Examination
from benchmarks.zoo.families import Family, families, versions
from benchmarks.zoo.page import page
from streamcnn.support.units import plural

PAGE = Path(__file__).parents[2] / "docs" / "model_zoo.md"
_MOST_JOBS = 2
_INTERVAL = 0.1
"""Seconds between looks at the processes."""
_WIDTH = 200
"""Characters of a line that says what was found."""


def zoo(
    only: Annotated[
        list[str] | None,
        typer.Option(help="Families whose library/name contains this text; may be given several times."),
    ] = None,
    fresh: Annotated[bool, typer.Option("--fresh", help="Examine what is recorded already, too.")] = False,
    jobs: Annotated[int, typer.Option(help="Models at a time.", min=1, max=_MOST_JOBS)] = 1,
    seconds: Annotated[
        float | None, typer.Option(help="Stop after so many; the same command goes on.")
    ] = None,
    limit: Annotated[float, typer.Option(help="Seconds for one model.")] = 300,
    table: Annotated[
        bool, typer.Option("--table", help="Examine nothing; write docs/model_zoo.md of what is recorded.")
    ] = False,
) -> None:
    """Stream one model of every family of timm, torchvision and segmentation-models-pytorch, and plan it."""
    known = results.newest()
    if table:
        num_waiting = sum(family not in known for family in families())
        PAGE.write_text(page(list(known.values()), num_waiting))
        typer.echo(PAGE)
        return
    waiting = [family for family in families(*only or ()) if fresh or family not in known]
    command = "python -m benchmarks " + " ".join(sys.argv[1:])
    _examine_all(waiting, command, jobs, limit, Deadline(seconds))


def _examine_all(waiting: list[Family], command: str, jobs: int, limit: float, deadline: Deadline) -> None:
    """Examine families, some at a time, and record each as soon as it is done."""
    named, count = versions(), len(waiting)
    running: list[Examination] = []
    try:
        while (waiting or running) and deadline.seconds_left != 0:
            while waiting and len(running) < jobs:
                running.append(Examination(waiting.pop(0), limit))
            for each in [each for each in running if each.is_over]:
                row = results.record(each.family, command, each.found(), named)
                running.remove(each)
                each.close()
                place = count - len(waiting) - len(running)
                typer.echo(f"{place}/{count} {each.family}: {row.verdict} {row.reason}"[:_WIDTH])
            time.sleep(_INTERVAL)
    finally:
        for each in running:
            each.close()
    if left := len(waiting) + len(running):
        typer.echo(f"out of time: the same command goes on with {plural(left, 'model')}")
