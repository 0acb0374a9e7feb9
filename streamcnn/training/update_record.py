"""The measurements of an update, as the log has them."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from streamcnn.data.sources import ImageSource
from streamcnn.runtime.report import Report


@dataclass(frozen=True, slots=True)
class BatchRecord:
    """Sums and measurements of one batch."""

    num_images: int
    num_pixels: int
    loss: float
    """Sum of its images' losses."""
    sums: Mapping[str, float]
    """Sums of the task's measures of each image, by name."""
    measured_bytes: int | None = None
    projected_bytes: int | None = None
    num_retries: int = 0

    @classmethod
    def of(
        cls, sources: Sequence[ImageSource], loss: float, sums: Mapping[str, float], report: Report | None
    ) -> BatchRecord:
        """The record of a batch of images, with the bytes in the report of their streamed pass, if any."""
        return cls(
            len(sources),
            sum(math.prod(source.shape[1:]) for source in sources),
            loss,
            sums,
            *(() if report is None else (report.measured_bytes, report.projected_bytes, report.num_retries)),
        )


class UpdateRecord:
    """Sums over the batches of an update; its time runs from when it is created."""

    def __init__(self) -> None:
        self._start = time.perf_counter()
        self._batches: list[BatchRecord] = []

    def add(self, batches: Sequence[BatchRecord]) -> None:
        """Add batches, in the order of their images."""
        self._batches += batches

    @property
    def num_images(self) -> int:
        """Images in all batches."""
        return sum(batch.num_images for batch in self._batches)

    @property
    def loss_sum(self) -> float:
        """The sum of all images' losses."""
        return sum(batch.loss for batch in self._batches)

    @property
    def sums(self) -> dict[str, float]:
        """Sums of the task's measures of each image, by name."""
        found: dict[str, float] = {}
        for batch in self._batches:
            add_to(found, batch.sums)
        return found

    def values(self, *, epoch: int, learning_rate: float) -> dict[str, Any]:
        """The values of the update's line of the log; its time ends with this call."""
        seconds = time.perf_counter() - self._start
        return {
            "epoch": epoch,
            "loss": self.loss_sum / self.num_images,
            **{name: value / self.num_images for name, value in self.sums.items()},
            "learning_rate": learning_rate,
            "seconds": seconds,
            "megapixels_per_second": sum(batch.num_pixels for batch in self._batches) / seconds / 1e6,
            "measured_bytes": max(self._known("measured_bytes"), default=None),
            "projected_bytes": max(self._known("projected_bytes"), default=None),
            "retries": sum(batch.num_retries for batch in self._batches),
        }

    def _known(self, name: str) -> Iterator[int]:
        """The values of the field ``name`` in all batches that have it."""
        return (found for batch in self._batches if (found := getattr(batch, name)) is not None)


def add_to(sums: dict[str, float], further: Mapping[str, float]) -> None:
    """Add each value of ``further`` to the sum of the same name."""
    for name, value in further.items():
        sums[name] = sums.get(name, 0) + value
