"""``python -m benchmarks zoo``: models that nobody here wrote, streamed and planned."""

from __future__ import annotations

import json
import os
import signal
import sys
import tempfile
import time
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Annotated, Any

import typer

from benchmarks.harness.processes import Deadline, OutOfTime, run_to_end
from benchmarks.zoo import results
from benchmarks.zoo.families import Family, families, versions
from benchmarks.zoo.one import PARTS
from benchmarks.zoo.page import page

PAGE = Path(__file__).parents[2] / "docs" / "model_zoo.md"
_MOST_JOBS = 2


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
    if table:
        PAGE.write_text(page(list(results.newest().values())))
        typer.echo(PAGE)
        return
    known = results.newest()
    waiting = [family for family in families(*only or ()) if fresh or family not in known]
    command = "python -m benchmarks " + " ".join(sys.argv[1:])
    _examine_all(waiting, command, jobs, limit, Deadline(seconds))


def _examine_all(waiting: list[Family], command: str, jobs: int, limit: float, deadline: Deadline) -> None:
    """Examine families, some at a time, and record each as soon as it is done."""
    named, count = versions(), len(waiting)
    with ThreadPoolExecutor(jobs) as pool:
        running: dict[Future[dict[str, Any]], Family] = {}
        while waiting or running:
            while waiting and len(running) < jobs and deadline.seconds_left != 0:
                family = waiting.pop(0)
                running[pool.submit(examined, family, limit, deadline)] = family
            if not running:
                break
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                family = running.pop(future)
                try:
                    found = future.result()
                except OutOfTime:
                    waiting.append(family)
                    continue
                row = results.record(family, command, found, named)
                place = count - len(waiting) - len(running)
                typer.echo(f"{place}/{count} {family}: {row.verdict} {row.reason}"[:200])
    if waiting:
        typer.echo(f"out of time: the same command goes on with {len(waiting)} families")


def examined(family: Family, limit: float, deadline: Deadline) -> dict[str, Any]:
    """What the family's process found, as far as it came.

    Raises
    ------
    OutOfTime
        If ``deadline`` is past before it is done, rather than its own ``limit``.
    """
    deadline.check()
    start = time.monotonic()
    left = deadline.seconds_left
    own = Deadline(limit if left is None else min(limit, left))
    with tempfile.TemporaryDirectory() as folder:
        module = [sys.executable, "-m", "benchmarks.zoo.one"]
        ended = ""
        try:
            done = run_to_end([*module, family.library, family.name, folder, str(os.getpid())], own)
        except OutOfTime:
            deadline.check()
            ended = f"out of time after {limit:.0f} s"
        else:
            if done.returncode:
                words = done.stderr.strip().splitlines() or ["no words"]
                ended = f"{_how(done.returncode)}: {words[-1]}"
        parts = Path(folder) / PARTS
        lines = parts.read_text().splitlines() if parts.exists() else []
    found: dict[str, Any] = {}
    for line in lines:
        found |= json.loads(line)
    return {**found, **({"ended": ended} if ended else {}), "seconds": round(time.monotonic() - start, 1)}


def _how(status: int) -> str:
    return signal.Signals(-status).name if status < 0 else f"exit status {status}"
