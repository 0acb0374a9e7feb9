"""Commands about trained models: ``evaluate`` and ``predict``."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Annotated

import typer

from streamcnn.cli import classifying, segmenting
from streamcnn.cli.arguments import (
    Budget,
    ChannelsLast,
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
from streamcnn.cli.segmenting import MapOptions
from streamcnn.support.units import parse_bytes

if TYPE_CHECKING:
    from streamcnn.training import TrainedRun

Run = Annotated[Path, typer.Argument(metavar="RUN", help="Folder that train wrote.")]
Trust = Annotated[
    list[str] | None,
    typer.Option(
        metavar="MODULE:FACTORY",
        help="A factory that may be called where the run's file names it; may be given several times.",
    ),
]
_TASKS: dict[str, ModuleType] = {"classification": classifying, "segmentation": segmenting}
"""What prints scores and predictions."""


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
    batch: Annotated[int, typer.Option(min=1, help="Images of a forward pass.")] = 1,
    trust: Trust = None,
    other_pixels: OtherPixels = False,
    as_json: Json = False,
) -> None:
    """Print how good a trained model is on images with labels or masks.

    Inputs are the columns that it was trained with, and images are read as they were then, unless told
    otherwise.
    """
    trained = load_trained(run, budget, trust)
    columns = columns_of(trained, inputs)
    from streamcnn.data.tile_store import is_tile_store

    config = trained.config
    where = config.data if data is None else data
    # The masks of the run belong to its images.
    folder = config.masks if data is None and masks is None else masks
    try:
        empty = empty_masks or config.empty_masks
        task = replace(config, data=where, masks=folder, empty_masks=empty, inputs=columns).make_task()
    except ValueError as error:
        exit_for_wrong_usage(str(error))
    # What is in a tile store was read when it was written.
    as_trained = None if is_tile_store(where) else trained.choice
    choice = choice_of(series, level, channels_last, otherwise=as_trained)
    images = task.open_images(where, split, choice=choice)
    if not other_pixels:
        # The others are of the same kind, or the data set were refused.
        trained.require_as_trained(images[0][0], f"{images.names[0]} in {where}")
    _TASKS[config.task].print_score(trained, task, images, batch=batch, as_json=as_json)


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
    trust: Trust = None,
    other_pixels: OtherPixels = False,
    as_json: Json = False,
) -> None:
    """Print the class of each image and its probability, or write the map of its pixels' classes.

    A classifier that was trained with inputs finds them in a CSV file, in the columns that it was trained
    with unless others are named; labels are not needed. Images are read as in training, unless told
    otherwise.
    """
    trained = load_trained(run, budget, trust)
    columns = columns_of(trained, inputs)
    choice = choice_of(series, level, channels_last, otherwise=trained.choice)
    print_or_write = _TASKS[trained.config.task].predict
    print_or_write(trained, images, columns, choice, maps, other_pixels=other_pixels, as_json=as_json)


def columns_of(trained: TrainedRun, given: str | None) -> tuple[str, ...]:
    """The columns of a table that a trained classifier's inputs are in."""
    from streamcnn.data.label_table import check_inputs

    expected, columns = trained.config.inputs, parse_names(given)
    parse("--inputs", check_inputs, columns)
    if given is not None and len(columns) != len(expected):
        described = ",".join(expected) or "no inputs"
        exit_for_wrong_usage(
            f"--inputs: the classifier was trained with {described}: allowed are as many columns, in order"
        )
    return columns or expected


def load_trained(run: Path, budget: str | None, trust: list[str] | None) -> TrainedRun:
    """The model of a run; wrong text for a budget ends the command as wrong usage."""
    budget_bytes = parse("--budget", parse_bytes, budget)
    from streamcnn.training import load_run

    return load_run(run, budget=budget_bytes, trust=trust or ())
