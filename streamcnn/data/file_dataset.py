"""Image files as a dataset: those that a table names, or those in folders of their classes.

The head of every image is read when the data set is opened, so that a training does not end at one.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import final

import torch
from torch import Tensor

from streamcnn.data.augmentation import RandomAugmentation
from streamcnn.data.copies import check_copies, same_files
from streamcnn.data.dataset import ImageDataset, TileDataset, no_split, will_need
from streamcnn.data.fingerprints import fingerprint
from streamcnn.data.label_table import class_names, label_number
from streamcnn.data.labelled_files import files_in_folders, files_of_table
from streamcnn.data.sources import ImageSource, open_image
from streamcnn.data.sources.places import local_path
from streamcnn.data.splits import canonical
from streamcnn.data.tile_store import is_tile_store
from streamcnn.data.uniform import check_channels, num_channels
from streamcnn.errors import DatasetMismatch, some


@final
class FileDataset(ImageDataset):
    """Image files with labels; each is opened when the model asks.

    Parameters
    ----------
    path
        A CSV file with the columns ``image`` (a path, taken from the table's folder if it is relative),
        ``label`` and, if wanted, ``split``; or a folder with a folder of images for each class, and above
        them, if wanted, one for each split (``train``, ``val``, ``test``).
    split
        Which images; None takes all. Where nothing says a split, it is ``train``. Usual spellings of
        ``train``, ``val`` and ``test`` are one: ``Training``, ``valid``, ``Test_set``.
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
        If there are no such images, a label or an image is missing, or an input is missing or no number; if
        images have different numbers of channels, one is there in two splits, or folders may be splits and
        may be classes.
    CorruptImage
        If a folder holds no image, an image cannot be opened, or the path is not on this machine.
    MissingExtra
        If a format needs a package that is not installed.
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
        self.path = local_path(path)
        self.input_names = tuple(inputs)
        if self.path.is_dir():
            _refuse_inputs(self.path, inputs)
        every = files_in_folders(self.path) if self.path.is_dir() else files_of_table(self.path, inputs)
        channels = [num_channels(file.path) for file in every]
        names, splits = [file.name for file in every], [file.split for file in every]
        check_channels(self.path, names, channels)
        copies = same_files([(file.path, *file.others) for file in every])
        check_copies(self.path, names, splits, copies, [file.label for file in every])
        classes = class_names(file.label for file in every)
        wanted = None if split is None else canonical(split)
        files = [file for file in every if wanted is None or file.split == wanted]
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
            found = file.path.stat()
            identity = f"{file.name} {label} {found.st_size} {found.st_mtime_ns}"
            if file.others or file.path.is_dir():
                # The time of a folder does not tell of what is written further down.
                identity = f"{file.name} {label} {fingerprint([file.path, *file.others])}"
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
    path = local_path(path)
    if not is_tile_store(path):
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
    for file in files_of_table(local_path(path), inputs, labelled=False):
        yield file.path, open_image(file.path), *_as_inputs(file.inputs)


def _as_inputs(numbers: tuple[float, ...]) -> tuple[Tensor, ...]:
    """The numbers as one tensor (K,), or nothing where there are none."""
    return (torch.tensor(numbers, dtype=torch.float32),) if numbers else ()


def _refuse_inputs(path: str | Path, inputs: Sequence[str]) -> None:
    if inputs:
        raise DatasetMismatch(
            f"{path} has no columns to take inputs {some(inputs)} from: name images and inputs in a CSV file"
        )
