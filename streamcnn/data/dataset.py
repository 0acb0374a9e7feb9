"""Labelled images as PyTorch datasets of lazy sources."""

from __future__ import annotations

import hashlib
import os
from abc import ABC, abstractmethod
from collections.abc import Hashable, Iterable, Iterator, Sequence
from dataclasses import astuple, replace
from pathlib import Path
from typing import Any, Protocol, final

import torch
from torch import Tensor
from torch.utils.data import Dataset

from streamcnn.data.augmentation import AugmentedSource, RandomAugmentation
from streamcnn.data.copies import LEAST_BYTES, check_copies, same_keys
from streamcnn.data.label_range import require_labels
from streamcnn.data.sampling import ResumableSampler
from streamcnn.data.sources import DEFAULT_CHOICE, ImageChoice, ImageSource, largest_of
from streamcnn.data.splits import canonical
from streamcnn.data.tile_store import ImageRecord, TileStore
from streamcnn.data.uniform import ImageKind, check_alike
from streamcnn.errors import DatasetMismatch, some

Sample = tuple[ImageSource, int, *tuple[Tensor, ...]]
"""An image, its label, and what else of it goes into the model, in order."""


OF_CONTENT = "content "
"""What a fingerprint begins with that does not depend on when files were written."""


class Images(Protocol):
    """Images and what a model is to find in them, by position."""

    @property
    def fingerprint(self) -> str:
        """What tells these images, what is known of them, and their augmentations from others."""

    def set_epoch(self, epoch: int) -> None:
        """Draw what is random in each epoch anew."""

    def prefetch(self, position: int) -> None:
        """Prepare for an image being read soon, and return at once."""

    def __len__(self) -> int: ...

    def __getitem__(self, position: int) -> tuple[Any, ...]: ...


class LabelledImages(Images, Protocol):
    """Images with labels 0, 1, 2 and so on, by position."""

    @property
    def labels(self) -> tuple[int, ...]:
        """The labels of all images."""

    def __getitem__(self, position: int) -> Sample: ...


class ImageDataset(Dataset[Sample], ABC):
    """Labelled images as ``(source, label)``, or ``(source, label, inputs)`` where the model gets more of
    an image than its pixels; no pixel is read before the model asks.

    Parameters
    ----------
    names, labels
        Of all images; a label is its class's number.
    choice
        How the files were read that the pixels come from.
    classes
        Names of the labels 0, 1, …; None where labels are numbers.
    augmentation
        Drawn for each image and epoch; see ``set_epoch``.
    seed
        Of the augmentations.

    Raises
    ------
    DatasetMismatch
        If a label is far larger than the number of images.
    """

    choice: ImageChoice
    """How the files were read that the pixels come from; of a store, when it was written."""

    def __init__(
        self,
        names: tuple[str, ...],
        labels: tuple[int, ...],
        *,
        choice: ImageChoice = DEFAULT_CHOICE,
        classes: tuple[str, ...] | None,
        augmentation: RandomAugmentation | None,
        seed: int,
    ) -> None:
        require_labels(labels)
        self.names = names
        self.labels = labels
        self.classes = classes
        self.choice = choice
        self.augmentation = augmentation
        self._seed = seed
        self._epoch = 0

    @abstractmethod
    def _open(self, position: int) -> ImageSource:
        """An image as it is stored."""

    def size_of(self, position: int) -> tuple[int, int]:
        """Height and width of an image as it is stored."""
        _, height, width = self._open(position).shape
        return height, width

    @abstractmethod
    def _identities(self) -> Iterator[str]:
        """What tells each image and its label from another."""

    def _former_identities(self) -> Iterator[str]:
        """``_identities`` as older versions had them."""
        return self._identities()

    @abstractmethod
    def prefetch(self, position: int) -> None:
        """Have the kernel read an image's files into its page cache, and return at once.

        That memory is the system's, given up when it is needed, and counts towards no budget.
        """

    def truth(self, position: int) -> Any:
        """What is known of an image beyond its label, for evaluation only; None where nothing is."""
        return None

    def inputs(self, position: int) -> tuple[Tensor, ...]:
        """What goes into the model after the image; ``_identities`` tell it from other values."""
        return ()

    @property
    def num_classes(self) -> int:
        """One more than the largest label; all names of classes count."""
        return max(len(self.classes or ()), 1 + max(self.labels, default=-1))

    @property
    def fingerprint(self) -> str:
        """What tells these images, their labels and augmentations from others: a text with a SHA-256.

        Raises
        ------
        CorruptImage
            If an image's files cannot be read.
        """
        return f"{OF_CONTENT}{digest_of(self._identities(), self.augmentation, self._seed)}"

    @property
    def former_fingerprint(self) -> str:
        """What ``fingerprint`` was before it was of content alone: it changed with the times of files."""
        return digest_of(self._former_identities(), self.augmentation, self._seed)

    def renumber(self, classes: tuple[str, ...] | None) -> None:
        """Number the labels as other images' are, whose classes have these names; None if theirs are numbers.

        Raises
        ------
        DatasetMismatch
            If an image is of another class, or only the one has names.
        """
        if self.classes == classes:
            return
        if self.classes is None or classes is None:
            here, there = ("numbers", "names") if self.classes is None else ("names", "numbers")
            raise DatasetMismatch(f"labels are {here} here, and {there} where the classes are from")
        unknown = sorted({self.classes[label] for label in self.labels} - set(classes))
        if unknown:
            raise DatasetMismatch(
                f"there are images of {some(unknown)}; known classes are {some(classes)}: give images of "
                "these, or correct the labels"
            )
        self.labels = tuple(classes.index(self.classes[label]) for label in self.labels)
        self.classes = classes

    def set_epoch(self, epoch: int) -> None:
        """Draw the augmentations of another epoch; worker processes that run already keep theirs."""
        self._epoch = epoch

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, position: int) -> Sample:
        source = self._open(position)
        if self.augmentation is not None:
            drawn = self.augmentation.draw(seed=self._seed, epoch=self._epoch, index=position)
            if not drawn.is_identity:
                source = AugmentedSource(source, drawn)
        return source, self.labels[position], *self.inputs(position)


@final
class TileDataset(ImageDataset):
    """The labelled images of a tile store.

    Parameters
    ----------
    store
        A tile store, or its folder.
    split
        Which images; None takes all.
    positions
        Of the images to take among those, as from ``divide`` and ``balanced_subset``; None takes all.
    augmentation
        Drawn for each image and epoch; see ``set_epoch``.
    seed
        Of the augmentations.

    Raises
    ------
    DatasetMismatch
        If the split is not there, an image has no label or is there in two splits, or images of the store
        have different numbers of channels, types or ranges of values.

    Examples
    --------
    ::

        images = TileDataset("ultramnist", "train")
        loader = DataLoader(images, batch_size=2, sampler=ResumableSampler(images), collate_fn=collate)
        for sources, labels in loader:
            loss = F.cross_entropy(model(sources), labels)
    """

    def __init__(
        self,
        store: TileStore | str | Path,
        split: str | None = None,
        *,
        positions: Sequence[int] | None = None,
        augmentation: RandomAugmentation | None = None,
        seed: int = 0,
    ) -> None:
        self.store = store if isinstance(store, TileStore) else TileStore(store)
        records = self.store.records if split is None else of_split(self.store, split)
        if not records:
            raise no_split(self.store.folder, split, (record.split for record in self.store.records))
        every = self.store.records
        check_alike(self.store.folder, [each.name for each in every], [_kind(each) for each in every])
        self._check_copies()
        self.records = records if positions is None else tuple(records[p] for p in positions)
        unlabelled = next((record.name for record in self.records if record.label is None), None)
        if unlabelled is not None:
            raise DatasetMismatch(
                f"{unlabelled} in {self.store.folder} has no label: convert it with --labels"
            )
        super().__init__(
            tuple(record.name for record in self.records),
            tuple(record.label for record in self.records if record.label is not None),
            choice=_choice_of(records),
            classes=self.store.head.classes,
            augmentation=augmentation,
            seed=seed,
        )

    def _open(self, position: int) -> ImageSource:
        return self.store.source(self.records[position])

    def size_of(self, position: int) -> tuple[int, int]:
        """Height and width of an image as it is stored."""
        _, height, width = self.records[position].shape
        return height, width

    def _check_copies(self) -> None:
        """Compare images by the checksums of their chunks."""
        every = self.store.records
        copies = same_keys(map(_checksums, every))
        names, splits = [record.name for record in every], [canonical(record.split) for record in every]
        check_copies(self.store.folder, names, splits, copies, [record.label for record in every])

    def truth(self, position: int) -> Any:
        """What the store knows beyond the label: of UltraMNIST, the boxes and values of the digits."""
        return self.records[position].truth

    def _identities(self) -> Iterator[str]:
        # Where an image came from is left out: it names the times of the files that it was made of.
        return (replace(record, origin={}).to_json() for record in self.records)

    def _former_identities(self) -> Iterator[str]:
        return (record.to_json() for record in self.records)

    def prefetch(self, position: int) -> None:
        """Have the kernel read an image's shards of full resolution into its page cache."""
        record = self.records[position]
        for key in record.shards:
            if key.startswith("0/"):
                will_need(self.store.path(record) / key)


def _kind(record: ImageRecord) -> ImageKind:
    """What an image of a store is, by the manifest."""
    largest = largest_of(getattr(torch, record.dtype)) if record.largest is None else record.largest
    return ImageKind(record.shape[0], record.dtype, largest)


def _choice_of(records: Sequence[ImageRecord]) -> ImageChoice:
    """How the files of a store's images were read; the default where that is not one thing."""
    found = set()
    for record in records:
        series, level, last = (record.origin.get(name) for name in ("series", "level", "channels_last"))
        try:
            found.add(ImageChoice(series, 0 if level is None else level, last))
        except ValueError:
            return DEFAULT_CHOICE  # of another program, that means something else by these words
    return found.pop() if len(found) == 1 else DEFAULT_CHOICE


def _checksums(record: ImageRecord) -> Hashable | None:
    """What two images of the same pixels have in common; None of a small image."""
    if record.stored_bytes < LEAST_BYTES:
        return None
    shards = sorted((key, *astuple(shard)) for key, shard in record.shards.items())
    return (record.shape, record.dtype, *shards)


def of_split(store: TileStore, split: str) -> tuple[ImageRecord, ...]:
    """The images of a split, however it is spelled."""
    wanted = canonical(split)
    return tuple(record for record in store.records if canonical(record.split) == wanted)


def prefetched(dataset: ImageDataset, sampler: ResumableSampler) -> Iterator[Sample]:
    """The rest of an epoch's samples, the files of each read from disk while the one before is in use.

    Augmentations are those of the sampler's epoch, and its state is exact at any moment.
    """
    dataset.set_epoch(sampler.epoch)
    for position in sampler:
        upcoming = sampler.upcoming()
        if upcoming is not None:
            dataset.prefetch(upcoming)
        yield dataset[position]


def collate(samples: Sequence[Sample]) -> tuple[list[ImageSource], Tensor, *tuple[Tensor, ...]]:
    """A batch for ``StreamingModel``: the sources, the labels ``(N,)`` as int64, and further inputs.

    Each further input is stacked: of ``(K,)`` in each sample, there is one of ``(N, K)``.

    Raises
    ------
    DatasetMismatch
        If samples have further inputs of different numbers or shapes.
    """
    if len({input_shapes(sample) for sample in samples}) > 1:
        shapes = [input_shapes(sample) for sample in samples]
        raise DatasetMismatch(f"images of a batch have inputs of different shapes: {shapes}")
    sources, labels, *inputs = zip(*samples, strict=True)
    return list(sources), torch.tensor(labels), *(torch.stack(each) for each in inputs)


def input_shapes(sample: Sample) -> tuple[tuple[int, ...], ...]:
    """The shapes of a sample's further inputs."""
    return tuple(tuple(each.shape) for each in sample[2:])


def digest_of(identities: Iterable[str], augmentation: RandomAugmentation | None, seed: int) -> str:
    """A SHA-256 of what tells each image from another, and of what they are augmented by."""
    known = hashlib.sha256(repr((augmentation, seed)).encode())
    for identity in identities:
        known.update(identity.encode(errors="surrogateescape") + b"\n")
    return known.hexdigest()


def no_split(path: Path, split: str | None, present: Iterable[str]) -> DatasetMismatch:
    """The error that a data set has no images of a split."""
    known = sorted(set(present))
    return DatasetMismatch(f"{path} has no images of split {split!r}: it has {known}")


def will_need(path: Path) -> None:
    """Ask for a file to be read ahead; where that cannot be asked for, or fails, reading it will tell."""
    if not hasattr(os, "posix_fadvise"):
        return
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    except OSError:
        return
    try:
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_WILLNEED)
    finally:
        os.close(descriptor)
