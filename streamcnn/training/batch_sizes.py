"""That images which come into one batch have one size, before anything is done with them."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

from streamcnn.data.augmentation import RandomAugmentation
from streamcnn.data.dataset import Images
from streamcnn.data.sampling import ResumableSampler
from streamcnn.errors import DatasetMismatch
from streamcnn.support.units import plural


def require_one_size(images: Images, batch_size: int, *, advice: str) -> None:
    """Make sure that images have one size in each batch, whatever the order, and what is drawn for them.

    ``advice`` says how to have batches of one image.

    Raises
    ------
    DatasetMismatch
        If two have different sizes, or they are turned and not square.
    """
    if batch_size == 1 or len(images) < 2:
        return
    _require_same(images, range(len(images)), advice)
    augmentation = getattr(images, "augmentation", None)
    if isinstance(augmentation, RandomAugmentation) and augmentation.turns:
        height, width = _size_of(images, 0)
        if height != width:
            raise DatasetMismatch(
                f"images are turned by quarters, and {_name_of(images, 0)} is not square, of {height} x "
                f"{width} pixels now: images of a batch have one size, so {advice}, or leave --turns out"
            )


def require_one_size_in_order(images: Images, batch_size: int, *, advice: str) -> None:
    """Make sure that images that are taken in their order have one size in each batch.

    Raises
    ------
    DatasetMismatch
        If two of a batch have different sizes.
    """
    if batch_size == 1:
        return
    for at in range(0, len(images), batch_size):
        _require_same(images, range(at, min(at + batch_size, len(images))), advice)


def require_enough(sampler: ResumableSampler, num_processes: int, batch_size: int) -> None:
    """Make sure that processes which meet in their passes have a batch each, and tell of images without.

    Raises
    ------
    DatasetMismatch
        If there are too few images.
    """
    together = f"{num_processes} processes with {plural(batch_size, 'image')} each"
    if not len(sampler):
        raise DatasetMismatch(
            f"an epoch has {sampler.num_left_out} images, and SyncBatchNorm norms those of {together} "
            "together: start fewer processes, or give more images"
        )
    if sampler.num_left_out:
        warnings.warn(
            f"SyncBatchNorm norms the images of {together} together, so each epoch leaves "
            f"{sampler.num_left_out} of {sampler.num_left_out + len(sampler)} out, by its order",
            stacklevel=3,
        )


def _require_same(images: Images, positions: Sequence[int], advice: str) -> None:
    first = positions[0]
    height, width = _size_of(images, first)
    for position in positions[1:]:
        rows, cols = _size_of(images, position)
        if (rows, cols) != (height, width):
            raise DatasetMismatch(
                f"image {position} ({_name_of(images, position)}) has {rows} x {cols} pixels, and image "
                f"{first} ({_name_of(images, first)}) {height} x {width}: images of a batch have one size, "
                f"so {advice}, or write all in one"
            )


def _size_of(images: Images, position: int) -> tuple[int, int]:
    known = getattr(images, "size_of", None)
    if known is not None:
        height, width = known(position)
    else:
        _, height, width = images[position][0].shape
    return height, width


def _name_of(images: Images, position: int) -> str:
    name: str = images[position][0].name
    return name
