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
"""An image, its label, and further inputs of the model, in order."""


OF_CONTENT = "content "
"""Prefix of fingerprints that do not depend on files' times."""


class Images(Protocol):
    """Images with their targets, by position."""

    @property
    def fingerprint(self) -> str:
        """Identifies these images, their targets and their augmentations."""

    def set_epoch(self, epoch: int) -> None:
        """Draw the random augmentations of an epoch."""

    def prefetch(self, position: int) -> None:
        """Start to prefetch an image that will be read soon, without waiting."""

    def __len__(self) -> int: ...

    def __getitem__(self, position: int) -> tuple[Any, ...]: ...


class LabelledImages(Images, Protocol):
    """Images with labels 0, 1, 2 and so on, by position."""

    @property
    def labels(self) -> tuple[int, ...]:
        """The labels of all images."""

    def __getitem__(self, position: int) -> Sample: ...


class ImageDataset(Dataset[Sample], ABC):
    """Labelled images as ``(source, label)``, or ``(source, label, inputs)`` if the model takes further
    inputs; no pixel is read before the model asks.

    Parameters
    ----------
    names, labels
        Names and labels of all images; a label is the number of a class.
    choice
        How the files of the images were read.
    classes
        Names of the labels 0, 1, …; None if labels are numbers.
    augmentation
        Drawn for each image and epoch; see ``set_epoch``.
    seed
        Seed of the augmentations.

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
        """Open an image as it is stored."""

    def size_of(self, position: int) -> tuple[int, int]:
        """Height and width of an image as it is stored."""
        _, height, width = self._open(position).shape
        return height, width

    @abstractmethod
    def _identities(self) -> Iterator[str]:
        """A text for each image that identifies it and its label."""

    def _former_identities(self) -> Iterator[str]:
        """``_identities`` as older versions had them."""
        return self._identities()

    @abstractmethod
    def prefetch(self, position: int) -> None:
        """Let the kernel read an image's files into its page cache, without waiting.

        The system frees that memory when it is needed, so it counts towards no budget.
        """

    def truth(self, position: int) -> Any:
        """Ground truth of an image beyond its label, for evaluation only; None if there is none."""
        return None

    def inputs(self, position: int) -> tuple[Tensor, ...]:
        """Further inputs of the model for an image; they are part of ``_identities``."""
        return ()

    @property
    def num_classes(self) -> int:
        """The number of classes: one more than the largest label, and at least the number of class names."""
        return max(len(self.classes or ()), 1 + max(self.labels, default=-1))

    @property
    def fingerprint(self) -> str:
        """Identifies these images, their labels and their augmentations: a text with a SHA-256.

        Raises
        ------
        CorruptImage
            If an image's files cannot be read.
        """
        return f"{OF_CONTENT}{digest_of(self._identities(), self.augmentation, self._seed)}"

    @property
    def former_fingerprint(self) -> str:
        """The fingerprint of older versions, which also depends on files' times."""
        return digest_of(self._former_identities(), self.augmentation, self._seed)

    def renumber(self, classes: tuple[str, ...] | None) -> None:
        """Renumber the labels by other images' class names; None stands for labels that are numbers.

        Raises
        ------
        DatasetMismatch
            If an image has a class that is not among them, or only one of the two has names.
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
        """Draw the augmentations of an epoch; running worker processes keep those of before."""
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
        If the store lacks the split, an image has no label or occurs in two splits, or images of the
        store have different numbers of channels, dtypes or ranges of values.

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
        """Look for copies of images, by the checksums of chunks."""
        every = self.store.records
        copies = same_keys(map(_checksums, every))
        names, splits = [record.name for record in every], [canonical(record.split) for record in every]
        check_copies(self.store.folder, names, splits, copies, [record.label for record in every])

    def truth(self, position: int) -> Any:
        """The store's ground truth beyond the label: for UltraMNIST, boxes and values of the digits."""
        return self.records[position].truth

    def _identities(self) -> Iterator[str]:
        # The origin is left out, as it has the times of the files that the image was read from.
        return (replace(record, origin={}).to_json() for record in self.records)

    def _former_identities(self) -> Iterator[str]:
        return (record.to_json() for record in self.records)

    def prefetch(self, position: int) -> None:
        """Let the kernel read an image's shards of full resolution into its page cache."""
        record = self.records[position]
        for key in record.shards:
            if key.startswith("0/"):
                will_need(self.store.path(record) / key)


def _kind(record: ImageRecord) -> ImageKind:
    """The kind of an image of a store, from the manifest."""
    largest = largest_of(getattr(torch, record.dtype)) if record.largest is None else record.largest
    return ImageKind(record.shape[0], record.dtype, largest)


def _choice_of(records: Sequence[ImageRecord]) -> ImageChoice:
    """How the files of a store's images were read; the default if that differs between images."""
    found = set()
    for record in records:
        series, level, last = (record.origin.get(name) for name in ("series", "level", "channels_last"))
        try:
            found.add(ImageChoice(series, 0 if level is None else level, last))
        except ValueError:
            return DEFAULT_CHOICE  # written by another program, which means something else by these words
    return found.pop() if len(found) == 1 else DEFAULT_CHOICE


def _checksums(record: ImageRecord) -> Hashable | None:
    """A key that is equal for images of equal pixels; None for a small image."""
    if record.stored_bytes < LEAST_BYTES:
        return None
    shards = sorted((key, *astuple(shard)) for key, shard in record.shards.items())
    return (record.shape, record.dtype, *shards)


def of_split(store: TileStore, split: str) -> tuple[ImageRecord, ...]:
    """The images of a split, in any of its spellings."""
    wanted = canonical(split)
    return tuple(record for record in store.records if canonical(record.split) == wanted)


def prefetched(dataset: ImageDataset, sampler: ResumableSampler) -> Iterator[Sample]:
    """The rest of an epoch's samples; while one is in use, the next one's files are read from disk.

    Augmentations are those of the sampler's epoch, and the sampler's state is exact at any moment.
    """
    dataset.set_epoch(sampler.epoch)
    for position in sampler:
        upcoming = sampler.upcoming()
        if upcoming is not None:
            dataset.prefetch(upcoming)
        yield dataset[position]


def collate(samples: Sequence[Sample]) -> tuple[list[ImageSource], Tensor, *tuple[Tensor, ...]]:
    """A batch for ``StreamingModel``: the sources, the labels ``(N,)`` as int64, and further inputs.

    Further inputs are stacked: inputs ``(K,)`` of the samples become one tensor ``(N, K)``.

    Raises
    ------
    DatasetMismatch
        If samples differ in the number or shapes of further inputs.
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
    """A SHA-256 of the images' identities and of their augmentation."""
    known = hashlib.sha256(repr((augmentation, seed)).encode())
    for identity in identities:
        known.update(identity.encode(errors="surrogateescape") + b"\n")
    return known.hexdigest()


def no_split(path: Path, split: str | None, present: Iterable[str]) -> DatasetMismatch:
    """The error for a data set without images of a split."""
    known = sorted(set(present))
    return DatasetMismatch(f"{path} has no images of split {split!r}: it has {known}")


def will_need(path: Path) -> None:
    """Ask the kernel to read a file ahead; failures are ignored, as reading the file will show them."""
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
