"""The largest label: a classifier has an output, and so weights, for each number up to it."""

from __future__ import annotations

from collections.abc import Sequence

from streamcnn.errors import DatasetMismatch

MOST_CLASSES = 2**16
"""Largest number of classes, unless there are more images."""


def require_labels(labels: Sequence[int], what: str = "labels") -> None:
    """Make sure that labels are valid numbers of classes.

    Parameters
    ----------
    labels
        The labels of all images.
    what
        Name of the labels in the error.

    Raises
    ------
    DatasetMismatch
        If one is negative, or as large as the larger of ``MOST_CLASSES`` and the number of images.
    """
    most = max(MOST_CLASSES, len(labels))
    for label in (min(labels, default=0), max(labels, default=0)):
        if not 0 <= label < most:
            raise DatasetMismatch(
                f"{what} have {label}: allowed are 0 to {most - 1} where there are {len(labels)} images; "
                "number the classes from 0 on, or give their names"
            )
