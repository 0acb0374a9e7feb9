"""Commands about trained models: ``evaluate`` and ``predict``."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Annotated, Any

import typer

from streamcnn.cli import classifying, segmenting
from streamcnn.cli.arguments import (
    Budget,
    ChannelsLast,
    Device,
    EmptyMasks,
    Inputs,
    Json,
    Level,
    Masks,
    OtherPixels,
    Series,
    choice_of,
    exit_for_wrong_usage,
    parse,
    parse_names,
)
from streamcnn.cli.option_groups import with_option_groups
from streamcnn.cli.processes import joined
from streamcnn.cli.segmenting import MapOptions
from streamcnn.support.units import parse_bytes

if TYPE_CHECKING:
    from streamcnn.training import RunConfig, Task, TrainedRun

Run = Annotated[Path, typer.Argument(metavar="RUN", help="Folder that train wrote.")]
Trust = Annotated[
    list[str] | None,
    typer.Option(
        metavar="MODULE:FACTORY",
        help="A factory that may be called where the run's file names it; may be given several times.",
    ),
]
_TASKS: dict[str, ModuleType] = {"classification": classifying, "segmentation": segmenting}
"""The module that prints scores and predictions, by task."""


def evaluate(
    run: Run,
    data: Annotated[str | None, typer.Option(help="Other images than the run's.")] = None,
    masks: Masks = None,
    empty_masks: EmptyMasks = False,
    inputs: Inputs = None,
    series: Series = None,
    level: Level = None,
    channels_last: ChannelsLast = None,
    split: Annotated[str, typer.Option(help="Images to evaluate.")] = "test",
    budget: Budget = None,
    device: Device = None,
    batch: Annotated[int, typer.Option(min=1, help="Images of a forward pass.")] = 1,
    trust: Trust = None,
    other_pixels: OtherPixels = False,
    as_json: Json = False,
) -> None:
    """Print how good a trained model is on images with labels or masks.

    Inputs are the columns that it was trained with, and images are read as they were then, unless told
    otherwise.

    Several processes divide the images:
    torchrun --nproc-per-node 4 -m streamcnn evaluate ...
    """
    with joined() as processes:
        with processes.agreeing():
            trained = load_trained(run, budget, device, trust)
            try:
                config = _with_data(trained.config, data, masks, empty_masks, columns_of(trained, inputs))
                task = config.make_task()
            except ValueError as error:
                exit_for_wrong_usage(str(error))
            images = _open_images(trained, task, config.data, split, series, level, channels_last)
            if not other_pixels:
                # All images are of one kind, or the data set would have been refused.
                trained.require_as_trained(images[0][0], f"{images.names[0]} in {config.data}")
        print_score = _TASKS[config.task].print_score
        print_score(trained, task, images, processes, batch=batch, as_json=as_json)


@with_option_groups
def predict(
    run: Run,
    images: Annotated[
        list[Path],
        typer.Argument(
            metavar="IMAGE",
            help="Images, folders of them, or CSV files that name images and their inputs.",
        ),
    ],
    maps: MapOptions,
    inputs: Inputs = None,
    series: Series = None,
    level: Level = None,
    channels_last: ChannelsLast = None,
    budget: Budget = None,
    device: Device = None,
    trust: Trust = None,
    other_pixels: OtherPixels = False,
    as_json: Json = False,
) -> None:
    """Print the class of each image and its probability, or write the map of its pixels' classes.

    A classifier that was trained with inputs finds them in a CSV file, in the columns that it was trained
    with unless others are named; labels are not needed. Images are read as in training, unless told
    otherwise.

    Several processes divide the images, each of which prints its lines as they come:
    torchrun --nproc-per-node 4 -m streamcnn predict ...
    """
    with joined() as processes:
        with processes.agreeing():
            trained = load_trained(run, budget, device, trust)
            columns = columns_of(trained, inputs)
            choice = choice_of(series, level, channels_last, otherwise=trained.choice)
        print_or_write = _TASKS[trained.config.task].predict
        print_or_write(
            trained, images, columns, choice, maps, processes, other_pixels=other_pixels, as_json=as_json
        )


def _with_data(
    config: RunConfig, data: str | None, masks: str | None, empty_masks: bool, columns: tuple[str, ...]
) -> RunConfig:
    """A run's config with other images, if given; its masks are dropped, as they belong to its own images."""
    folder = config.masks if data is None and masks is None else masks
    return replace(
        config,
        data=config.data if data is None else data,
        masks=folder,
        empty_masks=empty_masks or config.empty_masks,
        inputs=columns,
    )


def _open_images(
    trained: TrainedRun,
    task: Task[Any],
    data: str,
    split: str,
    series: int | None,
    level: int | None,
    channels_last: bool | None,
) -> Any:
    """The images to evaluate, read as in training unless told otherwise."""
    from streamcnn.data.tile_store import is_tile_store

    # The images of a tile store were read when it was written.
    as_trained = None if is_tile_store(data) else trained.choice
    choice = choice_of(series, level, channels_last, otherwise=as_trained)
    return task.open_images(data, split, choice=choice)


def columns_of(trained: TrainedRun, given: str | None) -> tuple[str, ...]:
    """The columns of a table that hold a trained classifier's inputs."""
    from streamcnn.data.label_table import check_inputs

    expected, columns = trained.config.inputs, parse_names(given)
    parse("--inputs", check_inputs, columns)
    if given is not None and len(columns) != len(expected):
        described = ",".join(expected) or "no inputs"
        exit_for_wrong_usage(
            f"--inputs: the classifier was trained with {described}: allowed are as many columns, in order"
        )
    return columns or expected


def load_trained(run: Path, budget: str | None, device: str | None, trust: list[str] | None) -> TrainedRun:
    """Load the model of a run; wrong text for budget or device ends the command as wrong usage."""
    budget_bytes = parse("--budget", parse_bytes, budget)
    from streamcnn.errors import StreamError
    from streamcnn.support.processes import take_own_gpu
    from streamcnn.training import load_run
    from streamcnn.training.runs import read_run

    try:
        take_own_gpu(read_run(run).device if device is None else device)
        return load_run(run, budget=budget_bytes, device=device, trust=trust or ())
    except StreamError:
        raise  # the files are at fault, not the command
    except ValueError as error:
        exit_for_wrong_usage(str(error))
