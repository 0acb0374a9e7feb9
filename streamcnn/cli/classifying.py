"""The output of ``evaluate`` and ``predict`` for a classifier."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from streamcnn.cli.arguments import exit_for_wrong_usage
from streamcnn.support.text import printable
from streamcnn.support.units import plural

if TYPE_CHECKING:
    from torch import Tensor

    from streamcnn.cli.segmenting import MapOptions
    from streamcnn.data.dataset import ImageDataset
    from streamcnn.data.sources import ImageChoice, ImageSource
    from streamcnn.training import Score, Task, TrainedRun
    from streamcnn.training.processes import Processes


def print_score(
    trained: TrainedRun,
    task: Task[Any],
    images: ImageDataset,
    processes: Processes,
    *,
    batch: int,
    as_json: bool,
) -> None:
    """Print loss, accuracy and the misclassified images."""
    from streamcnn.training import score
    from streamcnn.training.batch_sizes import require_one_size_in_order

    with processes.agreeing():
        images.renumber(trained.classes)
        require_one_size_in_order(images, batch, advice="take one at a time, with --batch 1")
    device = trained.config.device
    found = score(trained.model, images, batch_size=batch, each=processes.divided, device=device)
    if not processes.is_first:
        return
    if as_json:
        mistakes = {
            images.names[at]: prediction
            for at, prediction in enumerate(found.predictions)
            if prediction != images.labels[at]
        }
        fields = {"loss": found.loss, "accuracy": found.accuracy, "confusion": found.confusion}
        typer.echo(json.dumps({**fields, "num_images": len(images), "mistakes": mistakes}))
    else:
        _print(found, len(images), images.classes)


def predict(
    trained: TrainedRun,
    images: list[Path],
    columns: tuple[str, ...],
    choice: ImageChoice,
    maps: MapOptions,
    processes: Processes,
    *,
    other_pixels: bool,
    as_json: bool,
) -> None:
    """Print the class of each of this process's images, and its probability."""
    with processes.agreeing():
        if maps.given:
            exit_for_wrong_usage(
                f"{', '.join(maps.given)}: the run is of a classifier, whose answers are printed: leave it "
                "out"
            )
        for at, (path, source, *further) in processes.dealt(enumerate(open_images(images, columns, choice))):
            if not other_pixels:
                trained.require_as_trained(source, str(path))
            _print_class(trained, at, path, source, further, as_json=as_json)


def _print_class(
    trained: TrainedRun, at: int, path: Path, source: ImageSource, further: list[Tensor], *, as_json: bool
) -> None:
    """Print the class of the image at a position, and its probability."""
    import torch

    from streamcnn.training.evaluation import require_finite_logits
    from streamcnn.training.naming import naming

    with torch.no_grad(), naming("prediction", [at], [str(path)]):
        logits = trained.model([source], *(each[None].to(trained.config.device) for each in further))
    require_finite_logits(logits, [at], [str(path)])
    probability, label = logits[0].double().softmax(0).max(0)
    name = trained.class_name(int(label))
    if as_json:
        fields = {"image": str(path), "label": int(label), "class": name}
        typer.echo(json.dumps({**fields, "probability": float(probability)}))
    else:
        typer.echo(printable(f"{path}: {name}, {float(probability):.1%}"))


def open_images(
    paths: list[Path], columns: tuple[str, ...], choice: ImageChoice
) -> Iterator[tuple[Path, ImageSource, *tuple[Tensor, ...]]]:
    """Open images: those that tables name, with their inputs, and others without inputs."""
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


def _print(found: Score, num_images: int, classes: tuple[str, ...] | None) -> None:
    """Print the score as text, with the accuracy of each class that has images."""
    typer.echo(f"accuracy {found.accuracy:.1%} of {plural(num_images, 'image')}, loss {found.loss:.4g}")
    for label, row in enumerate(found.confusion):
        if sum(row):
            name = str(label) if classes is None else classes[label]
            typer.echo(printable(f"  {name}: {row[label]} of {sum(row)}"))
