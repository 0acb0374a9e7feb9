"""Classification: each image has a label."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from streamcnn.data.augmentation import RandomAugmentation
from streamcnn.data.dataset import ImageDataset, collate
from streamcnn.data.file_dataset import open_dataset
from streamcnn.data.sources import ImageChoice, ImageSource
from streamcnn.plan.plan import Plan
from streamcnn.runtime.streaming_model import StreamingModel
from streamcnn.training.classification_page import shown
from streamcnn.training.evaluation import Score, require_labels, require_metrics, score
from streamcnn.training.naming import open_batch
from streamcnn.training.processes import Each
from streamcnn.training.task import Batch, Shown, Task


@dataclass(frozen=True, slots=True)
class Classification(Task[ImageDataset]):
    """Classification of whole images: a model that gives logits (N, classes), trained by cross-entropy."""

    inputs: tuple[str, ...] = ()
    """Columns of the CSV file whose numbers go into the model after the image."""

    name = "classification"
    measure = "accuracy"
    logged = "validation_accuracy"
    detail = "predictions"

    @property
    def loss_name(self) -> str:
        """The loss's name in texts: it is of the logits."""
        return "cross-entropy"

    def identity(self) -> dict[str, Any]:
        """The CSV columns that are further inputs of the model."""
        return {"inputs": list(self.inputs) or None}

    def open_images(
        self,
        data: str,
        split: str | None,
        *,
        choice: ImageChoice,
        positions: Sequence[int] | None = None,
        augmentation: RandomAugmentation | None = None,
        seed: int = 0,
    ) -> ImageDataset:
        """The labelled images of a tile store, a CSV file or folders of classes."""
        return open_dataset(
            data,
            split,
            positions=positions,
            augmentation=augmentation,
            seed=seed,
            choice=choice,
            inputs=self.inputs,
        )

    def groups(self, images: ImageDataset) -> Sequence[int]:
        """The label of each image."""
        return images.labels

    def num_classes(
        self, images: ImageDataset, validation: ImageDataset, model: StreamingModel | None = None
    ) -> int:
        """One more than the largest label."""
        return max(images.num_classes, validation.num_classes)

    def class_names(self, images: ImageDataset) -> tuple[str, ...] | None:
        """The names of the labels."""
        return images.classes

    def open_batch(self, images: ImageDataset, positions: Sequence[int], where: str) -> Batch:
        """The images, their labels (N,) as int64, and further inputs."""
        return open_batch(images, positions, where)

    def require_usable(self, model: nn.Module) -> None:
        """Make sure that torchmetrics is installed, which computes the scores; any module may give logits."""
        require_metrics()

    def check(
        self, model: nn.Module, images: Mapping[str, ImageDataset], before_image: Callable[[], None]
    ) -> None:
        """Check nothing: labels are compared with each batch's logits, which have the number of classes."""

    def plan(
        self, model: StreamingModel, images: ImageDataset, batch_size: int, device: torch.device
    ) -> Plan:
        """The plan of the model's own forward and backward pass."""
        sources, _, *inputs = collate([images[0]] * batch_size)
        return model.plan(sources, inputs=[each.to(device) for each in inputs])

    def loss(
        self, model: nn.Module, sources: list[ImageSource], targets: Tensor, *inputs: Tensor
    ) -> tuple[Tensor, Tensor]:
        """The sum of the batch's cross-entropies, and its logits (N, classes), detached."""
        logits = model(sources, *inputs)
        require_labels(targets, logits)
        return F.cross_entropy(logits, targets.to(logits.device), reduction="sum"), logits.detach()

    def sums(self, logits: Tensor | None, targets: Tensor) -> dict[str, float]:
        """The number of images of the batch that are classified correctly, as ``accuracy``."""
        assert logits is not None
        return {"accuracy": int((logits.argmax(1).cpu() == targets).sum())}

    def evaluate(
        self,
        model: nn.Module,
        images: ImageDataset,
        *,
        batch_size: int,
        casting: Callable[[], AbstractContextManager[None]],
        each: Each,
        device: torch.device,
    ) -> Score:
        """Loss, accuracy and predictions; see `score`."""
        return score(model, images, batch_size=batch_size, casting=casting, each=each, device=device)

    def told(self, epoch: Mapping[str, Any]) -> str:
        """Loss and accuracy, in training and validation."""
        return (
            f"loss {epoch['loss']:.4f}, accuracy {epoch['accuracy']:.1%}; "
            f"validation {epoch['validation_loss']:.4f}, {epoch['validation_accuracy']:.1%}"
        )

    def told_of_classes(self, epoch: Mapping[str, Any]) -> Sequence[str]:
        """No lines: an epoch's line of the log has no scores of classes."""
        return ()

    def shown(
        self,
        epochs: Sequence[Mapping[str, Any]],
        best: Mapping[str, Any],
        images: ImageDataset,
        folder: Path | None,
    ) -> Shown:
        """The accuracy over the epochs, the confusion matrix, and pictures of misclassified images."""
        return shown(epochs, best, images)
