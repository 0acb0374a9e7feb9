"""A run in its folder: what it is of, how it is trained, and the classifier that came of it.

::

    run/
      run.json        model, data and settings
      log.jsonl       a line for each update and each epoch
      checkpoints/    the two newest and the best, see `streamcnn.training.checkpoints`
      events/         for TensorBoard, if wanted
      run.lock        locked while a process trains, which `run.pid` then names
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from streamcnn.atomic import replace_file
from streamcnn.data.augmentation import RandomAugmentation
from streamcnn.data.dataset import ImageDataset
from streamcnn.data.file_dataset import open_dataset
from streamcnn.data.label_table import check_inputs
from streamcnn.data.normalisation import Normalise
from streamcnn.data.sampling import divide
from streamcnn.disk import writing
from streamcnn.errors import DamagedCheckpoint, RunMismatch
from streamcnn.models import load_model
from streamcnn.streaming_model import StreamingModel
from streamcnn.training.checkpoints import CheckpointFolder, load_checkpoint
from streamcnn.training.settings import TrainSettings
from streamcnn.training.trainer import Listener, Trainer

RUN = "run.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class RunConfig:
    """All that a run is a function of, besides the images themselves and the versions of libraries.

    Raises
    ------
    ValueError
        If a value has no meaning; the text says what is allowed.
    """

    model: str
    """A timm name or ``package.module:factory``."""
    model_options: Mapping[str, Any] = field(default_factory=dict)
    """Passed on to timm's ``create_model`` or to the factory."""
    data: str
    """A tile store, a CSV file or a folder of classes; see ``open_dataset``."""
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
    normalise: Normalise = field(default_factory=Normalise)
    augmentation: RandomAugmentation = field(default_factory=RandomAugmentation)
    """Of the training images."""
    settings: TrainSettings = field(default_factory=TrainSettings)

    def __post_init__(self) -> None:
        if not 0 < self.validation_share < 1:
            raise ValueError(f"validation_share={self.validation_share}: allowed are shares between 0 and 1")
        check_inputs(self.inputs)
        _require_device(self.device)

    def datasets(self) -> tuple[ImageDataset, ImageDataset]:
        """The images to train on, and those to choose the best weights by.

        Raises
        ------
        DatasetMismatch
            If a split is not there, or an image has no label.
        ValueError
            If there are too few images for a share of them to be set aside.
        """
        seed = self.settings.seed
        every = open_dataset(self.data, self.split, inputs=self.inputs)
        augmented = None if self.augmentation == RandomAugmentation() else self.augmentation
        if self.validation_split is not None:
            images = open_dataset(
                self.data, self.split, augmentation=augmented, seed=seed, inputs=self.inputs
            )
            return images, open_dataset(self.data, self.validation_split, inputs=self.inputs)
        chosen, rest = divide(every.labels, share=self.validation_share, seed=seed)
        if not chosen or not rest:
            raise ValueError(
                f"validation_share={self.validation_share} of {len(every)} images leaves {len(chosen)} to "
                f"train on and {len(rest)} to validate by: name a validation split, or take another share"
            )
        images = open_dataset(
            self.data,
            self.split,
            positions=chosen,
            augmentation=augmented,
            seed=seed,
            inputs=self.inputs,
        )
        return images, open_dataset(self.data, self.split, positions=rest, inputs=self.inputs)

    def build(self, num_classes: int, num_channels: int) -> StreamingModel:
        """The model, not yet trained.

        Parameters
        ----------
        num_classes, num_channels
            What a timm model is made for, unless ``model_options`` say otherwise; a factory is told
            ``model_options`` alone.
        """
        options = dict(self.model_options)
        if ":" not in self.model:
            options = {"num_classes": num_classes, "in_chans": num_channels, **options}
        torch.manual_seed(self.settings.seed)
        return StreamingModel(
            load_model(self.model, **options),
            self.budget,
            tile=self.tile,
            preprocess=self.normalise,
            device=self.device,
        )

    def to_dict(self) -> dict[str, Any]:
        """All values by name, as JSON has them."""
        found: dict[str, Any] = json.loads(json.dumps(asdict(self)))
        return found

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> RunConfig:
        """The config that ``to_dict`` gave, whatever else there is in ``values``."""
        augmentation = values["augmentation"]
        return cls(
            **{
                **{name: values[name] for name in cls.__slots__ if name != "inputs"},
                "inputs": tuple(values.get("inputs", ())),
                "tile": values["tile"] and tuple(values["tile"]),
                "normalise": Normalise(**values["normalise"]),
                "augmentation": RandomAugmentation(**{**augmentation, "gains": tuple(augmentation["gains"])}),
                "settings": TrainSettings(**values["settings"]),
            }
        )


def make_trainer(
    config: RunConfig, folder: Path, *, events: bool = False, listener: Listener | None = None
) -> Trainer:
    """The trainer of the run in ``folder``, which will begin, or go on if it is there.

    Raises
    ------
    DatasetMismatch, ValueError
        If there are no such images or inputs, or no such model.
    """
    images, validation = config.datasets()
    source = images[0][0]
    num_classes, num_channels = max(images.num_classes, validation.num_classes), source.shape[0]
    model = config.build(num_classes, num_channels)
    values = config.to_dict()
    # The images are told by more than their place, and settings by their names.
    identity = {key: value for key, value in values.items() if key not in ("data", "settings")}
    # Runs from before there were inputs have none, and go on.
    identity["inputs"] = identity["inputs"] or None
    classes = images.classes and list(images.classes)
    derived = {"num_classes": num_classes, "num_channels": num_channels, "classes": classes}
    return Trainer(
        model,
        images,
        validation,
        config.settings,
        folder,
        identity=identity,
        events=events,
        listener=listener,
        on_start=lambda: _write(folder, {**values, **derived}),
    )


@dataclass(frozen=True, slots=True)
class TrainedRun:
    """What came of a run."""

    config: RunConfig
    model: StreamingModel
    """With the best weights, in eval mode."""
    classes: tuple[str, ...] | None
    """Names of the labels 0, 1, …; None where labels are numbers."""
    update: int
    """After which these weights were found."""
    validation_accuracy: float


def load_run(folder: Path, *, budget: int | None = None) -> TrainedRun:
    """The classifier of the run in ``folder``, by its best checkpoint.

    Parameters
    ----------
    folder
        Of a run that is finished or still going on.
    budget
        Bytes that a pass may hold; None takes the run's.

    Raises
    ------
    RunMismatch
        If there is no run, or none of its epochs is over.
    DamagedCheckpoint
        If the best checkpoint is damaged.
    """
    values = _read(folder)
    config = RunConfig.from_dict(values)
    best = CheckpointFolder(folder / "checkpoints").best()
    if best is None:
        raise RunMismatch(f"no epoch of the run in {folder} is over: train it on")
    try:
        state = load_checkpoint(best)
    except FileNotFoundError:
        raise DamagedCheckpoint(f"{best}, the best checkpoint, is not there: train the run on") from None
    model = config.build(values["num_classes"], values["num_channels"])
    model.budget = model.budget if budget is None else budget
    model.load_state_dict(best_weights(state))
    progress = state["progress"]
    classes = values["classes"] and tuple(values["classes"])
    return TrainedRun(config, model.eval(), classes, progress["update"], progress["best_accuracy"])


def read_run(folder: Path) -> RunConfig:
    """What the run in ``folder`` is of.

    Raises
    ------
    RunMismatch
        If there is none.
    """
    return RunConfig.from_dict(_read(folder))


def present_devices() -> list[str]:
    """Kinds of devices that there are to train on, the fastest last."""
    return ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]


def best_weights(state: Mapping[str, Any]) -> dict[str, Any]:
    """The model's state that a checkpoint was validated by: the averaged one, if there is one."""
    averaged = state["averaged"]
    if averaged is None:
        return dict(state["model"])
    prefix = "module."
    return {key.removeprefix(prefix): value for key, value in averaged.items() if key.startswith(prefix)}


def _read(folder: Path) -> dict[str, Any]:
    try:
        values: dict[str, Any] = json.loads((folder / RUN).read_text())
    except FileNotFoundError:
        raise RunMismatch(f"{folder} has no run: give the folder that `streamcnn train` wrote") from None
    except ValueError as error:
        raise RunMismatch(
            f"{folder / RUN} cannot be read ({error}): put back what `streamcnn train` wrote"
        ) from None
    return values


def _write(folder: Path, values: Mapping[str, Any]) -> None:
    """Write the run's file."""
    with writing(folder / RUN):
        replace_file(folder / RUN, json.dumps(values, indent=2) + "\n")


def _require_device(name: str) -> None:
    """Make sure that there is such a device."""
    try:
        kind = torch.device(name).type
    except RuntimeError:
        kind = ""
    present = present_devices()
    if kind not in present:
        raise ValueError(f"device={name!r}: there is {' and '.join(present)} here")
