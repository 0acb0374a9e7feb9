"""A small network that learns to shrink images, in front of the classifier."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from benchmarks.harness.classifiers import LearnedResizer, WholeImages, make_net
from benchmarks.harness.method import TrainedMethod
from benchmarks.harness.task import Task


@dataclass(frozen=True, slots=True, kw_only=True)
class Resizer(TrainedMethod):
    """A `LearnedResizer`, trained together with the network."""

    kind = "resizer"
    needs = ("resolution", *TrainedMethod.needs)
    label = "learned resizer"
    marker = "^"

    def make_model(self, task: Task, size: int) -> nn.Module:
        """The resizer, and the network at the method's resolution."""
        assert self.model is not None
        assert self.resolution is not None
        resolution = task.scale.pixels(self.resolution)
        net = make_net(self.model, task.scale.recipe.num_classes, resolution, pretrained=task.pretrained)
        return WholeImages(nn.Sequential(LearnedResizer(resolution), net)).to(task.device)
