"""UltraMNIST under a memory budget, the speed of a pass, and models of other libraries.

python -m benchmarks run --budget 11GB --scale paper
python -m benchmarks methods
python -m benchmarks table --scale paper
python -m benchmarks speed resnet18 --size 2048 --budget 8GiB --budget 256MiB
python -m benchmarks zoo
"""

from __future__ import annotations

import itertools
import json
import shutil
import sys
from pathlib import Path
from typing import Annotated, Any, NoReturn

import filelock
import typer
from rich.console import Console
from rich.progress import Progress as ProgressBar
from rich.table import Table

from benchmarks.harness.catalogue import load_methods
from benchmarks.harness.images import fingerprint_of, generated
from benchmarks.harness.method import Method, TrainedMethod
from benchmarks.harness.processes import Deadline, OutOfTime, end_with, run_row_in_process
from benchmarks.harness.results import Key, done, record
from benchmarks.harness.row import run as run_row
from benchmarks.harness.scales import SCALES, Scale
from benchmarks.harness.table import PAPER_TABLES, write_table
from benchmarks.harness.task import Task
from benchmarks.speed.command import speed
from benchmarks.zoo.command import zoo
from streamcnn.data.tile_store import TileStore
from streamcnn.data.ultramnist import Digits, load_digits
from streamcnn.data.ultramnist.generate import Progress
from streamcnn.errors import StreamError
from streamcnn.support.signals import BY_SIGNAL, Stopped, raising
from streamcnn.support.text import as_text, printable
from streamcnn.support.units import format_bytes, format_duration, parse_bytes
from streamcnn.training.config import present_devices

app = typer.Typer(add_completion=False, help=__doc__, no_args_is_help=True)

ScaleName = Annotated[str, typer.Option("--scale", help=f"One of {', '.join(SCALES)}.")]
Work = Annotated[Path, typer.Option(help="Folder for images, shrunk images and checkpoints.")]
WORK = Path("benchmark-runs")

app.command()(speed)
app.command()(zoo)


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
        float | None, typer.Option(help="Stop after so many, as soon as it can; the same command goes on.")
    ] = None,
    workers: Annotated[int, typer.Option(help="Processes that make images.")] = 1,
    again: Annotated[bool, typer.Option("--again", help="Run what is done already, too.")] = False,
    work: Work = WORK,
) -> None:
    """Train and score methods, each in its own process; what is done already is left out."""
    if again and seconds is not None:
        raise typer.BadParameter("--again begins anew each time, so that nothing goes on after --seconds")
    chosen, size, numbers = _methods(methods), _scale(scale), _seeds(seeds)
    budget_bytes, device = _budget(budget), _device(device)
    console = Console()
    deadline = Deadline(seconds)
    source = load_digits(digits)
    for note in source.notes:
        console.print(as_text(note), soft_wrap=True, highlight=False)
    images = work / size.name / "images"
    described = f"{size.num_train + size.num_test} images of {size.canvas} pixels: {images}"
    console.print(as_text(described), highlight=False)
    try:
        fingerprint = fingerprint_of(_generated(size, images, source, workers, deadline, console))
        for seed, method in itertools.product(numbers, chosen):
            start = pretrained and method.has_weights
            key = Key(size.name, budget_bytes, method.name, seed, start, device, fingerprint)
            if not isinstance(method, TrainedMethod):
                if methods:
                    console.print(f"{method.name} is not run: {method.note}", highlight=False)
                continue
            if done(key) and not again:
                continue
            folder = work / size.name / _folder_of(key)
            if again:
                shutil.rmtree(folder, ignore_errors=True)
            found = run_row_in_process(key, work / size.name, folder, deadline)
            record(key, found, "python -m benchmarks " + " ".join(sys.argv[1:]))
            console.print(as_text(_line(method, seed, found)), soft_wrap=True, highlight=False)
    except OutOfTime:
        console.print("out of time: the same command goes on", highlight=False)


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
        table.add_row(method.name, method.kind, method.family, method.input_text, *published, method.note)
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
    method = load_methods()[known.method]
    assert isinstance(method, TrainedMethod)
    found = run_row(
        method,
        Task(
            scale=SCALES[known.scale],
            budget=known.budget,
            seed=known.seed,
            pretrained=known.pretrained,
            device=known.device,
            store=TileStore(scale_folder / "images"),
            shrunk=scale_folder / "shrunk" / known.images,
            folder=folder,
        ),
    )
    print(json.dumps(found))


def _generated(
    scale: Scale, folder: Path, digits: Digits, workers: int, deadline: Deadline, console: Console
) -> TileStore:
    """The images of a scale, made now with a progress bar if they are missing."""
    with ProgressBar(
        *ProgressBar.get_default_columns(), console=console, transient=True, disable=not console.is_terminal
    ) as bar:
        task = bar.add_task("making images", total=None)

        def on_image(progress: Progress) -> None:
            bar.update(task, completed=progress.done, total=progress.total)
            deadline.check()

        try:
            return generated(
                scale, folder, digits, workers=workers, timeout=deadline.seconds_left, on_image=on_image
            )
        except filelock.Timeout:
            raise OutOfTime from None


def _folder_of(key: Key) -> str:
    """The folder of a row's checkpoints, which no other row uses."""
    start = "pretrained" if key.pretrained else "random"
    return f"{key.method}-{key.budget}-{key.seed}-{start}-{key.device}-{key.images}"


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


def main() -> NoReturn:
    """Run the command line and exit, at a signal with the status that shells expect."""
    signals: list[int] = []
    try:
        with raising(signals):
            app()
    except StreamError as error:
        typer.echo(printable(f"benchmarks: error: {error}", keep="\n"), err=True)
        raise SystemExit(1) from None
    except (SystemExit, Stopped):
        if not signals:
            raise
        raise SystemExit(BY_SIGNAL + signals[0]) from None
    raise SystemExit(0)


if __name__ == "__main__":
    main()
