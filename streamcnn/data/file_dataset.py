"""Image files as a data set: those that a table names, or those in one folder for each class.

Every image's head is read when the data set is opened, so that no training fails at a bad image.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import final

import torch
from torch import Tensor

from streamcnn.data.augmentation import RandomAugmentation
from streamcnn.data.copies import check_copies, same_files
from streamcnn.data.dataset import ImageDataset, TileDataset, no_split, will_need
from streamcnn.data.fingerprints import content_digest, fingerprint
from streamcnn.data.label_table import class_names, label_number
from streamcnn.data.labelled_files import LabelledFile, files_in_folders, files_of_table, require_data
from streamcnn.data.sources import DEFAULT_CHOICE, ImageChoice, ImageSource, open_chosen
from streamcnn.data.sources.places import local_path
from streamcnn.data.splits import canonical
from streamcnn.data.tile_store import is_tile_store
from streamcnn.data.uniform import check_alike, kind_of_file, size_of_file
from streamcnn.errors import DatasetMismatch, some

_READERS = 8
"""Number of files read at a time for fingerprints."""


@final
class FileDataset(ImageDataset):
    """Image files with labels; each is opened when the model asks.

    Parameters
    ----------
    path
        A CSV file with the columns ``image`` (a path, relative to the table's folder or absolute), ``label``
        and, if wanted, ``split``; or a folder with a folder of images for each class, and above these, if
        wanted, one for each split (``train``, ``val``, ``test``).
    split
        The split to take; None takes all images. An image without a split belongs to ``train``. Usual
        spellings of ``train``, ``val`` and ``test`` are equivalent: ``Training``, ``valid``,
        ``Test_set``.
    positions
        Positions within the split of the images to take; None takes all.
    augmentation, seed
        As for ``TileDataset``.
    choice
        Which image of each file to read, at which resolution, and where its channels are.
    inputs
        Columns of the table with numbers for the model. Each sample is then ``(source, label, numbers)``,
        with a float32 tensor (K,) of the table's numbers, in the order of these names.

    Raises
    ------
    DatasetMismatch
        If there are no such images, a label or an image is missing, or an input is missing or not a number;
        if images differ in channels, dtypes or ranges of values, one occurs in two splits, or folders could
        be splits as well as classes; or if the choice does not apply to an image.
    CorruptImage
        If a folder holds no image, an image cannot be opened, or the path does not exist.
    MissingExtra
        If a format needs a package that is not installed.
    ValueError
        If ``inputs`` name a column twice, or one that cannot be an input.
    """

    def __init__(
        self,
        path: str | Path,
        split: str | None = None,
        *,
        positions: Sequence[int] | None = None,
        augmentation: RandomAugmentation | None = None,
        seed: int = 0,
        choice: ImageChoice = DEFAULT_CHOICE,
        inputs: Sequence[str] = (),
    ) -> None:
        self.path = local_path(path)
        require_data(self.path, "tile stores, CSV files and folders of classes")
        self.input_names = tuple(inputs)
        if self.path.is_dir():
            _refuse_inputs(self.path, inputs)
            every = files_in_folders(self.path, choice.series)
        else:
            every = files_of_table(self.path, inputs)
        names, splits = [file.name for file in every], [file.split for file in every]
        check_alike(self.path, names, [kind_of_file(file.path, choice) for file in every])
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
            choice=choice,
            classes=classes,
            augmentation=augmentation,
            seed=seed,
        )

    def _open(self, position: int) -> ImageSource:
        return open_chosen(self._files[position].path, self.choice)

    def size_of(self, position: int) -> tuple[int, int]:
        """Height and width of an image as it is stored."""
        return size_of_file(self._files[position].path, self.choice)

    def inputs(self, position: int) -> tuple[Tensor, ...]:
        """The numbers of an image as a float32 tensor (K,), if ``inputs`` were named."""
        return _as_inputs(self._files[position].inputs)

    def _identities(self) -> Iterator[str]:
        # In parallel: a disk or a file server answers several requests sooner than one by one.
        with ThreadPoolExecutor(_READERS, thread_name_prefix="streamcnn-content") as readers:
            yield from self._described(readers.map(_content, self._files))

    def _former_identities(self) -> Iterator[str]:
        """`_identities` of older versions, which depend on files' times."""
        return self._described(map(_times, self._files))

    def _described(self, known: Iterable[str]) -> Iterator[str]:
        for file, label, each in zip(self._files, self.labels, known, strict=True):
            identity = f"{file.name} {label} {each}"
            numbers = dict(zip(self.input_names, file.inputs, strict=True))
            # Only what differs from the default, so that older runs can be resumed.
            made = [str(each) for each in (dict(self.choice.made), numbers) if each]
            yield " ".join((identity, *made))

    def prefetch(self, position: int) -> None:
        """Let the kernel read a file into its page cache; images that are folders are skipped."""
        path = self._files[position].path
        if path.is_file():
            will_need(path)


def _content(file: LabelledFile) -> str:
    return content_digest([file.path, *file.others])


def _times(file: LabelledFile) -> str:
    if file.others or file.path.is_dir():
        # A folder's time does not change with writes further down.
        return fingerprint([file.path, *file.others])
    found = file.path.stat()
    return f"{found.st_size} {found.st_mtime_ns}"


def open_dataset(
    path: str | Path,
    split: str | None = None,
    *,
    positions: Sequence[int] | None = None,
    augmentation: RandomAugmentation | None = None,
    seed: int = 0,
    choice: ImageChoice = DEFAULT_CHOICE,
    inputs: Sequence[str] = (),
) -> ImageDataset:
    """The labelled images at ``path``: a tile store, a CSV file or folders of classes.

    Parameters and errors are those of `TileDataset` and `FileDataset`; only a CSV file has inputs, and the
    images of a tile store were chosen when it was written.
    """
    path = local_path(path)
    if not is_tile_store(path):
        return FileDataset(
            path,
            split,
            positions=positions,
            augmentation=augmentation,
            seed=seed,
            choice=choice,
            inputs=inputs,
        )
    _refuse_inputs(path, inputs)
    refuse_choice(path, choice)
    return TileDataset(path, split, positions=positions, augmentation=augmentation, seed=seed)


def refuse_choice(path: str | Path, choice: ImageChoice) -> None:
    """Refuse a choice for a tile store, whose images were chosen when it was written.

    Raises
    ------
    DatasetMismatch
        If ``choice`` is not the default.
    """
    if choice.made:
        options = ", ".join(f"{name}=" for name in choice.made)
        raise DatasetMismatch(
            f"{path} is a tile store, whose images were chosen when it was written: leave {options} out "
            f"({choice}), or write another store with `streamcnn convert`"
        )


def open_table(
    path: str | Path, inputs: Sequence[str] = (), choice: ImageChoice = DEFAULT_CHOICE
) -> Iterator[tuple[Path, ImageSource, *tuple[Tensor, ...]]]:
    """Open the images that a table names, with or without labels: paths, sources and further inputs.

    Parameters
    ----------
    path
        A CSV file with the column ``image``.
    inputs, choice
        As for `FileDataset`.

    Raises
    ------
    DatasetMismatch, ValueError
        As for `FileDataset`, except for labels.
    """
    for file in files_of_table(local_path(path), inputs, labelled=False):
        yield file.path, open_chosen(file.path, choice), *_as_inputs(file.inputs)


def _as_inputs(numbers: tuple[float, ...]) -> tuple[Tensor, ...]:
    """The numbers as a tuple of one tensor (K,), or an empty tuple if there are none."""
    return (torch.tensor(numbers, dtype=torch.float32),) if numbers else ()


def _refuse_inputs(path: str | Path, inputs: Sequence[str]) -> None:
    if inputs:
        raise DatasetMismatch(
            f"{path} has no columns to take inputs {some(inputs)} from: name images and inputs in a CSV file"
        )
