"""Outside the rules: streamed, finds the digits and adds them up, having been trained on each."""

from __future__ import annotations

from dataclasses import dataclass

from benchmarks.harness.detector import DetectorTrainer, DigitSums, ImagesWithDigits
from benchmarks.harness.kinds.stream import Stream
from benchmarks.harness.method import Datasets, TrainingStage
from benchmarks.harness.task import Task
from streamcnn.data.dataset import TileDataset


@dataclass(frozen=True, slots=True, kw_only=True)
class Detector(Stream):
    """A `DigitDetector`, trained on boxes and values."""

    kind = "detector"
    label = "outside the rules"
    marker = "x"
    stands_out = False
    trainer = DetectorTrainer
    streaming_model = DigitSums

    def datasets(self, task: Task, stage: TrainingStage) -> Datasets:
        """Those of streamed methods; to train on, with their digits."""
        train, validation, test = Stream.datasets(self, task, stage)
        assert isinstance(train, TileDataset)
        return Datasets(ImagesWithDigits(train), validation, test)
