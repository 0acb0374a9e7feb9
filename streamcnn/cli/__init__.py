"""The command line: parses arguments and prints results; everything is decided elsewhere.

Results go to standard output, errors to standard error. Exit status 0 is success, 1 a run that
failed, 2 wrong usage. PyTorch is imported by the commands that need it, so that ``--help`` and
wrong usage answer at once.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NoReturn, TypeVar

import typer
from rich.console import Console

from streamcnn.errors import StreamError
from streamcnn.units import parse_bytes

if TYPE_CHECKING:
    from torch import nn

T = TypeVar("T")

FAILED = 1
WRONG_USAGE = 2

app = typer.Typer(
    help="Train any CNN on whole, very large images under a memory ceiling.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

Model = Annotated[str, typer.Argument(metavar="MODEL", help="A timm name, or package.module:factory.")]
Size = Annotated[str, typer.Option(help="Height and width of the image in pixels: 4000 or 4000x3000.")]
Batch = Annotated[int, typer.Option(min=1, help="Images per update.")]
Channels = Annotated[int, typer.Option(min=1, help="Channels of the image.")]
Tile = Annotated[
    str | None, typer.Option(help="Tile in input pixels: 512 or 512x256; default: the planner's.")
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object instead of text.")]


def main() -> NoReturn:
    """Run the command line and exit; errors that a user can act on are one line on standard error."""
    try:
        app()
    except StreamError as error:
        typer.echo(f"streamcnn: error: {error}", err=True)
        raise SystemExit(FAILED) from None
    raise SystemExit(0)


def _print_version(wanted: bool) -> None:
    if not wanted:
        return
    try:
        typer.echo(f"streamcnn {version('streamcnn')}")
    except PackageNotFoundError:
        typer.echo("streamcnn, run from its sources without being installed")
    raise typer.Exit


@app.callback()
def _options(
    _version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Options that come before the command."""


@app.command()
def demo(
    output: Annotated[Path, typer.Option(help="Folder for the images and the figure.")] = Path("demo-output"),
    size: Annotated[int, typer.Option(min=64, help="Height and width of the images in pixels.")] = 4000,
    images: Annotated[int, typer.Option(min=1, help="Number of images.")] = 4,
    epochs: Annotated[int, typer.Option(min=1, help="Passes over all images.")] = 10,
    budget: Annotated[str, typer.Option(help="Memory that an update may hold, such as 384MiB.")] = "384MiB",
    seed: Annotated[int, typer.Option(min=0, help="Of the images and the first weights.")] = 0,
) -> None:
    """Train a small CNN on large images until it knows them by heart; exit status 1 if it does not."""
    _parse("--budget", parse_bytes, budget)
    from streamcnn.demo import DemoSettings, run_demo

    settings = DemoSettings(
        size=size, num_images=images, epochs=epochs, budget=budget, seed=seed, output=output
    )
    if not run_demo(settings, Console()).overfitted:
        raise typer.Exit(FAILED)


@app.command()
def plan(
    model: Model,
    size: Size = "4000",
    batch: Batch = 1,
    channels: Channels = 3,
    budget: Annotated[str | None, typer.Option(help="Memory ceiling, such as 11GB or 8GiB.")] = None,
    tile: Tile = None,
    as_json: Json = False,
) -> None:
    """Print how an image would be streamed and what that is projected to hold; runs nothing."""
    budget_bytes = _parse("--budget", parse_bytes, budget)
    shape = (batch, channels, *_parse("--size", parse_extent, size))
    tile_extent = None if tile is None else _parse("--tile", parse_extent, tile)
    net = _load(model)
    from streamcnn import StreamingModel

    planned = StreamingModel(net, budget=budget_bytes, tile=tile_extent).plan(shape)
    typer.echo(planned.to_json() if as_json else planned.explain())


@app.command()
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
    shape = (batch, channels, *_parse("--size", parse_extent, size))
    tile_extent = None if tile is None else _parse("--tile", parse_extent, tile)
    net = _load(model)
    import streamcnn

    report = streamcnn.verify(net, shape, tile=tile_extent)
    if as_json:
        typer.echo(json.dumps({"max_error": report.max_error, "errors": report.errors}))
    else:
        typer.echo(report.explain())
    if not report.max_error <= tolerance:  # so that NaN fails
        typer.echo(f"streamcnn: error {report.max_error:.1e} is beyond {tolerance:.1e}", err=True)
        raise typer.Exit(FAILED)


@app.command()
def info(
    path: Annotated[Path, typer.Argument(metavar="PATH", help="Folder of a zarr array.")],
    as_json: Json = False,
) -> None:
    """Print the shape (C, H, W), pixel type and chunks of an image without reading its pixels."""
    from streamcnn.data.sources import ZarrSource

    source = ZarrSource(path)
    facts = {
        "shape": source.shape,
        "dtype": str(source.dtype).removeprefix("torch."),
        "chunks": source.chunks,
    }
    if as_json:
        typer.echo(json.dumps(facts))
        return
    for name, value in facts.items():
        typer.echo(f"{name:7} {value if isinstance(value, str) else ' x '.join(map(str, value))}")


def parse_extent(text: str) -> tuple[int, int]:
    """``"4000"`` or ``"4000x3000"`` as height and width in pixels.

    Raises
    ------
    ValueError
        If the text is neither, or a number in it is zero.
    """
    match = re.fullmatch(r"([0-9]+)(?:x([0-9]+))?", text.strip())
    height, width = (int(match[1]), int(match[2] or match[1])) if match else (0, 0)
    if height == 0 or width == 0:
        raise ValueError(
            f"cannot read {text!r} as pixels: allowed is one positive number, or height x width; "
            "for example 4000 or 4000x3000"
        )
    return height, width


def _parse(option: str, parse: Callable[[str], T] | Callable[[str | None], T], text: str | None) -> T:
    """The value of an option; wrong text ends the command as wrong usage."""
    try:
        return parse(text)  # type: ignore[arg-type]
    except ValueError as error:
        _exit_for_wrong_usage(f"{option}: {error}")


def _load(name: str) -> nn.Module:
    """The model of that name; a wrong name ends the command as wrong usage."""
    from streamcnn.models import load_model

    try:
        return load_model(name)
    except ValueError as error:
        _exit_for_wrong_usage(f"MODEL: {error}")


def _exit_for_wrong_usage(message: str) -> NoReturn:
    typer.echo(f"streamcnn: error: {message}", err=True)
    raise typer.Exit(WRONG_USAGE)
