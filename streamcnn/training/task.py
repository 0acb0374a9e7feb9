"""The task that a model is trained for: whatever differs between kinds of runs."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Generic, Protocol, TypeVar

import torch
from torch import Tensor, nn

from streamcnn.data.augmentation import RandomAugmentation
from streamcnn.data.dataset import Images
from streamcnn.data.sources import ImageChoice, ImageSource
from streamcnn.plan.plan import Plan
from streamcnn.runtime.streaming_model import StreamingModel
from streamcnn.training.processes import Each

I = TypeVar("I", bound=Images)  # noqa: E741
Batch = tuple[list[ImageSource], Any, *tuple[Tensor, ...]]
"""Images, their targets, and further inputs of the model."""


class Evaluation(Protocol):
    """A model's loss and score on a set of images."""

    @property
    def loss(self) -> float:
        """The mean of the images' losses."""

    @property
    def value(self) -> float:
        """The score by which the best weights are chosen, from 0 to 1: the task's measure."""

    def to_log(self) -> dict[str, Any]:
        """The values for the epoch's line of the log, besides the loss."""

    def keep(self, folder: Path) -> None:
        """Write what the run's page needs besides the log into the run's folder."""


@dataclass(frozen=True, slots=True)
class Shown:
    """The parts of a run's page that the task makes, as HTML."""

    curves: str
    """Figures over the epochs."""
    results: str
    """Results of the best epoch."""


class Task(ABC, Generic[I]):
    """The task that a model is trained for; the rest of a run, such as checkpoints, is the same for all."""

    name: ClassVar[str]
    measure: ClassVar[str]
    """The name in texts of the score by which the best weights are chosen."""
    logged: ClassVar[str]
    """The name of that score in an epoch's line of the log."""
    detail: ClassVar[str]
    """A field of an epoch's line that no other task has, from which the page is made."""

    @property
    @abstractmethod
    def loss_name(self) -> str:
        """The name in texts of the loss."""

    @abstractmethod
    def identity(self) -> dict[str, Any]:
        """What has to be the same for a run to be resumed; by default, what older runs lack is None."""

    # --- data ----------------------------------------------------------------------------------------

    @abstractmethod
    def open_images(
        self,
        data: str,
        split: str | None,
        *,
        choice: ImageChoice,
        positions: Sequence[int] | None = None,
        augmentation: RandomAugmentation | None = None,
        seed: int = 0,
    ) -> I:
        """Open the images of a split.

        Raises
        ------
        DatasetMismatch
            If there are no such images, or they are not of the task's kind.
        """

    @abstractmethod
    def groups(self, images: I) -> Sequence[Hashable]:
        """A group for each image; images set aside for validation are the same share of every group."""

    @abstractmethod
    def num_classes(self, images: I, validation: I, model: StreamingModel | None = None) -> int | None:
        """The number of classes of the model; None if only the model tells it and there is none yet."""

    @abstractmethod
    def class_names(self, images: I) -> tuple[str, ...] | None:
        """Names of the classes 0, 1, …; None if they have none."""

    @abstractmethod
    def open_batch(self, images: I, positions: Sequence[int], where: str) -> Batch:
        """Open the images at ``positions`` as a batch; errors name the image, and ``where`` it was needed."""

    # --- training ------------------------------------------------------------------------------------

    @abstractmethod
    def require_usable(self, model: nn.Module) -> None:
        """Make sure that the model and the installed packages suit the task, before anything is read.

        Raises
        ------
        ValueError
            If the model is not of the kind that the task needs.
        MissingExtra
            If a package is not installed.
        """

    @abstractmethod
    def check(self, model: nn.Module, images: Mapping[str, I], before_image: Callable[[], None]) -> None:
        """Make sure that a model fits its images, before it is trained for the first time.

        Parameters
        ----------
        model, images
            The model, and its sets of images by purpose: ``"training"`` and ``"validation"``.
        before_image
            Called before each image that is read; an error that it raises ends the check.

        Raises
        ------
        DatasetMismatch
            If the model does not fit.
        """

    @abstractmethod
    def plan(self, model: StreamingModel, images: I, batch_size: int, device: torch.device) -> Plan:
        """The plan of an update's passes, in the model's present mode, for batches of the first image."""

    @abstractmethod
    def loss(
        self, model: nn.Module, sources: list[ImageSource], targets: Any, *inputs: Tensor
    ) -> tuple[Tensor, Tensor | None]:
        """The sum of a batch's losses, and its logits (N, classes), detached, or None for other tasks."""

    @abstractmethod
    def sums(self, logits: Tensor | None, targets: Any) -> dict[str, float]:
        """Sums over a batch by name; the log has their means over images under these names."""

    @abstractmethod
    def evaluate(
        self,
        model: nn.Module,
        images: I,
        *,
        batch_size: int,
        casting: Callable[[], AbstractContextManager[None]],
        each: Each,
        device: torch.device,
    ) -> Evaluation:
        """Evaluate a model on ``images`` without gradients; the caller sets the model's mode and weights.

        Parameters
        ----------
        model, images, batch_size
            The model, the images, and how many of them go into a batch.
        casting
            Makes the context manager in which each batch is evaluated, such as autocast.
        each
            Evaluates each batch, in this or another process, and returns all results in order. Results are
            on the CPU and can be pickled.
        device
            The model's device.

        Raises
        ------
        DatasetMismatch
            If an image's target does not fit the model's result.
        TrainingDiverged
            If the model gives NaN or infinity for an image; the text names it.
        """

    # --- what is told of it --------------------------------------------------------------------------

    @abstractmethod
    def told(self, epoch: Mapping[str, Any]) -> str:
        """A one-line summary of an epoch's line of the log."""

    @abstractmethod
    def told_of_classes(self, epoch: Mapping[str, Any]) -> Sequence[str]:
        """The scores of each class in an epoch's line of the log, as lines for a terminal."""

    @abstractmethod
    def shown(
        self, epochs: Sequence[Mapping[str, Any]], best: Mapping[str, Any], images: I, folder: Path | None
    ) -> Shown:
        """The task's parts of the run's page.

        Parameters
        ----------
        epochs, best
            The epochs' lines of the log, and that of the best weights.
        images
            The validation images.
        folder
            The run's folder; None if nothing is kept.

        Raises
        ------
        RunMismatch
            If the log was written for other images.
        """
