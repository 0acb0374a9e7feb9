"""Commands about models: ``plan`` and ``verify``."""

from __future__ import annotations

import json
from enum import StrEnum
from typing import Annotated

import typer

from streamcnn.cli.arguments import (
    FAILED,
    Batch,
    Channels,
    Json,
    Model,
    Size,
    Tile,
    load,
    parse,
    parse_extent,
)
from streamcnn.text import printable
from streamcnn.units import parse_bytes


class Optimizer(StrEnum):
    """Optimisers by what they keep for each parameter."""

    sgd = "sgd"
    momentum = "momentum"
    adam = "adam"

    @property
    def copies(self) -> int:
        """Numbers kept for each parameter."""
        return {"sgd": 0, "momentum": 1, "adam": 2}[self.value]


def plan(
    model: Model,
    size: Size = "4000",
    batch: Batch = 1,
    channels: Channels = 3,
    budget: Annotated[str | None, typer.Option(help="Memory ceiling, such as 11GB or 8GiB.")] = None,
    tile: Tile = None,
    card: Annotated[
        bool, typer.Option("--card", help="Plan for a CUDA card, which need not be here, with nominal rates.")
    ] = False,
    host_memory: Annotated[
        str, typer.Option(help="With --card: host RAM for maps that the card has no room for.")
    ] = "16GiB",
    optimizer: Annotated[
        Optimizer, typer.Option(help="With --card: what holds state on it beside the weights.")
    ] = Optimizer.adam,
    as_json: Json = False,
) -> None:
    """Print how an image would be streamed and what that is projected to hold; runs nothing."""
    budget_bytes = parse("--budget", parse_bytes, budget)
    host_bytes = parse("--host-memory", parse_bytes, host_memory)
    shape = (batch, channels, *parse("--size", parse_extent, size))
    tile_extent = None if tile is None else parse("--tile", parse_extent, tile)
    net = load(model)
    from streamcnn import StreamingModel
    from streamcnn.planning import Machine

    streamed = StreamingModel(net, budget=budget_bytes, tile=tile_extent)
    if card:
        machine = Machine.card(net, host_bytes=host_bytes or 0, optimizer_copies=optimizer.copies)
        planned = streamed.plan_for(machine, shape)
    else:
        planned = streamed.plan(shape)
    typer.echo(planned.to_json() if as_json else printable(planned.explain(), keep="\n"))


def verify(
    model: Model,
    size: Size = "320x288",
    batch: Batch = 2,
    channels: Channels = 3,
    tile: Tile = "96",
    tolerance: Annotated[float, typer.Option(min=0, help="Largest relative error that passes.")] = 1e-6,
    as_json: Json = False,
) -> None:
    """Compare a streamed update with plain PyTorch's; exit status 1 beyond the tolerance."""
    shape = (batch, channels, *parse("--size", parse_extent, size))
    tile_extent = None if tile is None else parse("--tile", parse_extent, tile)
    net = load(model)
    import streamcnn

    report = streamcnn.verify(net, shape, tile=tile_extent)
    if as_json:
        typer.echo(json.dumps({"max_error": report.max_error, "errors": report.errors}))
    else:
        typer.echo(printable(report.explain(), keep="\n"))
    if not report.max_error <= tolerance:  # so that NaN fails
        typer.echo(f"streamcnn: error {report.max_error:.1e} is beyond {tolerance:.1e}", err=True)
        raise typer.Exit(FAILED)
