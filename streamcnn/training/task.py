"""What a model is trained for: all that differs from one kind of run to another."""

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
"""Images, what is to be found in them, and what else goes into the model."""


class Evaluation(Protocol):
    """What a model made of some images."""

    @property
    def loss(self) -> float:
        """Mean of the images' losses."""

    @property
    def value(self) -> float:
        """What the best weights are chosen by, from 0 to 1: the task's measure."""

    def to_log(self) -> dict[str, Any]:
        """What an epoch's line of the log has of it, besides the loss."""

    def keep(self, folder: Path) -> None:
        """Write what the run's page shows besides the log into the run's folder."""


@dataclass(frozen=True, slots=True)
class Shown:
    """What a run's page shows of a task, as HTML."""

    curves: str
    """Figures over the epochs."""
    results: str
    """Of the best epoch."""


class Task(ABC, Generic[I]):
    """What a model is trained for. The rest of a run, such as checkpoints, is the same for all tasks."""

    name: ClassVar[str]
    measure: ClassVar[str]
    """What the best weights are chosen by, as texts say it."""
    logged: ClassVar[str]
    """Its name in an epoch's line of the log."""
    detail: ClassVar[str]
    """What no other task's lines have: what the page is made of."""

    @property
    @abstractmethod
    def loss_name(self) -> str:
        """What the loss is the mean of, as texts say it."""

    @abstractmethod
    def identity(self) -> dict[str, Any]:
        """What has to be the same for a run to go on; what earlier versions had not is None by default."""

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
        """The images of a split.

        Raises
        ------
        DatasetMismatch
            If they are not there, or are none of the task's.
        """

    @abstractmethod
    def groups(self, images: I) -> Sequence[Hashable]:
        """What is shared out evenly when images are set aside for validation: a value for each image."""

    @abstractmethod
    def num_classes(self, images: I, validation: I, model: StreamingModel | None = None) -> int | None:
        """How many classes the model tells apart; None where it alone says that, and is not there yet."""

    @abstractmethod
    def class_names(self, images: I) -> tuple[str, ...] | None:
        """Names of the classes 0, 1, …; None where they are numbers."""

    @abstractmethod
    def open_batch(self, images: I, positions: Sequence[int], where: str) -> Batch:
        """The images at ``positions``; errors name the image, and ``where`` it was needed."""

    # --- training ------------------------------------------------------------------------------------

    @abstractmethod
    def require_usable(self, model: nn.Module) -> None:
        """Make sure that what the task needs is there, before anything is read.

        Raises
        ------
        ValueError
            If the model is none for the task.
        MissingExtra
            If a package is not installed.
        """

    @abstractmethod
    def check(self, model: nn.Module, images: Mapping[str, I], before_image: Callable[[], None]) -> None:
        """Make sure that a model fits its images, before it is trained for the first time.

        Parameters
        ----------
        model, images
            The model, and its sets of images by what they are for.
        before_image
            Called before each image that is read; an error of its own ends the check.

        Raises
        ------
        DatasetMismatch
            If it does not.
        """

    @abstractmethod
    def plan(self, model: StreamingModel, images: I, batch_size: int, device: torch.device) -> Plan:
        """How updates are carried out, in the model's present mode; the plan is that of the first image."""

    @abstractmethod
    def loss(
        self, model: nn.Module, sources: list[ImageSource], targets: Any, *inputs: Tensor
    ) -> tuple[Tensor, Tensor | None]:
        """The sum of a batch's losses, and the logits (N, classes) if there are such, detached."""

    @abstractmethod
    def sums(self, logits: Tensor | None, targets: Any) -> dict[str, float]:
        """Sums over a batch, whose means over images the log has by these names."""

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
        """What a model makes of ``images``, without gradients; modes and weights are the caller's.

        Parameters
        ----------
        model, images, batch_size
            What is evaluated on which images, so many at a time.
        casting
            The block in which it is.
        each
            Evaluates each batch, here or in another process, and gives what came of all of them, in order:
            what can be pickled, on the CPU.
        device
            Where the model is.

        Raises
        ------
        DatasetMismatch
            If what is known of an image does not fit what the model gives.
        TrainingDiverged
            If the model gives NaN or infinity for an image; the text names it.
        """

    # --- what is told of it --------------------------------------------------------------------------

    @abstractmethod
    def told(self, epoch: Mapping[str, Any]) -> str:
        """An epoch's line of the log in a few words."""

    @abstractmethod
    def told_of_classes(self, epoch: Mapping[str, Any]) -> Sequence[str]:
        """The scores of each class in an epoch's line of the log, as lines for a terminal."""

    @abstractmethod
    def shown(
        self, epochs: Sequence[Mapping[str, Any]], best: Mapping[str, Any], images: I, folder: Path | None
    ) -> Shown:
        """What the run's page shows.

        Parameters
        ----------
        epochs, best
            Lines of the log, and which of these is of the best weights.
        images
            The validation images.
        folder
            Of the run; None if nothing is kept.

        Raises
        ------
        RunMismatch
            If the images are others than those of the log.
        """
