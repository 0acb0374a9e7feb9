"""The command ``plan``."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from streamcnn.cli.arguments import (
    Batch,
    ChannelsLast,
    Json,
    Level,
    Model,
    ModelOption,
    Series,
    Tile,
    choice_of,
    exit_for_wrong_usage,
    load,
    parse,
    parse_extent,
    parse_key_values,
)
from streamcnn.support.text import printable
from streamcnn.support.units import parse_bytes

if TYPE_CHECKING:
    from streamcnn import StreamingModel
    from streamcnn.data.sources import ImageSource
    from streamcnn.plan.plan import Plan


class Task(StrEnum):
    """The task that the plan is for, which decides whether a loss is streamed."""

    classification = "classification"
    segmentation = "segmentation"


class Autocast(StrEnum):
    """The element types of autocast."""

    bfloat16 = "bfloat16"
    float16 = "float16"


class Optimizer(StrEnum):
    """Optimisers by the state that they keep for each parameter."""

    sgd = "sgd"
    momentum = "momentum"
    adam = "adam"

    @property
    def copies(self) -> int:
        """Number of values kept for each parameter."""
        return {"sgd": 0, "momentum": 1, "adam": 2}[self.value]


def plan(
    model: Model,
    size: Annotated[
        str | None, typer.Option(help="Height and width in pixels: 4000 or 4000x3000; default: 4000.")
    ] = None,
    batch: Batch = 1,
    channels: Annotated[int | None, typer.Option(min=1, help="Channels of the image; default: 3.")] = None,
    image: Annotated[
        Path | None,
        typer.Option(help="An image, for its size and channels, and for what reading it takes."),
    ] = None,
    series: Series = None,
    level: Level = None,
    channels_last: ChannelsLast = None,
    budget: Annotated[str | None, typer.Option(help="Memory ceiling, such as 11GB or 8GiB.")] = None,
    tile: Tile = None,
    autocast: Annotated[
        Autocast | None, typer.Option(help="The element type of autocast around the passes, if any.")
    ] = None,
    model_option: ModelOption = None,
    task: Annotated[
        Task, typer.Option(help="What it is trained for; the loss of a segmentation is streamed too.")
    ] = Task.classification,
    loss: Annotated[
        str | None, typer.Option(help="With --task segmentation: as of train; default: cross_entropy.")
    ] = None,
    key: Annotated[
        str | None, typer.Option(help="With --task segmentation: which of several results the scores are.")
    ] = None,
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
    """Print how an image would be streamed and what that is projected to hold; runs nothing.

    Of a file that is given, the head alone is read; it is planned for as train takes it. If no plan fits the
    budget, the nearest is printed, and the exit status is 1.
    """
    budget_bytes = parse("--budget", parse_bytes, budget)
    host_bytes = parse("--host-memory", parse_bytes, host_memory)
    extent = parse("--size", parse_extent, size or "4000")
    tile_extent = None if tile is None else parse("--tile", parse_extent, tile)
    options = parse("--model-option", parse_key_values, model_option)
    given = {"--size": size, "--channels": channels}
    chosen = {"--series": series, "--level": level, "--channels-last/--channels-first": channels_last}
    _refuse_beside_image(image, given, chosen)
    _refuse_beside_task(task, {"--loss": loss, "--key": key}, card=card)
    source = None
    if image is not None:
        from streamcnn.data.sources import open_chosen

        source = open_chosen(image, choice_of(series, level, channels_last))
    shape = (batch, channels or 3, *extent) if source is None else (batch, *source.shape)
    net = load(model, options, num_channels=None if source is None else shape[1])
    from streamcnn import StreamingModel
    from streamcnn.data.normalisation import Normalise

    streamed = StreamingModel(net, budget=budget_bytes, tile=tile_extent)
    if source is not None:
        streamed.preprocess = Normalise()
    with _casting(autocast):
        if card:
            from streamcnn.runtime.machines import cuda_card

            machine = cuda_card(net, host_bytes=host_bytes or 0, optimizer_copies=optimizer.copies)
            planned = streamed.plan_for(machine, shape)
        elif task is Task.segmentation:
            planned = _plan_segmentation(streamed, source, shape, loss, key)
        else:
            planned = streamed.plan(shape if source is None else [source] * batch)
    if source is not None and not as_json:
        typer.echo(printable(_file_line(source)))
    typer.echo(planned.to_json() if as_json else printable(planned.explain(), keep="\n"))
    planned.validate()


def _casting(autocast: Autocast | None) -> AbstractContextManager[object]:
    """Autocast for planning, which the model does on the CPU for every device."""
    import torch

    if autocast is None:
        return nullcontext()
    # A cached cast would keep the weights' copies.
    return torch.autocast("cpu", getattr(torch, autocast.value), cache_enabled=False)


def _plan_segmentation(
    streamed: StreamingModel,
    source: ImageSource | None,
    shape: tuple[int, int, int, int],
    loss: str | None,
    key: str | None,
) -> Plan:
    """The plan of a streamed loss; a mask, and an image if none is given, are stand-ins without memory."""
    import torch

    from streamcnn.data.sources import TensorSource
    from streamcnn.training import Segmentation, SegmentationLoss

    settings = parse("--loss", lambda name: SegmentationLoss(name=name), loss or "cross_entropy")
    nothing = torch.zeros(1, 1, 1)
    image = TensorSource(nothing.expand(shape[1:])) if source is None else source
    mask = TensorSource(nothing.byte().expand(1, *shape[2:]))
    return Segmentation(settings=settings, key=key).plan_of(streamed, image, mask, shape[0])


def _refuse_beside_task(task: Task, given: dict[str, Any], *, card: bool) -> None:
    """End the command if an option belongs to the other task, or cannot be combined with this one."""
    wrong = [name for name, value in given.items() if value is not None]
    if task is Task.segmentation and card:
        exit_for_wrong_usage("--card: plans no losses: leave it out, or leave --task out")
    if task is Task.classification and wrong:
        exit_for_wrong_usage(f"{', '.join(wrong)}: is of a segmentation: add --task segmentation")


def _refuse_beside_image(image: Path | None, given: dict[str, Any], chosen: dict[str, Any]) -> None:
    """End the command if options contradict each other: sizes with a file, or choices without one."""
    wrong = [name for name, value in (chosen if image is None else given).items() if value is not None]
    if wrong and image is None:
        exit_for_wrong_usage(f"{', '.join(wrong)}: chooses in a file: give it with --image, or leave it out")
    if wrong:
        exit_for_wrong_usage(f"{', '.join(wrong)}: {image} says it: leave it out, or leave --image out")


def _file_line(source: ImageSource) -> str:
    """A line on how the image that is planned for is stored."""
    channels, height, width = source.shape
    dtype = str(source.dtype).removeprefix("torch.")
    values = dtype if source.largest is None else f"{dtype} up to {source.largest}"
    return f"{source.name}: {channels} x {height} x {width} of {values}, stored as {source.pieces}"
