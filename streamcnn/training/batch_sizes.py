"""Checks, before a run begins, that all images of a batch have one size."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

from streamcnn.data.augmentation import RandomAugmentation
from streamcnn.data.dataset import Images
from streamcnn.data.sampling import ResumableSampler
from streamcnn.errors import DatasetMismatch
from streamcnn.support.units import plural


def require_one_size(images: Images, batch_size: int, *, advice: str) -> None:
    """Make sure that any images may share a batch, in whatever order and however they are augmented.

    ``advice`` tells the user how to get batches of one image; it becomes part of the error's text.

    Raises
    ------
    DatasetMismatch
        If two images have different sizes, or if they are rotated by quarter turns and are not square.
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
    """Make sure that each batch has images of one size, where images are taken in their order.

    Raises
    ------
    DatasetMismatch
        If two images of a batch have different sizes.
    """
    if batch_size == 1:
        return
    for at in range(0, len(images), batch_size):
        _require_same(images, range(at, min(at + batch_size, len(images))), advice)


def require_enough(sampler: ResumableSampler, num_processes: int, batch_size: int) -> None:
    """Make sure that an epoch has a batch for each process, and warn of the images that it leaves out.

    For processes that wait for each other in their passes, as synchronised batch norms make them.

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
