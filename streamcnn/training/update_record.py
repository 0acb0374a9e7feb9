"""What an update was measured at, as the log has it."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from typing import Any

from streamcnn.data.sources import ImageSource
from streamcnn.runtime.report import Report


class UpdateRecord:
    """Adds up what the batches of an update give; its time begins when it is made."""

    def __init__(self) -> None:
        self._start = time.perf_counter()
        self._num_pixels = 0
        self._reports: list[Report] = []
        self.num_images = 0
        self.loss_sum = 0.0
        self.sums: dict[str, float] = {}
        """Of what the task tells of each image, by name."""

    def add(self, sources: Sequence[ImageSource], loss: float, sums: Mapping[str, float]) -> None:
        """Add a batch, with the sum of its images' losses and what else is summed over them."""
        self.num_images += len(sources)
        self._num_pixels += sum(math.prod(source.shape[1:]) for source in sources)
        self.loss_sum += loss
        add_to(self.sums, sums)

    def add_report(self, report: Report) -> None:
        """Add what a streamed pass measured."""
        self._reports.append(report)

    def values(self, *, epoch: int, learning_rate: float) -> dict[str, Any]:
        """The update's line of the log; its time ends now."""
        seconds = time.perf_counter() - self._start
        measured = [report.measured_bytes for report in self._reports if report.measured_bytes is not None]
        return {
            "epoch": epoch,
            "loss": self.loss_sum / self.num_images,
            **{name: value / self.num_images for name, value in self.sums.items()},
            "learning_rate": learning_rate,
            "seconds": seconds,
            "megapixels_per_second": self._num_pixels / seconds / 1e6,
            "measured_bytes": max(measured, default=None),
            "projected_bytes": max((report.projected_bytes for report in self._reports), default=None),
            "retries": sum(report.num_retries for report in self._reports),
        }


def add_to(sums: dict[str, float], further: Mapping[str, float]) -> None:
    """Add values by name to sums of such."""
    for name, value in further.items():
        sums[name] = sums.get(name, 0) + value
