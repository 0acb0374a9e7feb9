"""Errors that name the images they are about."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from streamcnn.data.dataset import LabelledImages, Sample, collate
from streamcnn.data.sources import ImageSource
from streamcnn.errors import CannotWrite, StreamError

_MOST = 5


def listed(positions: Sequence[int], names: Sequence[str], text: str = "") -> str:
    """The first five images by position and name, without names that ``text`` already has."""
    shown = [
        f"{position}" if name in text else f"{position} ({name})"
        for position, name in zip(positions[:_MOST], names, strict=False)
    ]
    rest = len(positions) - _MOST
    what = "image" if len(positions) == 1 else "images"
    return f"{what} {', '.join(shown)}" + (f" and {rest} more" if rest > 0 else "")


def not_finite(logits: Tensor, positions: Sequence[int], names: Sequence[str]) -> str:
    """The images with NaN or infinity among their logits (N, classes), as text; empty if there are none."""
    bad = [at for at, row in enumerate(logits) if not torch.isfinite(row).all()]
    return listed([positions[at] for at in bad], [names[at] for at in bad]) if bad else ""


@contextmanager
def naming(where: str, positions: Sequence[int], names: Sequence[str]) -> Iterator[None]:
    """Add the images to the text of a `StreamError` that the block raises.

    Parameters
    ----------
    where
        What was done with them, such as "update 3 of epoch 1".
    positions, names
        Positions and names of the images in their data set; errors in opening an image name it already.
    """
    try:
        yield
    except CannotWrite:
        raise  # that is about the disk
    except StreamError as error:
        text = str(error)
        error.args = (f"{text} ({where}, {listed(positions, names, text)})", *error.args[1:])
        raise


def open_batch(
    images: LabelledImages, positions: Sequence[int], where: str
) -> tuple[list[ImageSource], Tensor, *tuple[Tensor, ...]]:
    """The images at ``positions`` as a batch, as `collate` makes it; errors name the image."""
    samples: list[Sample] = []
    for position in positions:
        with naming(where, [position], [""]):
            samples.append(images[position])
    with naming(where, positions, [sample[0].name for sample in samples]):
        return collate(samples)
