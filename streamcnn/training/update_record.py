"""What an update was measured at, as the log has it."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from typing import Any

from torch import Tensor

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
        self.num_right = 0
        """Images whose label the model found."""

    def add(self, sources: Sequence[ImageSource], labels: Tensor, loss: float, logits: Tensor) -> None:
        """Add a batch, with the sum of its images' losses and their logits ``(N, classes)``."""
        self.num_images += len(sources)
        self._num_pixels += sum(math.prod(source.shape[1:]) for source in sources)
        self.loss_sum += loss
        self.num_right += int((logits.argmax(1).cpu() == labels).sum())

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
            "accuracy": self.num_right / self.num_images,
            "learning_rate": learning_rate,
            "seconds": seconds,
            "megapixels_per_second": self._num_pixels / seconds / 1e6,
            "measured_bytes": max(measured, default=None),
            "projected_bytes": max((report.projected_bytes for report in self._reports), default=None),
            "retries": sum(report.num_retries for report in self._reports),
        }
