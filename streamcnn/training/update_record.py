"""What an update was measured at, as the log has it."""

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
    """What a batch gives."""

    num_images: int
    num_pixels: int
    loss: float
    """Sum of its images' losses."""
    sums: Mapping[str, float]
    """Of what the task tells of each image, by name."""
    measured_bytes: int | None = None
    projected_bytes: int | None = None
    num_retries: int = 0

    @classmethod
    def of(
        cls, sources: Sequence[ImageSource], loss: float, sums: Mapping[str, float], report: Report | None
    ) -> BatchRecord:
        """That of some images, with what their streamed pass measured."""
        return cls(
            len(sources),
            sum(math.prod(source.shape[1:]) for source in sources),
            loss,
            sums,
            *(() if report is None else (report.measured_bytes, report.projected_bytes, report.num_retries)),
        )


class UpdateRecord:
    """Adds up what the batches of an update give; its time begins when it is made."""

    def __init__(self) -> None:
        self._start = time.perf_counter()
        self._batches: list[BatchRecord] = []

    def add(self, batches: Sequence[BatchRecord]) -> None:
        """Add batches, in the order of their images."""
        self._batches += batches

    @property
    def num_images(self) -> int:
        """Of all batches."""
        return sum(batch.num_images for batch in self._batches)

    @property
    def loss_sum(self) -> float:
        """Of the losses of all images."""
        return sum(batch.loss for batch in self._batches)

    @property
    def sums(self) -> dict[str, float]:
        """Of what the task tells of each image, by name."""
        found: dict[str, float] = {}
        for batch in self._batches:
            add_to(found, batch.sums)
        return found

    def values(self, *, epoch: int, learning_rate: float) -> dict[str, Any]:
        """The update's line of the log; its time ends now."""
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
        """A value of all batches that have it."""
        return (found for batch in self._batches if (found := getattr(batch, name)) is not None)


def add_to(sums: dict[str, float], further: Mapping[str, float]) -> None:
    """Add values by name to sums of such."""
    for name, value in further.items():
        sums[name] = sums.get(name, 0) + value
