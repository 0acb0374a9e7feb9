"""The output of ``evaluate`` for a segmentation, and the maps that ``predict`` writes."""

from __future__ import annotations

import json
import math
import os
from collections import Counter
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from streamcnn.cli.arguments import exit_for_wrong_usage
from streamcnn.support.text import printable
from streamcnn.support.units import plural

if TYPE_CHECKING:
    from streamcnn.data.mask_dataset import MaskDataset
    from streamcnn.data.sources import ImageChoice, ImageSource
    from streamcnn.training import Segmentation, Segmented, TrainedRun
    from streamcnn.training.processes import Processes


class MapKind(StrEnum):
    """The kinds of maps that are written from a map of scores."""

    classes = "classes"
    softmax = "softmax"
    sigmoid = "sigmoid"
    values = "values"


class MapFormat(StrEnum):
    """The formats of written maps, by file ending."""

    zarr = "zarr"
    tif = "tif"


@dataclass(frozen=True, slots=True, kw_only=True)
class MapOptions:
    """Where and how the maps of a segmentation are written."""

    output: Annotated[
        Path | None, typer.Option(help="Of segmentation: folder for a map of each image, which is made.")
    ] = None
    map: Annotated[
        MapKind | None, typer.Option(help="Classes, which are the default, probabilities, or scores.")
    ] = None
    format: Annotated[MapFormat | None, typer.Option(help="OME-Zarr, which is the default, or BigTIFF.")] = (
        None
    )
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace maps that are there.")] = False

    @property
    def given(self) -> list[str]:
        """The options that are given, as on the command line."""
        return [f"--{name}" for name in self.__slots__ if getattr(self, name)]


def print_score(
    trained: TrainedRun,
    task: Segmentation,
    images: MaskDataset,
    processes: Processes,
    *,
    batch: int,
    as_json: bool,
) -> None:
    """Print loss, and IoU and Dice of the classes."""
    import torch

    from streamcnn.training.batch_sizes import require_one_size_in_order

    def check() -> None:
        require_one_size_in_order(images, batch, advice="take one at a time, with --batch 1")
        task.check(trained.model, {"evaluation": images}, lambda: None)

    processes.first(check)
    found = task.evaluate(
        trained.model,
        images,
        batch_size=batch,
        casting=nullcontext,
        each=processes.divided,
        device=torch.device(trained.config.device),
    )
    if not processes.is_first:
        return
    if as_json:
        score = found.score
        fields = {
            "loss": found.loss,
            "mean_iou": score.mean_iou,
            "mean_dice": score.mean_dice,
            "accuracy": score.accuracy,
            "iou": _numbers(score.iou.tolist()),
            "dice": _numbers(score.dice.tolist()),
            "num_images": len(images),
            "class_names": trained.classes,
        }
        typer.echo(json.dumps(fields))
    else:
        _print(found, len(images), trained.classes)


def _numbers(values: Sequence[float]) -> list[float | None]:
    """Scores as JSON numbers; null for classes in neither mask nor prediction."""
    return [None if math.isnan(value) else value for value in values]


def _print(found: Segmented, num_images: int, classes: Sequence[str] | None) -> None:
    """Print the scores as text, with those of each class that is in mask or prediction."""
    from streamcnn.training.class_names import class_lines

    score = found.score
    typer.echo(
        f"mean IoU {score.mean_iou:.1%}, mean Dice {score.mean_dice:.1%}, pixels found {score.accuracy:.1%} "
        f"of {plural(num_images, 'image')}, loss {found.loss:.4g}"
    )
    for line in class_lines(score, classes):
        typer.echo(line)


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
    """Write a map of each of this process's images, whole or not at all, and print its path."""
    from streamcnn.data.sources import open_chosen

    # All processes check before any writes.
    with processes.agreeing():
        if maps.output is None:
            exit_for_wrong_usage(
                "--output: the run is of a segmentation: give the folder that maps are written to"
            )
        ending = f".{(maps.format or MapFormat.zarr).value}"
        places = {maps.output / f"{name}{ending}": path for name, path in _named(images, choice).items()}
        _require_free(list(places), overwrite=maps.overwrite)
    with processes.agreeing():
        for at, (place, path) in processes.dealt(enumerate(places.items())):
            source = open_chosen(path, choice)
            if not other_pixels:
                trained.require_as_trained(source, str(path))
            _write_map(trained, at, source, path, place, maps)
            fields = {"image": str(path), "map": str(place), "class_names": trained.classes}
            typer.echo(json.dumps(fields) if as_json else printable(f"{path}: {place}"))


def _write_map(
    trained: TrainedRun, at: int, source: ImageSource, path: Path, place: Path, maps: MapOptions
) -> None:
    """Write the map of the image at position ``at``."""
    from streamcnn.training.naming import naming

    place.parent.mkdir(parents=True, exist_ok=True)
    with naming("prediction", [at], [str(path)]):
        trained.model.predict_to(
            source,
            place,
            output=(maps.map or MapKind.classes).value,
            key=trained.config.key,
            overwrite=maps.overwrite,
            class_names=trained.classes,
        )


def _named(paths: Sequence[Path], choice: ImageChoice) -> dict[str, Path]:
    """Images by the names of their maps, which are their paths below the given folder.

    Raises
    ------
    DatasetMismatch
        If two maps would have the same name.
    """
    from streamcnn.data.image_files import find_images
    from streamcnn.data.labelled_files import files_of_table
    from streamcnn.data.store_names import distinct_names
    from streamcnn.errors import DatasetMismatch, some

    tables = [path for path in paths if path.suffix.lower() == ".csv"]
    loose = [path for path in paths if path not in tables]
    found = [(each.relative, each.path) for each in (find_images(loose, choice.series) if loose else ())]
    for table in tables:
        found += [(each.name, each.path) for each in files_of_table(table, (), labelled=False)]
    names = distinct_names([relative for relative, _ in found], as_they_are=True)
    twice = [name for name, count in Counter(names).items() if count > 1]
    if twice:
        raise DatasetMismatch(f"several images would have the maps {some(twice)}: give them in turn")
    return dict(zip(names, (path for _, path in found), strict=True))


def _require_free(places: Sequence[Path], *, overwrite: bool) -> None:
    """Make sure, before anything is computed, that no map's path is taken, unless files are to be replaced.

    Raises
    ------
    CannotWrite
        If one is.
    """
    from streamcnn.errors import CannotWrite, some

    taken = [str(place) for place in places if os.path.lexists(place)]
    if taken and not overwrite:
        raise CannotWrite(
            f"cannot write {some(taken)}: there is something already; give another --output, or --overwrite"
        )
