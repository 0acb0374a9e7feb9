"""The command ``verify``: what of a model is streamed, what stops the rest, and whether gradients agree."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer
from rich.box import HORIZONTALS
from rich.console import Console
from rich.table import Table
from rich.text import Text

from streamcnn.cli.arguments import (
    FAILED,
    Batch,
    Channels,
    Json,
    Model,
    ModelOption,
    Tile,
    load,
    parse,
    parse_extent,
    parse_key_values,
)
from streamcnn.support.text import as_text, printable
from streamcnn.support.units import format_bytes, plural

if TYPE_CHECKING:
    from streamcnn.runtime.obstacles import Obstacle, Streamability

COMPARED_EDGE = 512
"""Largest height and width of the image on which gradients are compared: plain PyTorch holds all of it."""
_PIPED_WIDTH = 120
"""Characters of a line if the output is not a terminal."""


def verify(
    model: Model,
    size: Annotated[
        str,
        typer.Option(
            help="Height and width in pixels: 4000 or 4000x3000; gradients are compared on 512 at most."
        ),
    ] = "320x288",
    batch: Batch = 2,
    channels: Channels = 3,
    tile: Tile = "96",
    model_option: ModelOption = None,
    tolerance: Annotated[float, typer.Option(min=0, help="Largest relative error that passes.")] = 1e-6,
    as_json: Json = False,
) -> None:
    """Say what of a model is streamed and what stops the rest, and compare gradients with plain PyTorch's.

    Exit status 1 if an error is beyond the tolerance, or the model cannot be streamed.
    """
    extent = parse("--size", parse_extent, size)
    tile_extent = None if tile is None else parse("--tile", parse_extent, tile)
    net = load(model, parse("--model-option", parse_key_values, model_option))
    import streamcnn
    from streamcnn.runtime.obstacles import streamability

    found = streamability(net, (batch, channels, *extent))
    if not as_json:
        _print_streamability(found)
    height, width = (min(edge, COMPARED_EDGE) for edge in extent)
    report = streamcnn.verify(net, (batch, channels, height, width), tile=tile_extent)
    agrees = report.max_error <= tolerance  # NaN does not pass
    if as_json:
        fields = {"max_error": report.max_error, "errors": report.errors, "agrees": agrees}
        typer.echo(json.dumps({**fields, "streamability": asdict(found)}))
    else:
        verdict = "gradients agree" if agrees else "gradients differ"
        typer.echo(f"{verdict} on {height}x{width} pixels, in float64")
        typer.echo(printable(report.explain(), keep="\n"))
    if not agrees:
        typer.echo(
            f"streamcnn: error: the largest relative error is {report.max_error:.1e}, and allowed is "
            f"{tolerance:.1e}; give a larger --tolerance if it is rounding, and else report the model",
            err=True,
        )
        raise typer.Exit(FAILED)


def _print_streamability(found: Streamability) -> None:
    """Print the verdict in the user's terms, with a table if something is not streamed."""
    batch, _, height, width = found.shape
    images = "an image" if batch == 1 else f"{batch} images"
    typer.echo(f"{images} of {height}x{width} pixels: {_summary(found)}")
    if found.obstacles:
        console = Console()
        if not console.is_terminal:
            console.width = _PIPED_WIDTH
        console.print(_table(found.obstacles))
        if found.num_following:
            typer.echo(
                f"{plural(found.num_following, 'more operator')} on whole values, which go on from these"
            )
    typer.echo(f"plain PyTorch would need {format_bytes(found.plain_bytes)} for a training update")


def _summary(found: Streamability) -> str:
    streamed = (
        f"{plural(found.num_streamed, 'operator')} {'is' if found.num_streamed == 1 else 'are'} streamed"
    )
    count = sum(each.count for each in found.obstacles)
    if not count:
        return f"{streamed}, and none needs a whole map"
    return f"{streamed}, {count} cannot be"


def _table(obstacles: tuple[Obstacle, ...]) -> Table:
    """A table with a row for each place where streaming stops."""
    table = Table(box=HORIZONTALS, show_lines=True, header_style="bold", border_style="dim")
    table.add_column("operator", no_wrap=True)
    table.add_column("where", ratio=3, overflow="fold")
    table.add_column("why, and what one usually does", ratio=4)
    table.add_column("whole maps", justify="right", no_wrap=True)
    for each in obstacles:
        times = f" x{each.count}" if each.count > 1 else ""
        where = as_text(each.module)
        if each.line:
            where = Text("\n").join([as_text(each.line), Text.assemble((printable(each.module), "dim"))])
        why = Text("\n").join([as_text(each.reason), Text.assemble((each.remedy, "green"))])
        operator = each.operator.removeprefix("aten.")
        table.add_row(as_text(f"{operator}{times}"), where, why, format_bytes(each.nbytes))
    return table
