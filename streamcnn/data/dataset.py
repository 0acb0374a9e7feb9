"""A tile store as a PyTorch dataset of lazy images."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import Dataset

from streamcnn.data.augmentation import AugmentedSource, RandomAugmentation
from streamcnn.data.sampling import ResumableSampler
from streamcnn.data.sources import ImageSource
from streamcnn.data.tile_store import ImageRecord, TileStore
from streamcnn.errors import DatasetMismatch

Sample = tuple[ImageSource, int]


class TileDataset(Dataset[Sample]):
    """The labelled images of a store as ``(source, label)``; no pixel is read before the model asks.

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
        If the split is not there, or an image has no label.

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
        records = self.store.records if split is None else self.store.split(split)
        if not records:
            known = sorted({record.split for record in self.store.records})
            raise DatasetMismatch(f"{self.store.folder} has no images of split {split!r}: it has {known}")
        self.records = records if positions is None else tuple(records[p] for p in positions)
        unlabelled = next((record.name for record in self.records if record.label is None), None)
        if unlabelled is not None:
            raise DatasetMismatch(
                f"{unlabelled} in {self.store.folder} has no label: convert it with --labels"
            )
        self.augmentation = augmentation
        self._seed = seed
        self._epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Draw the augmentations of another epoch; worker processes that run already keep theirs."""
        self._epoch = epoch

    @property
    def labels(self) -> tuple[int, ...]:
        """The labels of all images."""
        return tuple(_label(record) for record in self.records)

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, position: int) -> Sample:
        record = self.records[position]
        source = self.store.source(record)
        if self.augmentation is not None:
            drawn = self.augmentation.draw(seed=self._seed, epoch=self._epoch, index=position)
            if not drawn.is_identity:
                source = AugmentedSource(source, drawn)
        return source, _label(record)

    def prefetch(self, position: int) -> None:
        """Have the kernel read an image's shards into its page cache, and return at once.

        That memory is the system's, given up when it is needed, and counts towards no budget.
        """
        record = self.records[position]
        for key in record.shards:
            if key.startswith("0/"):
                _will_need(self.store.path(record) / key)


def prefetched(dataset: TileDataset, sampler: ResumableSampler) -> Iterator[Sample]:
    """The rest of an epoch's samples, the files of each read from disk while the one before is in use.

    Augmentations are those of the sampler's epoch, and its state is exact at any moment.
    """
    dataset.set_epoch(sampler.epoch)
    for position in sampler:
        upcoming = sampler.upcoming()
        if upcoming is not None:
            dataset.prefetch(upcoming)
        yield dataset[position]


def collate(samples: Sequence[Sample]) -> tuple[list[ImageSource], Tensor]:
    """A batch for ``StreamingModel``: the sources, and the labels ``(N,)`` as int64."""
    return [source for source, _ in samples], torch.tensor([label for _, label in samples])


def _label(record: ImageRecord) -> int:
    assert record.label is not None
    return record.label


def _will_need(path: Path) -> None:
    """Ask for a file to be read ahead; where that cannot be asked for, or fails, reading it will tell."""
    if not hasattr(os, "posix_fadvise"):
        return
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except OSError:
        return
    try:
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_WILLNEED)
    finally:
        os.close(descriptor)
