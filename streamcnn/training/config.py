"""The configuration of a run, as its file holds it: task, model, data and settings."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from streamcnn.data.augmentation import RandomAugmentation
from streamcnn.data.label_table import check_inputs
from streamcnn.data.normalisation import Normalise
from streamcnn.data.sampling import divide
from streamcnn.data.sources import DEFAULT_CHOICE, ImageChoice
from streamcnn.errors import RunMismatch
from streamcnn.runtime.streaming_model import StreamingModel
from streamcnn.support.documents import conform, require_storable
from streamcnn.support.models import is_factory, load_model
from streamcnn.training.classification import Classification
from streamcnn.training.segmentation import Segmentation
from streamcnn.training.segmentation_loss import SegmentationLoss
from streamcnn.training.settings import TrainSettings
from streamcnn.training.task import Task

RUN = "run.json"
OF_TASKS = ("task", "inputs", "masks", "empty_masks", "loss", "key", "class_names")
"""Values that a task is made of."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RunConfig:
    """Everything that determines a run, besides the images themselves and the versions of libraries.

    Raises
    ------
    ValueError
        If a value has no meaning; the text says what is allowed.
    """

    task: str = Classification.name
    """``"classification"`` of images, or ``"segmentation"`` of their pixels."""
    model: str
    """A timm name or ``package.module:factory``; for segmentation the latter."""
    model_options: Mapping[str, Any] = field(default_factory=dict)
    """Passed on to timm's ``create_model`` or to the factory."""
    data: str
    """A tile store, a CSV file or a folder of classes; see ``open_dataset``. For segmentation a CSV file or a
    folder of images; see ``MaskDataset``."""
    masks: str | None = None
    """For segmentation, if the data are a folder: that of the masks."""
    empty_masks: bool = False
    """For segmentation: whether masks in zarr may lack all their chunks; see ``MaskDataset``."""
    loss: SegmentationLoss | None = None
    """For segmentation; None takes the cross-entropy."""
    key: str | None = None
    """For segmentation: which of several results of the model the scores are."""
    class_names: tuple[str, ...] | None = None
    """For segmentation: of the classes 0, 1, …; None where they are numbers."""
    inputs: tuple[str, ...] = ()
    """Columns of the CSV file whose numbers go into the model after the image, as one tensor (N, K)."""
    split: str = "train"
    validation_split: str | None = None
    """None takes a share of the training images instead."""
    validation_share: float = 0.1
    """That share, the same of every label."""
    budget: int | None = None
    """Bytes that a pass may hold."""
    tile: tuple[int, int] | None = None
    """Height and width in pixels; None leaves it to the planner."""
    device: str = "cpu"
    """``"cpu"``, ``"cuda"``, or one GPU of several; it need not be here until the model is made."""
    choice: ImageChoice = DEFAULT_CHOICE
    """Which image of each file, in which resolution, and where its channels are."""
    normalise: Normalise = field(default_factory=Normalise)
    augmentation: RandomAugmentation = field(default_factory=RandomAugmentation)
    """Of the training images."""
    settings: TrainSettings = field(default_factory=TrainSettings)

    def __post_init__(self) -> None:
        if not 0 < self.validation_share < 1:
            raise ValueError(f"validation_share={self.validation_share}: allowed are shares between 0 and 1")
        if self.budget is not None and self.budget < 1:
            raise ValueError(f"budget={self.budget}: allowed are 1 byte and more, or None")
        if self.tile is not None and min(self.tile) < 1:
            raise ValueError(f"tile={self.tile}: allowed are heights and widths of 1 pixel and more, or None")
        require_storable("model_options", self.model_options)
        check_inputs(self.inputs)
        _require_device_name(self.device)
        self.make_task()

    def make_task(self) -> Task[Any]:
        """The task that the model is trained for.

        Raises
        ------
        ValueError
            If there is no such task, or a value does not belong to it.
        """
        if self.task not in _TASKS:
            raise ValueError(f"task={self.task!r}: allowed are {' and '.join(_TASKS)}")
        return _TASKS[self.task](self)

    def datasets(self) -> tuple[Any, Any]:
        """The training images, and the validation images, by which the best weights are chosen.

        Raises
        ------
        DatasetMismatch
            If a split is missing, an image has no label or mask, or the choice does not apply to an image.
        ValueError
            If there are too few images to set a share of them aside.
        """
        seed, task = self.settings.seed, self.make_task()
        read = partial(task.open_images, self.data, choice=self.choice)
        every = read(self.split)
        augmented = None if self.augmentation == RandomAugmentation() else self.augmentation
        if self.validation_split is not None:
            images = read(self.split, augmentation=augmented, seed=seed)
            return images, read(self.validation_split)
        chosen, rest = divide(task.groups(every), share=self.validation_share, seed=seed)
        if not chosen or not rest:
            raise ValueError(
                f"validation_share={self.validation_share} of {len(every)} images leaves {len(chosen)} to "
                f"train on and {len(rest)} to validate by: name a validation split, or take another share"
            )
        images = read(self.split, positions=chosen, augmentation=augmented, seed=seed)
        return images, read(self.split, positions=rest)

    def build(self, num_classes: int | None, num_channels: int) -> StreamingModel:
        """The model, not yet trained.

        Parameters
        ----------
        num_classes, num_channels
            Passed to timm, unless ``model_options`` say otherwise; a factory gets ``model_options`` alone.
        """
        torch.manual_seed(self.settings.seed)
        return StreamingModel(
            self.make_net(num_classes, num_channels),
            self.budget,
            tile=self.tile,
            preprocess=self.normalise,
            device=self.device,
        )

    def make_net(self, num_classes: int | None, num_channels: int) -> nn.Module:
        """The network alone; parameters are as for ``build``.

        Raises
        ------
        ValueError
            If there is no such model, or it does not take the options.
        """
        options = dict(self.model_options)
        if not is_factory(self.model):
            options = {"num_classes": num_classes, "in_chans": num_channels, **options}
        return load_model(self.model, **options)

    def to_dict(self) -> dict[str, Any]:
        """All values by name, as JSON types."""
        found: dict[str, Any] = json.loads(json.dumps(asdict(self)))
        return found

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], where: str | Path = RUN) -> RunConfig:
        """The config from the values that ``to_dict`` gave; other entries of ``values`` are ignored.

        Raises
        ------
        RunMismatch
            If a value is missing or has no meaning.
        """
        known = {name: values[name] for name in cls.__slots__ if name in values}
        if divides_by_type(known):
            known["normalise"] = {**known["normalise"], "divisor": "type"}
        return conform(cls, known, where, error=RunMismatch)


def _classification(config: RunConfig) -> Classification:
    of_masks = ("masks", "empty_masks", "loss", "key", "class_names")
    given = [name for name in of_masks if getattr(config, name) not in (None, False)]
    if given:
        of_names = "; a classifier's classes are called as its folders or the labels in its table are"
        raise ValueError(
            f"{' and '.join(given)}: allowed for the task segmentation, and this is {config.task}: take that "
            f"task, or leave them out{of_names if 'class_names' in given else ''}"
        )
    return Classification(config.inputs)


def _segmentation(config: RunConfig) -> Segmentation:
    if config.inputs:
        raise ValueError(
            f"inputs={config.inputs}: allowed for the task classification; a model of maps gets the image"
        )
    if config.settings.balanced:
        raise ValueError("balanced=True: allowed for the task classification; masks have no label to go by")
    if not is_factory(config.model):
        raise ValueError(
            f"model={config.model!r}: allowed for segmentation are factories package.module:factory, such as "
            "segmentation_models_pytorch:Unet; timm's models give no maps"
        )
    loss = config.loss or SegmentationLoss()
    return Segmentation(config.masks, loss, config.key, config.class_names, config.empty_masks)


_TASKS: Mapping[str, Callable[[RunConfig], Task[Any]]] = {
    Classification.name: _classification,
    Segmentation.name: _segmentation,
}


def present_devices() -> list[str]:
    """The kinds of devices on this machine that can train, the fastest last."""
    return ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]


def divides_by_type(values: Mapping[str, Any]) -> bool:
    """Whether a run divides pixels by their type's largest value, as runs of earlier versions did."""
    normalise = values.get("normalise")
    return isinstance(normalise, dict) and normalise.get("divisor", "type") == "type"


def require_device(name: str) -> None:
    """Make sure that this machine has the device.

    Raises
    ------
    ValueError
        If it has not; the text lists the devices that it has.
    """
    _require_device_name(name)
    present, device = present_devices(), torch.device(name)
    if device.type not in present:
        raise ValueError(f"device={name!r}: there is {' and '.join(present)} here")
    if device.index is not None and device.type == "cuda" and device.index >= torch.cuda.device_count():
        raise ValueError(f"device={name!r}: there are {torch.cuda.device_count()} GPUs here, counted from 0")


def _require_device_name(name: str) -> None:
    """Make sure that ``name`` is a device's name, on this or another machine."""
    try:
        kind = torch.device(name).type
    except RuntimeError:
        kind = ""
    if kind not in ("cpu", "cuda"):
        raise ValueError(f"device={name!r}: allowed are cpu and cuda, or one GPU of several, such as cuda:1")
