"""Fuzz the readers of files from the command line."""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from typing import Annotated

import typer

sys.path.insert(0, str(Path(__file__).parents[1]))  # where the tests' own modules are

from .campaign import keep, run, table
from .seeds import SEEDS


def main(
    minutes: Annotated[float, typer.Option(help="How long to go on.")] = 1.0,
    seed: Annotated[int, typer.Option(help="The same seed makes the same inputs.")] = 0,
    target: Annotated[
        list[str] | None, typer.Option(help=f"One of {', '.join(SEEDS)}; default: all.")
    ] = None,
    inputs: Annotated[int | None, typer.Option(help="So many of each target instead of a time.")] = None,
    out: Annotated[Path, typer.Option(help="Folder for inputs that are faults.")] = Path("fuzz-faults"),
) -> None:
    """Open files that were changed at random; exit status 1 if one is neither accepted nor refused."""
    with tempfile.TemporaryDirectory() as work:
        seconds = None if inputs is not None else 60 * minutes
        tallies = run(target or list(SEEDS), seed, Path(work), seconds=seconds, inputs=inputs)
        faults = keep(tallies, Path(work), out)
    typer.echo(table(tallies))
    for line in faults:
        typer.echo(line)
    raise typer.Exit(1 if faults else 0)


app = typer.Typer(pretty_exceptions_enable=False, add_completion=False)
app.command()(main)
app()
