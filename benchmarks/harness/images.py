"""The benchmark's images: generated once for a scale, and shrunk once for a resolution."""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from filelock import FileLock
from torch import Tensor

from benchmarks.harness.scales import Scale
from streamcnn.data.augmentation import RandomAugmentation
from streamcnn.data.dataset import ImageDataset, TileDataset
from streamcnn.data.sources import ImageSource, TensorSource
from streamcnn.data.tile_store import TileStore
from streamcnn.data.ultramnist import Digits, Spec
from streamcnn.data.ultramnist.generate import Progress, generate
from streamcnn.geometry.regions import Region

DATA_SEED = 0
TWO_STEPS_BELOW = 512
"""On the paper's canvas; smaller images are shrunk to this resolution first."""


def generated(
    scale: Scale,
    folder: Path,
    digits: Digits,
    *,
    workers: int = 1,
    timeout: float | None = None,
    on_image: Callable[[Progress], None] = lambda progress: None,
) -> TileStore:
    """The images of a scale, made now where they are not there yet; runs beside this one wait for them.

    Parameters
    ----------
    timeout
        Seconds to wait for another run that makes them; None waits until it has.
    on_image
        Told how far they are after each image, and ends it by raising: images told of are kept.

    Raises
    ------
    filelock.Timeout
        If another run is still at it.
    """
    spec = Spec(seed=DATA_SEED, recipe=scale.recipe, size=scale.canvas)
    making = generate(
        folder,
        spec,
        digits,
        num_train=scale.num_train,
        num_test=scale.num_test,
        workers=workers,
    )
    folder.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder.with_suffix(".lock"), timeout=-1 if timeout is None else timeout)
    with lock, closing(making):
        for progress in making:
            on_image(progress)
    return TileStore(folder)


class ShrunkImages(ImageDataset):
    """The images of a split, shrunk by area interpolation and kept in one array on disk.

    Parameters
    ----------
    store
        Of the whole images.
    split
        Of which.
    resolutions
        Heights and widths in pixels that they are shrunk to one after another.
    folder
        For the arrays of this store's images; one is made where it is not there yet.
    positions, augmentation, seed
        As for `TileDataset`.
    """

    def __init__(
        self,
        store: TileStore,
        split: str,
        resolutions: Sequence[int],
        folder: Path,
        *,
        positions: Sequence[int] | None = None,
        augmentation: RandomAugmentation | None = None,
        seed: int = 0,
    ) -> None:
        whole = TileDataset(store, split)
        path = folder / f"{split}-{'-'.join(map(str, resolutions))}.npy"
        folder.mkdir(parents=True, exist_ok=True)
        with FileLock(path.with_suffix(".lock")):
            if not path.exists():
                _shrink(whole, resolutions, path)
        header = np.load(path, mmap_mode="r")
        self._path, self._shape, self._offset = path, header.shape[1:], header.offset
        self._positions = tuple(range(len(whole)) if positions is None else positions)
        self._whole = whole
        self._resolutions = tuple(resolutions)
        super().__init__(
            tuple(whole.names[at] for at in self._positions),
            tuple(whole.labels[at] for at in self._positions),
            classes=whole.classes,
            augmentation=augmentation,
            seed=seed,
        )

    def _open(self, position: int) -> ImageSource:
        # Not by a mapping, whose pages would stay and count as memory that the method holds.
        count = math.prod(self._shape)
        offset = self._offset + self._positions[position] * count
        pixels = np.fromfile(self._path, np.uint8, count, offset=offset)
        return TensorSource(torch.from_numpy(pixels.reshape(self._shape)))

    def _identities(self) -> Iterator[str]:
        yield f"{self._resolutions}"
        for at in self._positions:
            yield self._whole.records[at].to_json()

    def prefetch(self, position: int) -> None:
        """Nothing: the array is read by the kernel."""


def shrink(pixels: Tensor, resolutions: Sequence[int]) -> Tensor:
    """Bytes (C, H, W) shrunk by area interpolation to each resolution in turn, rounded after each."""
    for resolution in resolutions:
        means = F.interpolate(pixels[None].float(), size=(resolution, resolution), mode="area")
        pixels = means[0].round().to(torch.uint8)
    return pixels


def steps_to(resolution: int, scale: Scale) -> tuple[int, ...]:
    """The resolutions in pixels on the way to one of the paper's: 256 through 512, larger ones at once."""
    stops = (TWO_STEPS_BELOW, resolution) if resolution < TWO_STEPS_BELOW else (resolution,)
    return tuple(scale.pixels(stop) for stop in stops)


def read_whole(source: ImageSource) -> Tensor:
    """All pixels (C, H, W) of an image."""
    return source.read(Region.whole(source.shape[1:]))


def _shrink(images: TileDataset, resolutions: Sequence[int], path: Path) -> None:
    temporary = path.with_name(f"{path.name}.partial")
    channels = images[0][0].shape[0]
    shape = (len(images), channels, resolutions[-1], resolutions[-1])
    array = np.lib.format.open_memmap(temporary, mode="w+", dtype=np.uint8, shape=shape)
    for position in range(len(images)):
        source, _ = images[position]
        array[position] = shrink(read_whole(source), resolutions).numpy()
    array.flush()
    os.replace(temporary, path)


def fingerprint_of(store: TileStore) -> str:
    """What tells these images from others, in short."""
    known = hashlib.sha256()
    for record in store.records:
        known.update(record.to_json().encode())
    return known.hexdigest()[:16]
