"""Commands about classifiers of images: ``train``, ``evaluate`` and ``predict``."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from streamcnn.cli.arguments import (
    ChannelsLast,
    Json,
    Level,
    Model,
    Series,
    Tile,
    choice_of,
    exit_for_wrong_usage,
    parse,
    parse_extent,
)
from streamcnn.cli.ending import say_ending, status_of
from streamcnn.errors import StreamError
from streamcnn.support.text import as_text, printable
from streamcnn.support.units import parse_bytes

if TYPE_CHECKING:
    from torch import Tensor

    from streamcnn.data.sources import ImageChoice, ImageSource
    from streamcnn.training import Score, TrainedRun

Data = Annotated[str, typer.Argument(metavar="DATA", help="Tile store, CSV file or folder of classes.")]
Run = Annotated[Path, typer.Argument(metavar="RUN", help="Folder that train wrote.")]
Budget = Annotated[str | None, typer.Option(help="Memory ceiling, such as 11GB or 8GiB.")]
Inputs = Annotated[
    str | None,
    typer.Option(
        metavar="NAME,...", help="Columns of numbers in the CSV file for the model, besides the image."
    ),
]
Trust = Annotated[
    list[str] | None,
    typer.Option(
        metavar="MODULE:FACTORY",
        help="A factory that may be called where the run's file names it; may be given several times.",
    ),
]
KeyValues = Annotated[list[str] | None, typer.Option(metavar="KEY=VALUE", help="May be given several times.")]


def train(
    model: Model,
    data: Data,
    out: Annotated[Path, typer.Option(help="Folder of the run; one that is there is gone on with.")],
    budget: Budget = None,
    tile: Tile = None,
    device: Annotated[str, typer.Option(help="cpu, or cuda.")] = "cpu",
    model_option: KeyValues = None,
    inputs: Inputs = None,
    series: Series = None,
    level: Level = None,
    channels_last: ChannelsLast = None,
    split: Annotated[str, typer.Option(help="Images to train on.")] = "train",
    validation_split: Annotated[
        str | None, typer.Option(help="Images to choose the best weights by; default: a share of the former.")
    ] = None,
    validation_share: Annotated[float, typer.Option(help="That share.")] = 0.1,
    mean: Annotated[float, typer.Option(help="Taken from pixels of 0 to 1.")] = 0.5,
    std: Annotated[float, typer.Option(help="By which they are divided then.")] = 0.5,
    mirrors: Annotated[bool, typer.Option("--mirrors", help="Mirror half of the images.")] = False,
    turns: Annotated[bool, typer.Option("--turns", help="Turn images by quarters.")] = False,
    inversion: Annotated[float, typer.Option(help="Share of images that are inverted.")] = 0.0,
    epochs: Annotated[int, typer.Option(help="Most passes over the images.")] = 10,
    batch: Annotated[int, typer.Option(help="Images of a forward pass.")] = 1,
    accumulate: Annotated[int, typer.Option(help="Forward passes of an update.")] = 1,
    optimizer: Annotated[str, typer.Option(help="A class of torch.optim.")] = "Adam",
    learning_rate: Annotated[float, typer.Option(help="Of the optimiser.")] = 1e-3,
    optimizer_option: KeyValues = None,
    schedule: Annotated[str | None, typer.Option(help="A class of torch.optim.lr_scheduler.")] = None,
    schedule_option: KeyValues = None,
    schedule_every: Annotated[str, typer.Option(help="epoch or update.")] = "epoch",
    clip_norm: Annotated[float | None, typer.Option(help="Largest norm of all gradients.")] = None,
    ema_decay: Annotated[float | None, typer.Option(help="Average the weights with this decay.")] = None,
    autocast: Annotated[str | None, typer.Option(help="bfloat16 or float16.")] = None,
    balanced: Annotated[bool, typer.Option("--balanced", help="As many images of each label.")] = False,
    patience: Annotated[int | None, typer.Option(help="Epochs without a gain to end after.")] = None,
    save_every: Annotated[int, typer.Option(help="Updates between checkpoints.")] = 100,
    seed: Annotated[int, typer.Option(help="Of weights, order and augmentations.")] = 0,
    tensorboard: Annotated[bool, typer.Option("--tensorboard", help="Write events too.")] = False,
) -> None:
    """Train a classifier on whole images; the same command goes on with a run that was interrupted.

    At SIGINT (Ctrl-C), SIGTERM or SIGHUP it saves its state and ends with exit status 130, 143 or 129; at a
    second one it ends at once.
    """
    budget_bytes = parse("--budget", parse_bytes, budget)
    tile_extent = None if tile is None else parse("--tile", parse_extent, tile)
    options = {
        name: parse(f"--{name.replace('_', '-')}", parse_key_values, given)
        for name, given in (
            ("model_option", model_option),
            ("optimizer_option", optimizer_option),
            ("schedule_option", schedule_option),
        )
    }
    from streamcnn.cli.training_progress import TrainingProgress
    from streamcnn.data.augmentation import RandomAugmentation
    from streamcnn.data.normalisation import Normalise
    from streamcnn.data.sources.places import local_path
    from streamcnn.support.extras import require
    from streamcnn.training import (
        RunConfig,
        StoppedAtOnce,
        Terminated,
        TrainSettings,
        make_trainer,
        write_report,
    )

    require("matplotlib.figure", extra="plots")  # now rather than after the run

    try:
        settings = TrainSettings(
            epochs=epochs,
            batch_size=batch,
            accumulate=accumulate,
            optimizer=optimizer,
            learning_rate=learning_rate,
            optimizer_options=options["optimizer_option"],
            schedule=schedule,
            schedule_options=options["schedule_option"],
            schedule_every=schedule_every,
            clip_norm=clip_norm,
            ema_decay=ema_decay,
            autocast=autocast,
            balanced=balanced,
            patience=patience,
            save_every=save_every,
            seed=seed,
        )
        config = RunConfig(
            model=model,
            model_options=options["model_option"],
            data=str(local_path(data).resolve()),
            inputs=parse_names(inputs),
            choice=choice_of(series, level, channels_last),
            split=split,
            validation_split=validation_split,
            validation_share=validation_share,
            budget=budget_bytes,
            tile=tile_extent,
            device=device,
            normalise=Normalise(mean, std),
            augmentation=RandomAugmentation(mirrors=mirrors, turns=turns, inversion=inversion),
            settings=settings,
        )
        trainer = make_trainer(config, out, events=tensorboard)
    except StreamError:
        raise  # what is on the disk is at fault, not the command
    except ValueError as error:
        exit_for_wrong_usage(str(error))
    console = Console()
    trainer.on_end = _say_that_it_saves
    try:
        with TrainingProgress(trainer, budget_bytes, console):
            result = trainer.run()
    except (Terminated, StoppedAtOnce) as ended:
        say_ending(ended.signal, f"{ended}; the same command goes on")
        raise typer.Exit(status_of(ended.signal)) from None
    best = (
        f"{result.num_updates} updates in {result.num_epochs} epochs; best validation accuracy "
        f"{result.best_accuracy:.1%}: {result.best}"
    )
    for line in (best, f"page: {write_report(out)}"):
        console.print(as_text(line), soft_wrap=True, highlight=False)


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
    trained = _load(run, budget, trust)
    columns = _columns(trained, inputs)
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
    trained = _load(run, budget, trust)
    columns = _columns(trained, inputs)
    choice = choice_of(series, level, channels_last, otherwise=trained.choice)
    import torch

    from streamcnn.training.evaluation import require_finite
    from streamcnn.training.naming import naming

    for at, (path, source, *further) in enumerate(_open_images(images, columns, choice)):
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


def parse_key_values(texts: list[str] | None) -> dict[str, Any]:
    """``["lr=0.1", "nesterov=true"]`` as values by name; a value that is no JSON is text.

    Raises
    ------
    ValueError
        If one is not of that form, or a name comes twice.
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


def parse_names(text: str | None) -> tuple[str, ...]:
    """``"age,sex"`` as names of columns."""
    return tuple(name.strip() for name in text.split(",")) if text else ()


def _columns(trained: TrainedRun, given: str | None) -> tuple[str, ...]:
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


def _open_images(
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


def _say_that_it_saves(reason: str, number: int | None) -> None:
    say_ending(number, f"{reason}: saving after the present update; once more stops at once")


def _load(run: Path, budget: str | None, trust: list[str] | None) -> TrainedRun:
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
