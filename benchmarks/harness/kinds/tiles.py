"""Pieces of an image that are classified without context, and vote."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from benchmarks.harness.classifiers import TileVote, make_net
from benchmarks.harness.method import TrainedMethod
from benchmarks.harness.task import Task
from streamcnn.data.sources import ImageSource
from streamcnn.training import Trainer


class PiecesTrainer(Trainer):
    """Trains what reads images in pieces; of gradients that overflow where all pieces are blank, nothing."""

    def differentiate(
        self, sources: list[ImageSource], labels: Tensor, weight: float
    ) -> tuple[float, Tensor]:
        """Add the gradients of a batch; its loss and logits."""
        found = super().differentiate(sources, labels, weight)
        for parameter in self.model.parameters():
            if parameter.grad is not None:
                parameter.grad.nan_to_num_(0.0, 0.0, 0.0)
        return found


@dataclass(frozen=True, slots=True, kw_only=True)
class PiecewiseMethod(TrainedMethod):
    """What gives each piece of an image to a network."""

    needs = ("tile", *TrainedMethod.needs)
    trainer = PiecesTrainer

    def make_net(self, task: Task, outputs: int, **options: Any) -> tuple[nn.Module, int]:
        """A network of so many outputs, made as `make_net` says, and the edge of its pieces in pixels."""
        assert self.model is not None
        assert self.tile is not None
        tile = task.scale.pixels(self.tile)
        return make_net(self.model, outputs, tile, pretrained=task.pretrained, **options), tile


@dataclass(frozen=True, slots=True, kw_only=True)
class Tiles(PiecewiseMethod):
    """The logits of pieces are averaged: `TileVote`."""

    kind = "tiles"
    label = "independent tiles"
    marker = "s"

    def make_model(self, task: Task, size: int) -> nn.Module:
        """The network at the size of a piece."""
        net, tile = self.make_net(task, task.scale.recipe.num_classes)
        return TileVote(net, tile, self.share).to(task.device)
