"""Image files as a dataset: those that a table names, or those in folders of their classes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import final

import torch
from torch import Tensor

from streamcnn.data.augmentation import RandomAugmentation
from streamcnn.data.content import content_digest
from streamcnn.data.dataset import ImageDataset, TileDataset, no_split, will_need
from streamcnn.data.image_files import find_images
from streamcnn.data.label_table import class_names, label_number, read_rows
from streamcnn.data.sources import ImageSource, is_image, open_image
from streamcnn.data.tile_store import is_tile_store
from streamcnn.errors import DatasetMismatch, some

SPLITS = ("train", "val", "validation", "test")
"""Names of folders that are taken for splits if all that lie beside each other have one of them."""
UNSPLIT = "train"
"""The split of images of which nothing says one."""


@dataclass(frozen=True, slots=True)
class _LabelledFile:
    """An image file and what is known of it."""

    name: str
    path: Path
    label: str
    split: str
    inputs: tuple[float, ...] = ()


@final
class FileDataset(ImageDataset):
    """Image files with labels; each is opened when the model asks.

    Parameters
    ----------
    path
        A CSV file with the columns ``image`` (a path, taken from the table's folder if it is relative),
        ``label`` and, if wanted, ``split``; or a folder with a folder of images for each class, and above
        them, if wanted, one for each split (``train``, ``val`` or ``validation``, ``test``).
    split
        Which images; None takes all. Where nothing says a split, it is ``train``.
    positions
        Of the images to take among those; None takes all.
    augmentation, seed
        As for ``TileDataset``.
    inputs
        Columns of the table with numbers that go into the model: each sample then is ``(source, label,
        numbers)``, the last a float32 tensor (K,) in the order of these names, as the table has them.

    Raises
    ------
    DatasetMismatch
        If there are no such images, a label or an image is missing, or an input is missing or no number.
    CorruptImage
        If a folder holds no image.
    ValueError
        If ``inputs`` name a column twice, or one that is no input.
    """

    def __init__(
        self,
        path: str | Path,
        split: str | None = None,
        *,
        positions: Sequence[int] | None = None,
        augmentation: RandomAugmentation | None = None,
        seed: int = 0,
        inputs: Sequence[str] = (),
    ) -> None:
        self.path = Path(path)
        self.input_names = tuple(inputs)
        if self.path.is_dir():
            _refuse_inputs(self.path, inputs)
        every = _files_in_folders(self.path) if self.path.is_dir() else _files_of_table(self.path, inputs)
        classes = class_names(file.label for file in every)
        files = [file for file in every if split is None or file.split == split]
        if not files:
            raise no_split(self.path, split, (file.split for file in every))
        self._files = files if positions is None else [files[p] for p in positions]
        super().__init__(
            tuple(file.name for file in self._files),
            tuple(label_number(file.label, classes) for file in self._files),
            classes=classes,
            augmentation=augmentation,
            seed=seed,
        )

    def _open(self, position: int) -> ImageSource:
        return open_image(self._files[position].path)

    def inputs(self, position: int) -> tuple[Tensor, ...]:
        """The numbers of an image, (K,) in float32, if columns were named."""
        return _as_inputs(self._files[position].inputs)

    def _identities(self) -> Iterator[str]:
        for file, label in zip(self._files, self.labels, strict=True):
            identity = f"{file.name} {label} {content_digest(file.path)}"
            numbers = dict(zip(self.input_names, file.inputs, strict=True))
            yield f"{identity} {numbers}" if numbers else identity

    def prefetch(self, position: int) -> None:
        """Have the kernel read a file into its page cache; images that are folders are left alone."""
        path = self._files[position].path
        if path.is_file():
            will_need(path)


def open_dataset(
    path: str | Path,
    split: str | None = None,
    *,
    positions: Sequence[int] | None = None,
    augmentation: RandomAugmentation | None = None,
    seed: int = 0,
    inputs: Sequence[str] = (),
) -> ImageDataset:
    """The labelled images at ``path``: a tile store, a CSV file or folders of classes.

    Parameters and errors are those of `TileDataset` and `FileDataset`; only a CSV file has inputs.
    """
    if not is_tile_store(Path(path)):
        return FileDataset(
            path, split, positions=positions, augmentation=augmentation, seed=seed, inputs=inputs
        )
    _refuse_inputs(path, inputs)
    return TileDataset(path, split, positions=positions, augmentation=augmentation, seed=seed)


def open_table(
    path: str | Path, inputs: Sequence[str] = ()
) -> Iterator[tuple[Path, ImageSource, *tuple[Tensor, ...]]]:
    """The images that a table names, whether or not it has labels: paths, sources and further inputs.

    Parameters
    ----------
    path
        A CSV file with the column ``image``.
    inputs
        As for `FileDataset`.

    Raises
    ------
    DatasetMismatch, ValueError
        As for `FileDataset`, besides labels.
    """
    for file in _files_of_table(Path(path), inputs, labelled=False):
        yield file.path, open_image(file.path), *_as_inputs(file.inputs)


def _as_inputs(numbers: tuple[float, ...]) -> tuple[Tensor, ...]:
    """The numbers as one tensor (K,), or nothing where there are none."""
    return (torch.tensor(numbers, dtype=torch.float32),) if numbers else ()


def _refuse_inputs(path: str | Path, inputs: Sequence[str]) -> None:
    if inputs:
        raise DatasetMismatch(
            f"{path} has no columns to take inputs {some(inputs)} from: name images and inputs in a CSV file"
        )


def _files_of_table(path: Path, inputs: Sequence[str], *, labelled: bool = True) -> list[_LabelledFile]:
    """The images that a table names, in its order."""
    files = [
        _LabelledFile(row.image, path.parent / row.image, row.label, row.split or UNSPLIT, row.inputs)
        for row in read_rows(path, inputs, labelled=labelled)
    ]
    missing = [str(file.path) for file in files if not file.path.exists() or not is_image(file.path)]
    if missing:
        raise DatasetMismatch(
            f"{path} names {some(missing)}, where there is no image: give paths from the table's folder"
        )
    twice = [name for name, count in Counter(file.name for file in files).items() if count > 1]
    if twice:
        raise DatasetMismatch(f"{path} has {some(twice)} in several rows; keep one of each")
    if not files:
        raise DatasetMismatch(f"{path} has no rows: give one for each image")
    return files


def _files_in_folders(folder: Path) -> list[_LabelledFile]:
    """The images in folders of their classes, by name."""
    images = find_images([folder])
    parts = [Path(image.relative).parts for image in images]
    depth = 1 if {part[0] for part in parts} <= set(SPLITS) else 0
    loose = [image.relative for image, part in zip(images, parts, strict=True) if len(part) < depth + 2]
    if loose:
        raise DatasetMismatch(
            f"{folder} has images in no folder of a class: {some(loose)}; move them into one, or name "
            "images and labels in a CSV file"
        )
    return [
        _LabelledFile(image.relative, image.path, part[depth], part[0] if depth else UNSPLIT)
        for image, part in zip(images, parts, strict=True)
    ]
