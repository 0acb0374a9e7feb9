"""A method at its task, under the ceiling."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from benchmarks.harness.attempts import Attempts
from benchmarks.harness.classifiers import leave_out_compiled_code
from benchmarks.harness.method import TrainedMethod
from benchmarks.harness.row_ceiling import RowCeiling
from benchmarks.harness.task import Task
from streamcnn import StreamingModel
from streamcnn.data.dataset import LabelledImages


@dataclass(frozen=True, slots=True)
class Trial:
    """What a batch search and a training run are handed."""

    method: TrainedMethod
    task: Task
    ceiling: RowCeiling
    attempts: Attempts

    def make_model(self, images: LabelledImages) -> nn.Module:
        """The method's classifier of such images on the device, the same every time."""
        size = images[0][0].shape[1]
        torch.manual_seed(self.task.seed)
        model = self.method.make_model(self.task, size)
        if self.task.device == "cpu" and not isinstance(model, StreamingModel):
            leave_out_compiled_code(model, self.ceiling.check)
        return model

    @property
    def seconds_of_a_stage(self) -> float | None:
        """A stage's share of the scale's time; None if there is no end to it."""
        seconds = self.task.scale.seconds
        return None if seconds is None else seconds / len(self.method.training_stages)

    @property
    def identity(self) -> dict[str, Any]:
        """What has to be the same for a row's training to go on."""
        return {
            "method": self.method.to_dict(),
            "scale": self.task.scale.name,
            "row_budget": self.task.budget,
        }
