"""UltraMNIST under a memory budget.

python -m benchmarks run --budget 11GB --scale paper
python -m benchmarks methods
python -m benchmarks table --scale paper
"""

from __future__ import annotations

import ctypes
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from benchmarks.harness.images import fingerprint_of, generated
from benchmarks.harness.method import Method, load_methods
from benchmarks.harness.results import Key, done, record
from benchmarks.harness.row import AGAIN, Attempts, Task
from benchmarks.harness.row import run as run_row
from benchmarks.harness.scales import SCALES, Scale
from benchmarks.harness.table import PAPER_TABLES, write_table
from streamcnn.data.ultramnist import load_digits
from streamcnn.training.runs import present_devices
from streamcnn.units import format_bytes, format_duration, parse_bytes

app = typer.Typer(add_completion=False, help=__doc__, no_args_is_help=True)

ScaleName = Annotated[str, typer.Option("--scale", help=f"One of {', '.join(SCALES)}.")]
Work = Annotated[Path, typer.Option(help="Folder for images, shrunk images and checkpoints.")]
WORK = Path("benchmark-runs")
_PR_SET_PDEATHSIG = 1
_CRASHES = (signal.SIGABRT, signal.SIGBUS, signal.SIGSEGV)
"""How libraries end the process where memory is refused them."""


@app.command()
def run(
    budget: Annotated[str, typer.Option(help="Ceiling in training and in inference, such as 11GB.")],
    scale: ScaleName = "paper",
    methods: Annotated[str, typer.Option(help="Names, separated by commas; default: all.")] = "",
    seeds: Annotated[str, typer.Option(help="Numbers, separated by commas.")] = "0",
    pretrained: Annotated[
        bool, typer.Option("--pretrained/--no-pretrained", help="Begin with timm's weights.")
    ] = False,
    digits: Annotated[
        str | None, typer.Option(help="As for `streamcnn ultramnist generate`.", envvar="MNIST_FOLDER")
    ] = None,
    device: Annotated[str, typer.Option(help="cpu or cuda; default: cuda where there is one.")] = "",
    seconds: Annotated[
        float | None, typer.Option(help="Begin no other row after so many; run again to go on.")
    ] = None,
    workers: Annotated[int, typer.Option(help="Processes that make images.")] = 1,
    again: Annotated[bool, typer.Option("--again", help="Run what is done already, too.")] = False,
    work: Work = WORK,
) -> None:
    """Train and score methods, each in its own process; what is done already is left out."""
    chosen, size, numbers = _methods(methods), _scale(scale), _seeds(seeds)
    budget_bytes, device = _budget(budget), _device(device)
    console, started = Console(), time.monotonic()
    source = load_digits(digits)
    for note in source.notes:
        console.print(note, soft_wrap=True, highlight=False)
    images = work / size.name / "images"
    console.print(
        f"{size.num_train + size.num_test} images of {size.canvas} pixels: {images}", highlight=False
    )
    fingerprint = fingerprint_of(generated(size, images, source, workers=workers))
    for seed in numbers:
        for method in chosen:
            start = pretrained and method.has_weights
            key = Key(size.name, budget_bytes, method.name, seed, start, device, fingerprint)
            if not method.runs:
                if methods:
                    console.print(f"{method.name} is not run: {method.note}", highlight=False)
                continue
            if done(key) and not again:
                continue
            if seconds is not None and time.monotonic() - started > seconds:
                console.print("out of time: the same command goes on", highlight=False)
                raise typer.Exit(0)
            folder = work / size.name / _folder_of(key)
            if again:
                shutil.rmtree(folder, ignore_errors=True)
            found = _in_a_process(key, work / size.name, folder)
            record(key, found, "python -m benchmarks " + " ".join(sys.argv[1:]))
            console.print(_line(method, seed, found), soft_wrap=True, highlight=False)


@app.command()
def methods() -> None:
    """List the methods."""
    table = Table(box=None)
    for column in ("method", "kind", "backbone", "input"):
        table.add_column(column, no_wrap=True)
    for column in ("published, %", "at 11 GB", "note"):
        table.add_column(column)
    for method in load_methods().values():
        published = (method.published.get(column, "") for column in PAPER_TABLES["Table 1"])
        table.add_row(
            method.name, method.kind.value, method.family, method.input_text, *published, method.note
        )
    Console().print(table)


@app.command()
def table(
    scale: ScaleName = "paper",
    out: Annotated[Path | None, typer.Option(help="Folder for the table and figures.")] = None,
) -> None:
    """Write the paper's tables with what was measured beside the published figures, and draw the figures."""
    for path in write_table(_scale(scale), out):
        typer.echo(path)


@app.command(hidden=True)
def row(key: str, scale_folder: Path, folder: Path, parent: int) -> None:
    """One method in this process; what was found as JSON on the last line."""
    end_with(parent)
    known = Key(**json.loads(key))
    found = run_row(
        Task(
            method=load_methods()[known.method],
            scale=SCALES[known.scale],
            budget=known.budget,
            seed=known.seed,
            pretrained=known.pretrained,
            device=known.device,
            images=scale_folder / "images",
            shrunk=scale_folder / "shrunk" / known.images,
            folder=folder,
        )
    )
    print(json.dumps(found))


def end_with(parent: int) -> None:
    """Have SIGTERM sent to this process when its parent is gone, so that it saves and ends."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
        if os.getppid() != parent:
            raise SystemExit("the process that started this one is gone")


def _folder_of(key: Key) -> str:
    """Where a row keeps its checkpoints, apart from those of all other rows."""
    start = "pretrained" if key.pretrained else "random"
    return f"{key.method}-{key.budget}-{key.seed}-{start}-{key.device}-{key.images}"


def _in_a_process(key: Key, scale_folder: Path, folder: Path) -> dict[str, Any]:
    """What the row's process found; where it failed, its last words.

    A library that is refused memory on the CPU may end the process. What was tried then counts as refused,
    and the row goes on in another process.
    """
    Attempts(folder).forget_last()
    arguments = ("row", json.dumps(key.to_dict()), str(scale_folder), str(folder), str(os.getpid()))
    command = [sys.executable, "-m", "benchmarks", *arguments]
    while True:
        process = subprocess.run(command, capture_output=True, text=True, check=False)
        if process.returncode == 0:
            found: dict[str, Any] = json.loads(process.stdout.splitlines()[-1])
            if found["outcome"] == AGAIN:
                continue
            return found
        print(process.stderr, file=sys.stderr)
        words = process.stderr.strip().splitlines() or [f"exit status {process.returncode}"]
        if key.device == "cpu" and -process.returncode in _CRASHES:
            signal_name = signal.Signals(-process.returncode).name
            if Attempts(folder).refuse_last(f"a library ended the process: {signal_name}, {words[-1]}"):
                continue
        return {"outcome": "failed", "reason": words[-1]}


def _line(method: Method, seed: int, found: dict[str, Any]) -> str:
    """A row as one line of text."""
    begin = f"{method.name}, seed {seed}: {found['outcome']}"
    if found["outcome"] != "finished":
        return f"{begin}: {found['reason']}"
    return (
        f"{begin}: test accuracy {found['test_accuracy']:.1%}, batch {found['batch_size']}, "
        f"{found['epochs']} epochs in {format_duration(found['training_seconds'])}, peak "
        f"{format_bytes(max(found['training_peak_bytes'] or 0, found['inference_peak_bytes'] or 0))}"
    )


def _methods(names: str) -> list[Method]:
    every = load_methods()
    wanted = [name.strip() for name in names.split(",")] if names else list(every)
    unknown = [name for name in wanted if name not in every]
    if unknown:
        raise typer.BadParameter(f"no method {', '.join(unknown)}: there are {', '.join(every)}")
    return [every[name] for name in wanted]


def _device(name: str) -> str:
    present = present_devices()
    if name and name not in present:
        raise typer.BadParameter(f"no device {name}: there is {' and '.join(present)}")
    return name or present[-1]


def _seeds(text: str) -> list[int]:
    try:
        return [int(number) for number in text.split(",")]
    except ValueError:
        raise typer.BadParameter(f"cannot read seeds {text!r}: allowed are whole numbers, as 0,1,2") from None


def _budget(text: str) -> int:
    try:
        nbytes = parse_bytes(text)
    except ValueError as error:
        raise typer.BadParameter(f"--budget: {error}") from None
    assert nbytes is not None
    return nbytes


def _scale(name: str) -> Scale:
    if name not in SCALES:
        raise typer.BadParameter(f"no scale {name}: there are {', '.join(SCALES)}")
    return SCALES[name]


if __name__ == "__main__":
    app()
