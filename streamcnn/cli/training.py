"""Commands about classifiers of images: ``train``, ``evaluate`` and ``predict``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from streamcnn.cli.arguments import Json, Model, Tile, exit_for_wrong_usage, parse, parse_extent
from streamcnn.errors import StreamError
from streamcnn.units import parse_bytes

if TYPE_CHECKING:
    from streamcnn.training import Score, TrainedRun

TERMINATED = 75
"""Exit status of a run that SIGTERM ended: the same command goes on with it."""

Data = Annotated[str, typer.Argument(metavar="DATA", help="Tile store, CSV file or folder of classes.")]
Run = Annotated[Path, typer.Argument(metavar="RUN", help="Folder that train wrote.")]
Budget = Annotated[str | None, typer.Option(help="Memory ceiling, such as 11GB or 8GiB.")]
KeyValues = Annotated[list[str] | None, typer.Option(metavar="KEY=VALUE", help="May be given several times.")]


def train(
    model: Model,
    data: Data,
    out: Annotated[Path, typer.Option(help="Folder of the run; one that is there is gone on with.")],
    budget: Budget = None,
    tile: Tile = None,
    device: Annotated[str, typer.Option(help="cpu, or cuda.")] = "cpu",
    model_option: KeyValues = None,
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

    Exit status 75 after SIGTERM, when the state is saved.
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
    from streamcnn.extras import require
    from streamcnn.training import RunConfig, Terminated, TrainSettings, make_trainer, write_report

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
            data=str(Path(data).resolve()),
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
    try:
        with TrainingProgress(trainer, budget_bytes, console):
            result = trainer.run()
    except Terminated as ended:
        typer.echo(f"streamcnn: {ended}; the same command goes on", err=True)
        raise typer.Exit(TERMINATED) from None
    console.print(
        f"{result.num_updates} updates in {result.num_epochs} epochs; best validation accuracy "
        f"{result.best_accuracy:.1%}: {result.best}",
        soft_wrap=True,
        highlight=False,
    )
    console.print(f"page: {write_report(out)}", soft_wrap=True, highlight=False)


def evaluate(
    run: Run,
    data: Annotated[str | None, typer.Option(help="Other images than the run's.")] = None,
    split: Annotated[str, typer.Option(help="Images to classify.")] = "test",
    budget: Budget = None,
    batch: Annotated[int, typer.Option(min=1, help="Images of a forward pass.")] = 1,
    as_json: Json = False,
) -> None:
    """Print how good a trained classifier is on labelled images."""
    trained = _load(run, budget)
    from streamcnn.data.file_dataset import open_dataset
    from streamcnn.training import score

    images = open_dataset(trained.config.data if data is None else data, split)
    images.renumber(trained.classes)
    found = score(trained.model, images, batch_size=batch)
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
    images: Annotated[list[Path], typer.Argument(metavar="IMAGE...", help="Images, or folders of them.")],
    budget: Budget = None,
    as_json: Json = False,
) -> None:
    """Print the class of each image and its probability."""
    trained = _load(run, budget)
    import torch

    from streamcnn.data.image_files import find_images
    from streamcnn.data.sources import open_image

    for image in find_images(images):
        with torch.no_grad():
            logits = trained.model([open_image(image.path)])
        probability, label = logits[0].double().softmax(0).max(0)
        name = str(int(label)) if trained.classes is None else trained.classes[int(label)]
        if as_json:
            fields = {"image": str(image.path), "label": int(label), "class": name}
            typer.echo(json.dumps({**fields, "probability": float(probability)}))
        else:
            typer.echo(f"{image.path}: {name}, {float(probability):.1%}")


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
    return found


def _load(run: Path, budget: str | None) -> TrainedRun:
    budget_bytes = parse("--budget", parse_bytes, budget)
    from streamcnn.training import load_run

    return load_run(run, budget=budget_bytes)


def _print_score(found: Score, num_images: int, classes: tuple[str, ...] | None) -> None:
    """The score as text, with the accuracy of each class that there are images of."""
    typer.echo(f"accuracy {found.accuracy:.1%} of {num_images} images, loss {found.loss:.4g}")
    for label, row in enumerate(found.confusion):
        if sum(row):
            name = str(label) if classes is None else classes[label]
            typer.echo(f"  {name}: {row[label]} of {sum(row)}")
