"""``python -m benchmarks speed``: time and memory of a pass, streamed and otherwise."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from benchmarks.speed import results
from benchmarks.speed.cases import STANDARD, Case
from benchmarks.speed.figure import write_figure
from benchmarks.speed.kinds import DEFAULT_KINDS, KINDS, kinds_of
from benchmarks.speed.results import Result
from benchmarks.speed.rounds import measure
from benchmarks.speed.table import tables
from benchmarks.speed.task import Task
from streamcnn.support.models import load_model
from streamcnn.support.units import parse_bytes
from streamcnn.training.config import present_devices

IMAGES = Path(__file__).parents[2] / "docs" / "images"
_WIDTH = 140
"""Columns that a table takes where no terminal says how many there are."""


def speed(
    model: Annotated[
        str, typer.Argument(help="A timm name, package.module:factory, or all for the standard cases.")
    ] = "",
    size: Annotated[int | None, typer.Option(help="Edge of the square images; default: 1024.", min=1)] = None,
    batch: Annotated[int | None, typer.Option(help="Number of images; default: 1.", min=1)] = None,
    budget: Annotated[
        list[str] | None, typer.Option(help="Ceiling of a streamed pass; may be given several times.")
    ] = None,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    kinds: Annotated[
        str, typer.Option(help=f"Some of {', '.join(KINDS)}, separated by commas; default: by device.")
    ] = "",
    repeats: Annotated[int, typer.Option(help="Measured passes of each kind.", min=1)] = 5,
    threads: Annotated[int | None, typer.Option(help="Of PyTorch's operators.", min=1)] = None,
    autocast: Annotated[bool, typer.Option("--autocast", help="In bfloat16 where it may.")] = False,
    inference: Annotated[
        bool, typer.Option("--inference", "--eval", help="Evaluation mode, forward alone.")
    ] = False,
    record: Annotated[bool, typer.Option(help="Append to results/speed.jsonl.")] = True,
    figure: Annotated[
        bool, typer.Option("--figure", help="Measure nothing; draw what is recorded of MODEL, or of all.")
    ] = False,
    out: Annotated[Path, typer.Option(help="Folder for figures.")] = IMAGES,
) -> None:
    """Measure time and memory of a pass: plain PyTorch, with its checkpoints and compiler, and streamcnn."""
    if figure:
        for result in results.newest():
            if model in ("", "all", result.case.split()[0]):
                typer.echo(write_figure(result, out))
        return
    if not model:
        raise typer.BadParameter("name a model, or all for the standard cases")
    if device not in present_devices():
        raise typer.BadParameter(f"no device {device}: there is {' and '.join(present_devices())}")
    cases: Sequence[Case] = [Case(model, size or 1024, tuple(budget or ()), batch or 1, inference, autocast)]
    if model == "all":
        if size or batch or budget or autocast or inference:
            raise typer.BadParameter("the standard cases have their own sizes, budgets and modes")
        cases = STANDARD[device]
    else:
        _require_model(model)
    names = _kinds(kinds, device)
    for case in cases:
        tasks = _tasks(case, names, device, threads)
        result, machine = _measured(tasks, repeats)
        if record:
            command = "python -m benchmarks " + " ".join(sys.argv[1:])
            results.record(result, command, **asdict(case), **machine)
        if all(row.outcome == "failed" for row in result.rows):
            raise typer.Exit(1)


def _require_model(name: str) -> None:
    """Find a wrong name before any process is started for it."""
    try:
        load_model(name)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None


def _measured(tasks: Sequence[Task], repeats: int) -> tuple[Result, dict[str, Any]]:
    """What was measured, printed as well, and on what machine."""
    case = tasks[0].case
    machine, rows = measure(tasks, repeats, lambda text: typer.echo(f"{case.name}: {text}", err=True))
    device = str(machine.pop("device", "unknown"))
    result = Result(case.name, tasks[0].device, device, tuple(rows))
    Console(width=max(Console().width, _WIDTH)).print(tables(result))
    return result, machine


def _tasks(case: Case, names: Sequence[str], device: str, threads: int | None) -> list[Task]:
    """What each kind's process has to do."""
    for text in case.budgets:
        try:
            parse_bytes(text)
        except ValueError as error:
            raise typer.BadParameter(f"--budget: {error}") from None
    chosen = kinds_of(case, names)
    if not chosen:
        raise typer.BadParameter("nothing to measure: streamed kinds need --budget, and inference others")
    return [Task(case, kind, device, threads) for kind in chosen]


def _kinds(names: str, device: str) -> Sequence[str]:
    if not names:
        return DEFAULT_KINDS[device]
    wanted = [name.strip() for name in names.split(",")]
    unknown = [name for name in wanted if name not in KINDS]
    if unknown:
        raise typer.BadParameter(f"no kind {', '.join(unknown)}: there are {', '.join(KINDS)}")
    return wanted
