"""Shared by the commands: arguments, parsers of their text, and the end of a command on wrong usage."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any, NoReturn, TypeVar

import typer

from streamcnn.support.text import printable

if TYPE_CHECKING:
    from torch import nn

    from streamcnn.data.sources import ImageChoice

Given = TypeVar("Given")
T = TypeVar("T")

FAILED = 1
WRONG_USAGE = 2

Model = Annotated[str, typer.Argument(metavar="MODEL", help="A timm name, or package.module:factory.")]
Size = Annotated[str, typer.Option(help="Height and width of the image in pixels: 4000 or 4000x3000.")]
Batch = Annotated[int, typer.Option(min=1, help="Images per update.")]
Channels = Annotated[int, typer.Option(min=1, help="Channels of the image.")]
Tile = Annotated[
    str | None, typer.Option(help="Tile in input pixels: 512 or 512x256; default: the planner's.")
]
Series = Annotated[
    int | None,
    typer.Option(
        min=0, help="Which image of files that hold several; default: the largest that is no label or macro."
    ),
]
Level = Annotated[
    int | None, typer.Option(min=0, help="Resolution to take from a pyramid; 0, the default, is full.")
]
ChannelsLast = Annotated[
    bool | None,
    typer.Option(
        "--channels-last/--channels-first",
        help="Which of three axes the channels are, if nothing says it.",
    ),
]
Budget = Annotated[str | None, typer.Option(help="Memory ceiling, such as 11GB or 8GiB.")]
Device = Annotated[str | None, typer.Option(help="cpu, or cuda; default: the run's.")]
Inputs = Annotated[
    str | None,
    typer.Option(
        metavar="NAME,...", help="Columns of numbers in the CSV file for the model, besides the image."
    ),
]
OtherPixels = Annotated[
    bool,
    typer.Option(
        "--other-pixels",
        help="Take images with other channels, or pixels of another type or range, than those of training.",
    ),
]
Masks = Annotated[
    str | None, typer.Option(help="Folder with a mask for each image, if DATA is a folder of images.")
]
EmptyMasks = Annotated[
    bool,
    typer.Option("--empty-masks", help="Masks in zarr without any chunk hold their fill value alone."),
]
KeyValues = Annotated[list[str] | None, typer.Option(metavar="KEY=VALUE", help="May be given several times.")]
ModelOption = Annotated[
    list[str] | None,
    typer.Option(
        metavar="KEY=VALUE", help="An argument of the factory, or of timm's model; may be repeated."
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object instead of text.")]


def parse_extent(text: str) -> tuple[int, int]:
    """``"4000"`` or ``"4000x3000"`` as height and width in pixels.

    Raises
    ------
    ValueError
        If the text has another form, or a number in it is zero.
    """
    match = re.fullmatch(r"([0-9]+)(?:x([0-9]+))?", text.strip())
    height, width = (int(match[1]), int(match[2] or match[1])) if match else (0, 0)
    if height == 0 or width == 0:
        raise ValueError(
            f"cannot read {text!r} as pixels: allowed is one positive number, or height x width; "
            "for example 4000 or 4000x3000"
        )
    return height, width


def parse_names(text: str | None) -> tuple[str, ...]:
    """``"age,sex"`` as a tuple of names, such as those of columns."""
    return tuple(name.strip() for name in text.split(",")) if text else ()


def parse_numbers(text: str | None) -> tuple[float, ...] | None:
    """``"1,2.5"`` as a tuple of numbers.

    Raises
    ------
    ValueError
        If a part is not a number.
    """
    if text is None:
        return None
    try:
        return tuple(float(number) for number in text.split(","))
    except ValueError:
        raise ValueError(f"cannot read {text!r} as numbers: allowed is such as 1,2.5,2.5") from None


def parse_key_values(texts: Sequence[str] | None) -> dict[str, Any]:
    """``["lr=0.1", "nesterov=true"]`` as values by name; a value that is not JSON is a string.

    Raises
    ------
    ValueError
        If a text does not have this form, or a name occurs twice.
    """
    found: dict[str, Any] = {}
    for text in texts or ():
        name, equals, value = text.partition("=")
        if not (name.isidentifier() and equals):
            raise ValueError(f"cannot read {text!r}: allowed is KEY=VALUE, such as momentum=0.9")
        if name in found:
            raise ValueError(f"{name} is given twice: give it once")
        try:
            found[name] = json.loads(value)
        except json.JSONDecodeError:
            found[name] = value
        except RecursionError:
            raise ValueError(f"{name} is nested too deeply: allowed are plain values") from None
    return found


def choice_of(
    series: int | None, level: int | None, channels_last: bool | None, *, otherwise: ImageChoice | None = None
) -> ImageChoice:
    """The choice that the options make; options not given are as in ``otherwise``, or the defaults."""
    from streamcnn.data.sources import DEFAULT_CHOICE, ImageChoice

    before = otherwise or DEFAULT_CHOICE
    return ImageChoice(
        before.series if series is None else series,
        before.level if level is None else level,
        before.channels_last if channels_last is None else channels_last,
    )


def parse(option: str, reader: Callable[[Given], T], given: Given) -> T:
    """The value of an option, read by ``reader``; wrong text ends the command as wrong usage."""
    try:
        return reader(given)
    except ValueError as error:
        exit_for_wrong_usage(f"{option}: {error}")


def load(
    name: str, options: Mapping[str, Any] | None = None, *, num_channels: int | None = None
) -> nn.Module:
    """Load the model of that name; a wrong name or unknown options end the command as wrong usage.

    A timm model is made for images of ``num_channels`` channels, if given, as for training.
    """
    from streamcnn.support.models import is_factory, load_model

    channels = {} if num_channels is None or is_factory(name) else {"in_chans": num_channels}
    try:
        return load_model(name, **{**channels, **(options or {})})
    except ValueError as error:
        exit_for_wrong_usage(f"MODEL: {error}")


def exit_for_wrong_usage(message: str) -> NoReturn:
    """End the command with a line on standard error, and exit status 2."""
    typer.echo(printable(f"streamcnn: error: {message}", keep="\n"), err=True)
    raise typer.Exit(WRONG_USAGE)
