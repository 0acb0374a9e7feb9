"""Commands about trained classifiers: ``evaluate`` and ``predict``."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from streamcnn.cli.arguments import (
    Budget,
    ChannelsLast,
    Inputs,
    Json,
    Level,
    Series,
    choice_of,
    exit_for_wrong_usage,
    parse,
    parse_names,
)
from streamcnn.support.text import printable
from streamcnn.support.units import parse_bytes

if TYPE_CHECKING:
    from torch import Tensor

    from streamcnn.data.sources import ImageChoice, ImageSource
    from streamcnn.training import Score, TrainedRun

Run = Annotated[Path, typer.Argument(metavar="RUN", help="Folder that train wrote.")]
Trust = Annotated[
    list[str] | None,
    typer.Option(
        metavar="MODULE:FACTORY",
        help="A factory that may be called where the run's file names it; may be given several times.",
    ),
]


def evaluate(
    run: Run,
    data: Annotated[str | None, typer.Option(help="Other images than the run's.")] = None,
    inputs: Inputs = None,
    series: Series = None,
    level: Level = None,
    channels_last: ChannelsLast = None,
    split: Annotated[str, typer.Option(help="Images to classify.")] = "test",
    budget: Budget = None,
    batch: Annotated[int, typer.Option(min=1, help="Images of a forward pass.")] = 1,
    trust: Trust = None,
    as_json: Json = False,
) -> None:
    """Print how good a trained classifier is on labelled images.

    Inputs are the columns that it was trained with, and images are read as they were then, unless told
    otherwise.
    """
    trained = load_trained(run, budget, trust)
    columns = columns_of(trained, inputs)
    from streamcnn.data.file_dataset import open_dataset
    from streamcnn.data.tile_store import is_tile_store
    from streamcnn.training import score

    where = trained.config.data if data is None else data
    # What is in a tile store was read when it was written.
    as_trained = None if is_tile_store(where) else trained.choice
    choice = choice_of(series, level, channels_last, otherwise=as_trained)
    images = open_dataset(where, split, choice=choice, inputs=columns)
    images.renumber(trained.classes)
    found = score(trained.model, images, batch_size=batch, device=trained.config.device)
    if as_json:
        mistakes = {
            images.names[at]: prediction
            for at, prediction in enumerate(found.predictions)
            if prediction != images.labels[at]
        }
        fields = {"loss": found.loss, "accuracy": found.accuracy, "confusion": found.confusion}
        typer.echo(json.dumps({**fields, "num_images": len(images), "mistakes": mistakes}))
    else:
        _print_score(found, len(images), images.classes)


def predict(
    run: Run,
    images: Annotated[
        list[Path],
        typer.Argument(
            metavar="IMAGE...",
            help="Images, folders of them, or CSV files that name images and their inputs.",
        ),
    ],
    inputs: Inputs = None,
    series: Series = None,
    level: Level = None,
    channels_last: ChannelsLast = None,
    budget: Budget = None,
    trust: Trust = None,
    as_json: Json = False,
) -> None:
    """Print the class of each image and its probability.

    A classifier that was trained with inputs finds them in a CSV file, in the columns that it was trained
    with unless others are named; labels are not needed. Images are read as in training, unless told
    otherwise.
    """
    trained = load_trained(run, budget, trust)
    columns = columns_of(trained, inputs)
    choice = choice_of(series, level, channels_last, otherwise=trained.choice)
    import torch

    from streamcnn.training.evaluation import require_finite
    from streamcnn.training.naming import naming

    for at, (path, source, *further) in enumerate(open_images(images, columns, choice)):
        with torch.no_grad(), naming("prediction", [at], [str(path)]):
            logits = trained.model([source], *(each[None].to(trained.config.device) for each in further))
        require_finite(logits, [at], [str(path)])
        probability, label = logits[0].double().softmax(0).max(0)
        name = str(int(label)) if trained.classes is None else trained.classes[int(label)]
        if as_json:
            fields = {"image": str(path), "label": int(label), "class": name}
            typer.echo(json.dumps({**fields, "probability": float(probability)}))
        else:
            typer.echo(printable(f"{path}: {name}, {float(probability):.1%}"))


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


def open_images(
    paths: list[Path], columns: tuple[str, ...], choice: ImageChoice
) -> Iterator[tuple[Path, ImageSource, *tuple[Tensor, ...]]]:
    """The images that tables name, with their inputs, and the other images with none."""
    from streamcnn.data.file_dataset import open_table
    from streamcnn.data.image_files import find_images
    from streamcnn.data.sources import open_chosen

    tables = [path for path in paths if path.suffix.lower() == ".csv"]
    loose = [path for path in paths if path not in tables]
    if loose and columns:
        exit_for_wrong_usage(
            "IMAGE: the classifier takes inputs besides images: name images in a CSV file with the columns "
            f"image,{','.join(columns)}"
        )
    for table in tables:
        yield from open_table(table, columns, choice)
    for image in find_images(loose, choice.series) if loose else ():
        yield image.path, open_chosen(image.path, choice)


def load_trained(run: Path, budget: str | None, trust: list[str] | None) -> TrainedRun:
    """The classifier of a run; wrong text for a budget ends the command as wrong usage."""
    budget_bytes = parse("--budget", parse_bytes, budget)
    from streamcnn.training import load_run

    return load_run(run, budget=budget_bytes, trust=trust or ())


def _print_score(found: Score, num_images: int, classes: tuple[str, ...] | None) -> None:
    """The score as text, with the accuracy of each class that there are images of."""
    typer.echo(f"accuracy {found.accuracy:.1%} of {num_images} images, loss {found.loss:.4g}")
    for label, row in enumerate(found.confusion):
        if sum(row):
            name = str(label) if classes is None else classes[label]
            typer.echo(printable(f"  {name}: {row[label]} of {sum(row)}"))
