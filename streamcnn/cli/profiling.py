"""The command ``profile``: peak memory and time against tile size."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from streamcnn.cli.arguments import (
    Batch,
    Channels,
    Model,
    ModelOption,
    Size,
    load,
    parse,
    parse_extent,
    parse_key_values,
)
from streamcnn.cli.terminal import fits
from streamcnn.support.text import as_text
from streamcnn.support.units import format_bytes, parse_bytes

if TYPE_CHECKING:
    from streamcnn.profiling import TileProfile


def profile(
    model: Model,
    size: Size = "4000",
    tiles: Annotated[str, typer.Option(help="Tile sizes in pixels, separated by commas.")] = "256,512,1024",
    budget: Annotated[str | None, typer.Option(help="Memory ceiling, such as 11GB or 8GiB.")] = None,
    batch: Batch = 1,
    channels: Channels = 3,
    model_option: ModelOption = None,
    output: Annotated[Path, typer.Option(help="Folder for the lines, figures and page.")] = Path("profile"),
    repeats: Annotated[
        int, typer.Option(min=0, help="Updates whose median is the time, after one to warm up; 0: that one.")
    ] = 1,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON lines instead of text.")] = False,
) -> None:
    """Measure training updates with each tile size in a fresh process, and draw what they hold.

    If none of them runs within the budget, the exit status is 1.
    """
    budget_bytes = parse("--budget", parse_bytes, budget)
    shape = (batch, channels, *parse("--size", parse_extent, size))
    edges = parse("--tiles", parse_tiles, tiles)
    options = parse("--model-option", parse_key_values, model_option)
    load(model, options)  # a wrong name fails here rather than in the first measurement
    from streamcnn.profiling import make_folder, profile_tiles, write_results
    from streamcnn.support.extras import require

    require("matplotlib.figure", extra="plots")
    make_folder(output)
    measured = profile_tiles(model, shape, edges, budget_bytes, repeats=repeats, options=options)
    console = Console()
    if as_json:
        profiles = _print_json(measured)
    else:
        profiles = _collect(measured, edges, console)
    write_results(profiles, " ".join([model, *(model_option or ())]), shape, output)
    if not as_json:
        console.print(as_text(f"page: {output / 'report.html'}"), soft_wrap=True, highlight=False)
    _refuse_if_none_ran(profiles)


def _refuse_if_none_ran(profiles: Sequence[TileProfile]) -> None:
    if any(profile.refusal is None for profile in profiles):
        return
    from streamcnn.errors import PlanDoesNotFit

    least = min(profiles, key=lambda profile: profile.projected_bytes)
    raise PlanDoesNotFit(
        f"no tile size ran within {format_bytes(least.budget or 0)}; tiles of {least.tile} pixels take "
        f"least, {format_bytes(least.projected_bytes)}: give smaller --tiles or a larger --budget"
    )


def parse_tiles(text: str) -> tuple[int, ...]:
    """``"256,512"`` as tile sizes in pixels, each once, in ascending order.

    Raises
    ------
    ValueError
        If the text has another form, or a number in it is zero.
    """
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isascii() and part.isdigit() and int(part) for part in parts):
        raise ValueError(
            f"cannot read {text!r} as tile sizes: allowed are positive numbers of pixels "
            "separated by commas; for example 256,512,1024"
        )
    return tuple(sorted({int(part) for part in parts}))


def _print_json(measured: Iterable[TileProfile]) -> list[TileProfile]:
    profiles = []
    for profile in measured:
        typer.echo(profile.to_json())
        profiles.append(profile)
    return profiles


def _collect(measured: Iterable[TileProfile], edges: Sequence[int], console: Console) -> list[TileProfile]:
    """Collect all profiles; on a terminal show progress and then a table, elsewhere a line for each."""
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    profiles = []
    with Progress(*columns, console=console, disable=not console.is_terminal, transient=True) as progress:
        task = progress.add_task(f"tile {edges[0]}", total=len(edges))
        for profile, following in zip(measured, [*edges[1:], edges[-1]], strict=True):
            profiles.append(profile)
            progress.update(task, advance=1, description=f"tile {following}")
            if not console.is_terminal:
                console.print(as_text(profile_line(profile)), soft_wrap=True, highlight=False)
    if console.is_terminal:
        print_table(profiles, console)
    return profiles


def print_table(profiles: Sequence[TileProfile], console: Console) -> None:
    """Print a table, or a line for each tile size where the terminal is too narrow for one."""
    table = profile_table(profiles)
    if fits(table, console):
        console.print(table)
        return
    for profile in profiles:
        console.print(as_text(profile_line(profile)), highlight=False)


def profile_line(profile: TileProfile) -> str:
    """The profile of one tile size as a line for the terminal."""
    from streamcnn.profiling.page import cells

    tile, projected, measured, seconds, recomputation, moved, verdict = cells(profile)
    return (
        f"tile {tile}: {verdict}, measured {measured}, projected {projected}, {seconds}, "
        f"recomputation {recomputation}, moved {moved}"
    )


def profile_table(profiles: Sequence[TileProfile]) -> Table:
    """The profiles of all tile sizes as a table, a row each."""
    from streamcnn.profiling.page import COLUMNS, cells

    table = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for column in COLUMNS:
        table.add_column(column, justify="right", no_wrap=True)
    for profile in profiles:
        table.add_row(*map(as_text, cells(profile)), style="" if profile.refusal is None else "dim")
    return table
