"""A grid of features is filled patch by patch, and gradients flow through a few patches at a time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from benchmarks.harness.classifiers import PatchGD, grid_size
from benchmarks.harness.kinds.tiles import PiecesTrainer, PiecewiseMethod
from benchmarks.harness.task import Task
from streamcnn.data.sources import ImageSource

FEATURES = 256
"""Width of a patch's feature vector."""


class PatchGDTrainer(PiecesTrainer):
    """Trains by the inner steps of `PatchGD`."""

    def differentiate(
        self, sources: list[ImageSource], labels: Tensor, weight: float
    ) -> tuple[float, Tensor]:
        """Add the gradients of all inner steps; loss and logits are those of the last."""
        assert isinstance(self.model, PatchGD)
        self.model.begin(sources)
        num_steps = self.model.num_inner_steps
        for _ in range(num_steps):
            loss, logits = super().differentiate(sources, labels, weight / num_steps)
        return loss, logits


@dataclass(frozen=True, slots=True, kw_only=True)
class PatchGradientDescent(PiecewiseMethod):
    """`PatchGD` of the image's patches."""

    kind = "patchgd"
    label = "PatchGD"
    marker = "D"
    trainer = PatchGDTrainer

    def make_model(self, task: Task, size: int) -> nn.Module:
        """The network at the size of a patch, as features, and the head on their grid."""
        net, tile = self.make_net(task, FEATURES, hidden=None)
        model = PatchGD(
            net,
            tile,
            self.share,
            width=FEATURES,
            grid_size=grid_size(size, tile),
            num_classes=task.scale.recipe.num_classes,
        )
        return model.to(task.device)

    def begin_update(self, model: nn.Module, sources: Sequence[ImageSource]) -> None:
        """Fill the grid."""
        assert isinstance(model, PatchGD)
        model.begin(sources)
