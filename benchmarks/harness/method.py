"""Methods: what a file in `methods/` says of one, and what a kind of method has to bring."""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, ClassVar, NamedTuple

from torch import nn

from benchmarks.harness.batch_search import BatchSearch, TriedBatch
from benchmarks.harness.scales import Scale
from benchmarks.harness.task import Task
from streamcnn.data.augmentation import RandomAugmentation
from streamcnn.data.dataset import ImageDataset, LabelledImages, TileDataset
from streamcnn.data.sampling import divide
from streamcnn.data.sources import ImageSource
from streamcnn.support.units import parse_bytes
from streamcnn.training import Trainer, TrainSettings

VALIDATION_SHARE = 0.1
PATIENCE = 10
"""Epochs without a better validation accuracy after which training ends."""
PLATEAU = 2
"""The same after which a schedule that looks for plateaus lowers the learning rate."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Hyperparameters:
    """What a method is trained with where there is so much memory: the paper's, where it has figures."""

    budget: str
    learning_rate: float
    gamma: float = 1.0
    """Factor of the learning rate after each epoch."""
    batch: int | None = None
    """What the paper's search for the largest batch found; of streamed methods, what they take at 4000²."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingStage:
    """One of several trainings, each going on with the weights of the one before."""

    resolution: int
    learning_rate: float


class Datasets(NamedTuple):
    """What a stage of training reads."""

    train: LabelledImages
    validation: LabelledImages
    test: LabelledImages


@dataclass(frozen=True, slots=True, kw_only=True)
class Method:
    """One row of the table. Lengths are pixels of the paper's canvas of 4000.

    Raises
    ------
    ValueError
        If a kind of method lacks what it needs.
    """

    kind: ClassVar[str]
    """What files call such methods."""
    needs: ClassVar[tuple[str, ...]] = ()
    """Fields that a file has to give."""
    label: ClassVar[str] = ""
    """After the backbone in a figure's legend."""
    marker: ClassVar[str] = "o"
    """In figures, as matplotlib has it, with the line that joins several."""
    stands_out: ClassVar[bool] = False
    """Whether the marker is a large one."""

    name: str
    family: str
    """The backbone, as a table calls it."""
    model: str | None = None
    """A timm name, or ``package.module:factory``, which is called with the number of classes."""
    resolution: int | None = None
    """Height and width that images are shrunk to; None leaves them as they are."""
    tile: int | None = None
    """Height and width of pieces and patches."""
    share: float = 1.0
    """Pieces or patches of an image that are sampled at a time, as a share of all."""
    inversion: float = 0.0
    """Share of training images that are inverted."""
    schedule: str = "ExponentialLR"
    clip_norm: float | None = None
    """Largest norm of the gradients of an update."""
    stages: tuple[TrainingStage, ...] = ()
    hyperparameters: tuple[Hyperparameters, ...] = ()
    published: Mapping[str, str] = field(default_factory=dict)
    """Accuracies in percent as the paper has them, by the column of its table."""
    note: str = ""
    """For the table's last column."""

    def __post_init__(self) -> None:
        missing = [name for name in self.needs if not getattr(self, name)]
        if missing:
            raise ValueError(f"method {self.name} of kind {self.kind} has no {' and no '.join(missing)}")
        for known in self.hyperparameters:
            parse_bytes(known.budget)

    @property
    def has_weights(self) -> bool:
        """Whether there may be pretrained weights for the model."""
        return self.model is not None and ":" not in self.model

    @property
    def input_text(self) -> str:
        """The resolution that the network sees on the paper's canvas, for a table."""
        return "full" if self.resolution is None else f"{self.resolution}²"

    def to_dict(self) -> dict[str, Any]:
        """All that a file says, as JSON has it."""
        fields: dict[str, Any] = json.loads(json.dumps(asdict(self)))
        return {**fields, "kind": self.kind}

    def hyperparameters_for(self, budget: int) -> Hyperparameters:
        """Those of the largest budget in the paper that is no larger than ``budget``, or of the smallest."""
        known = sorted(self.hyperparameters, key=lambda found: parse_bytes(found.budget) or 0)
        within = [found for found in known if (parse_bytes(found.budget) or 0) <= budget]
        return (within or known[:1])[-1]


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainedMethod(Method, ABC):
    """A method that is trained and scored: its data, its model, its trainer and its search for a batch.

    A kind of method is a subclass in a file of `kinds/`. It brings its model; the rest is that of plain
    PyTorch on whole images where it brings nothing else.
    """

    needs: ClassVar[tuple[str, ...]] = ("model", "hyperparameters")
    trainer: ClassVar[type[Trainer]] = Trainer
    """What makes the updates."""
    batch_search: ClassVar[BatchSearch] = TriedBatch()

    @abstractmethod
    def make_model(self, task: Task, size: int) -> nn.Module:
        """The classifier, from a list of image sources to logits (N, classes), on the task's device.

        Parameters
        ----------
        size
            Height and width of the images, in pixels.

        Raises
        ------
        Refused
            If its weights alone are too much.
        """

    @property
    def training_stages(self) -> tuple[TrainingStage, ...]:
        """Those of the file; one at the method's resolution if it says nothing."""
        return self.stages or (TrainingStage(resolution=self.resolution or 0, learning_rate=0.0),)

    def datasets(self, task: Task, stage: TrainingStage) -> Datasets:
        """For training, with augmentation, for validation, and for the test."""
        labels = TileDataset(task.store, "train").labels
        chosen, rest = divide(labels, share=VALIDATION_SHARE, seed=task.seed)
        augmentation = RandomAugmentation(inversion=self.inversion) if self.inversion else None
        return Datasets(
            self.open_images(task, stage, "train", chosen, augmentation),
            self.open_images(task, stage, "train", rest),
            self.open_images(task, stage, "test"),
        )

    def open_images(
        self,
        task: Task,
        stage: TrainingStage,
        split: str,
        positions: Sequence[int] | None = None,
        augmentation: RandomAugmentation | None = None,
    ) -> ImageDataset:
        """Images of a split, those at ``positions`` or all: whole ones, as they are stored."""
        return TileDataset(task.store, split, positions=positions, augmentation=augmentation, seed=task.seed)

    def num_epochs(self, scale: Scale) -> int:
        """The most passes over the training images."""
        return scale.epochs

    def settings(self, task: Task, stage: TrainingStage, batch_size: int) -> TrainSettings:
        """What a stage of training is carried out with."""
        known, scale = self.hyperparameters_for(task.budget), task.scale
        options = (
            {"gamma": scale.gamma or known.gamma}
            if self.schedule == "ExponentialLR"
            else {"patience": PLATEAU}
        )
        return TrainSettings(
            epochs=self.num_epochs(scale),
            batch_size=batch_size,
            learning_rate=scale.learning_rate or stage.learning_rate or known.learning_rate,
            schedule=self.schedule,
            schedule_options=options,
            clip_norm=self.clip_norm,
            patience=PATIENCE,
            save_every=500,
            seed=task.seed,
        )

    def begin_update(self, model: nn.Module, sources: Sequence[ImageSource]) -> None:
        """Bring a model to where it takes ``sources`` forward; most need nothing."""
