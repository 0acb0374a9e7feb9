"""All commands, and the messages of the errors and signals that end them."""

from __future__ import annotations

import logging
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from signal import Signals
from typing import Annotated, NoReturn

import typer
from rich.console import Console

from streamcnn.cli import explaining, images, models, profiling, trained, training, ultramnist, verifying
from streamcnn.cli.arguments import FAILED, parse
from streamcnn.cli.ending import leave_output, say_ending, status_of
from streamcnn.errors import OtherProcessFailed, StreamError
from streamcnn.support.disk import is_full
from streamcnn.support.signals import raising
from streamcnn.support.text import printable
from streamcnn.support.units import parse_bytes

app = typer.Typer(
    help="Train any CNN on whole, very large images under a memory ceiling.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


def run() -> NoReturn:
    """Run the command line and exit; an error that a user can act on is one line on standard error."""
    _make_logs_printable()
    if "" not in sys.path:
        # For factories in the present folder, searched after all installed packages.
        sys.path.append("")
    with _warnings_as_lines():
        try:
            _run_command()
        except OtherProcessFailed as error:
            if error.rank is None:
                _fail(str(error))
            _leave_to_other()
        except StreamError as error:
            _fail(str(error))
        except OSError as error:
            # Code that reads or writes files raises clearer errors; this leaves impossible paths, and the
            # output.
            advice = "make room there, or write elsewhere" if is_full(error) else "give another path"
            if error.filename is not None:
                _fail(f"cannot use {error.filename}: {error.strerror}: {advice}")
            if not is_full(error):
                raise
            leave_output()
            _fail(f"cannot write standard output: {error.strerror}: {advice}")
    raise SystemExit(0)


def _leave_to_other() -> NoReturn:
    """Wait for the process that failed, which says why; its launcher then ends all processes."""
    from streamcnn.support.processes import await_end

    await_end()
    raise SystemExit(FAILED) from None


def _run_command() -> None:
    """Run the command that the arguments name; a signal ends it with a line, and the shells' exit status."""
    signals: list[int] = []
    try:
        with raising(signals, importers=("streamcnn.cli", "streamcnn.support")):
            app()
    except BaseException:
        # Typer would raise another error, with one status for all signals.
        if not signals:
            raise
        say_ending(signals[0], f"ended by {Signals(signals[0]).name}")
        raise SystemExit(status_of(signals[0])) from None


class _Printable(logging.Formatter):
    """Formats libraries' log records about files, such as a TIFF's wrong tags, as safe printable text."""

    def format(self, record: logging.LogRecord) -> str:
        return printable(super().format(record), keep="\n")


def _make_logs_printable() -> None:
    """Make log records printable that have no other handler, and so go to standard error."""
    if logging.lastResort is not None:
        logging.lastResort.setFormatter(_Printable())


@contextmanager
def _warnings_as_lines() -> Iterator[None]:
    """Print each warning once, as a line, although data may be opened several times."""
    before, shown = warnings.formatwarning, set[str]()

    def format_once(
        message: Warning | str, category: type[Warning], filename: str, lineno: int, line: str | None = None
    ) -> str:
        text = _warning_line(message, category, filename, lineno, line)
        is_new = text not in shown
        shown.add(text)
        return text if is_new else ""

    warnings.formatwarning = format_once
    try:
        yield
    finally:
        warnings.formatwarning = before


def _warning_line(
    message: Warning | str, category: type[Warning], filename: str, lineno: int, line: str | None = None
) -> str:
    """A warning as a line; one from other packages' code has its place."""
    ours = Path(filename).is_relative_to(Path(__file__).parents[1])
    place = "" if ours else f" ({category.__name__}, {filename}, line {lineno})"
    return printable(f"streamcnn: warning: {message}{place}", keep="\n") + "\n"


def _fail(text: str) -> NoReturn:
    typer.echo(printable(f"streamcnn: error: {text}", keep="\n"), err=True)
    raise SystemExit(FAILED) from None


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
    epochs: Annotated[int, typer.Option(min=1, help="Passes over all images.")] = 8,
    budget: Annotated[str, typer.Option(help="Memory that an update may hold, such as 384MiB.")] = "384MiB",
    seed: Annotated[int, typer.Option(min=0, help="Of the images and the first weights.")] = 0,
) -> None:
    """Train a small CNN on large images until it knows them by heart; exit status 1 if it does not."""
    parse("--budget", parse_bytes, budget)
    from streamcnn.cli.overfitting import DemoSettings, run_demo

    settings = DemoSettings(
        size=size, num_images=images, epochs=epochs, budget=budget, seed=seed, output=output
    )
    if not run_demo(settings, Console()).overfitted:
        raise typer.Exit(FAILED)


app.command()(models.plan)
app.command()(verifying.verify)
app.command("profile")(profiling.profile)
app.command()(training.train)
app.command()(trained.evaluate)
app.command()(trained.predict)
app.command()(explaining.explain)
app.command()(explaining.view)
app.command()(images.info)
app.command()(images.convert)
app.add_typer(ultramnist.app, name="ultramnist")
