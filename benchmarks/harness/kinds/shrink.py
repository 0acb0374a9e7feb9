"""Plain PyTorch on images that are shrunk beforehand."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn

from benchmarks.harness.classifiers import WholeImages, make_net
from benchmarks.harness.images import ShrunkImages, steps_to
from benchmarks.harness.method import TrainedMethod, TrainingStage
from benchmarks.harness.scales import Scale
from benchmarks.harness.task import Task
from streamcnn.data.augmentation import RandomAugmentation
from streamcnn.data.dataset import ImageDataset


@dataclass(frozen=True, slots=True, kw_only=True)
class Shrink(TrainedMethod):
    """Images are shrunk by area interpolation, once for a resolution."""

    kind = "shrink"
    needs = ("resolution", *TrainedMethod.needs)
    marker = "o-"

    def make_model(self, task: Task, size: int) -> nn.Module:
        """The network alone."""
        assert self.model is not None
        net = make_net(self.model, task.scale.recipe.num_classes, size, pretrained=task.pretrained)
        return WholeImages(net).to(task.device)

    def open_images(
        self,
        task: Task,
        stage: TrainingStage,
        split: str,
        positions: Sequence[int] | None = None,
        augmentation: RandomAugmentation | None = None,
    ) -> ImageDataset:
        """Images of a split, shrunk to the stage's resolution."""
        return ShrunkImages(
            task.store,
            split,
            steps_to(stage.resolution, task.scale),
            task.shrunk,
            positions=positions,
            augmentation=augmentation,
            seed=task.seed,
        )

    def num_epochs(self, scale: Scale) -> int:
        """More of them, where epochs on shrunk images are short."""
        return scale.epochs_when_shrunk or scale.epochs
