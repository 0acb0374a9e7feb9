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
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from streamcnn.data.augmentation import RandomAugmentation
from streamcnn.data.dataset import ImageDataset
from streamcnn.data.file_dataset import open_dataset
from streamcnn.data.label_table import check_inputs
from streamcnn.data.normalisation import Normalise
from streamcnn.data.sampling import divide
from streamcnn.data.sources import DEFAULT_CHOICE, ImageChoice, largest_of
from streamcnn.errors import DamagedCheckpoint, RunMismatch, StreamError
from streamcnn.runtime.streaming_model import StreamingModel
from streamcnn.support.atomic import replace_file
from streamcnn.support.disk import writing
from streamcnn.support.documents import conform, parse_json, read_within, require_flat
from streamcnn.support.models import WEIGHT_OPTIONS, is_factory, load_model, require_trust
from streamcnn.training.checkpoints import CheckpointFolder, load_checkpoint
from streamcnn.training.settings import TrainSettings
from streamcnn.training.state import require_state
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
        require_flat("model_options", self.model_options)
        check_inputs(self.inputs)
        _require_device(self.device)

    def datasets(self) -> tuple[ImageDataset, ImageDataset]:
        """The images to train on, and those to choose the best weights by.

        Raises
        ------
        DatasetMismatch
            If a split is not there, an image has no label, or the choice does not apply to an image.
        ValueError
            If there are too few images for a share of them to be set aside.
        """
        seed = self.settings.seed
        read = partial(open_dataset, self.data, choice=self.choice, inputs=self.inputs)
        every = read(self.split)
        augmented = None if self.augmentation == RandomAugmentation() else self.augmentation
        if self.validation_split is not None:
            images = read(self.split, augmentation=augmented, seed=seed)
            return images, read(self.validation_split)
        chosen, rest = divide(every.labels, share=self.validation_share, seed=seed)
        if not chosen or not rest:
            raise ValueError(
                f"validation_share={self.validation_share} of {len(every)} images leaves {len(chosen)} to "
                f"train on and {len(rest)} to validate by: name a validation split, or take another share"
            )
        images = read(self.split, positions=chosen, augmentation=augmented, seed=seed)
        return images, read(self.split, positions=rest)

    def build(self, num_classes: int, num_channels: int) -> StreamingModel:
        """The model, not yet trained.

        Parameters
        ----------
        num_classes, num_channels
            What a timm model is made for, unless ``model_options`` say otherwise; a factory is told
            ``model_options`` alone.
        """
        torch.manual_seed(self.settings.seed)
        return StreamingModel(
            self.make_net(num_classes, num_channels),
            self.budget,
            tile=self.tile,
            preprocess=self.normalise,
            device=self.device,
        )

    def make_net(self, num_classes: int, num_channels: int) -> nn.Module:
        """The network alone, as for ``build``.

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
        """All values by name, as JSON has them."""
        found: dict[str, Any] = json.loads(json.dumps(asdict(self)))
        return found

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], where: str | Path = RUN) -> RunConfig:
        """The config that ``to_dict`` gave, whatever else there is in ``values``.

        Raises
        ------
        RunMismatch
            If a value is missing or has no meaning.
        """
        known = {name: values[name] for name in cls.__slots__ if name in values}
        if _divides_by_type(known):
            known["normalise"] = {**known["normalise"], "divisor": "type"}
        return conform(cls, known, where, error=RunMismatch)


def make_trainer(
    config: RunConfig, folder: Path, *, events: bool = False, listener: Listener | None = None
) -> Trainer:
    """The trainer of the run in ``folder``, which will begin, or go on if it is there.

    Raises
    ------
    DatasetMismatch, ValueError
        If there are no such images or inputs, or no such model.
    """
    if _divides_by_type(_found(folder)):
        config = replace(config, normalise=replace(config.normalise, divisor="type"))
    images, validation = config.datasets()
    source = images[0][0]
    num_classes, num_channels = max(images.num_classes, validation.num_classes), source.shape[0]
    model = config.build(num_classes, num_channels)
    values = config.to_dict()
    # The images are told by more than their place, and settings by their names.
    identity = {key: value for key, value in values.items() if key not in ("data", "settings")}
    # Runs from before there were inputs, choices and ranges have none, and go on.
    identity["inputs"] = identity["inputs"] or None
    identity["choice"] = dict(config.choice.made) or None
    identity["normalise"] = {key: identity["normalise"][key] for key in ("mean", "std")}
    is_by_range = config.normalise.divisor == "range" and source.largest != largest_of(source.dtype)
    identity["largest"] = source.largest if is_by_range else None
    classes = images.classes and list(images.classes)
    derived = {
        "num_classes": num_classes,
        "num_channels": num_channels,
        "classes": classes,
        "read_by": asdict(images.choice),
    }
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
    choice: ImageChoice
    """How the files of the training images were read; of a tile store, when it was written."""
    update: int
    """After which these weights were found."""
    validation_accuracy: float


def load_run(folder: Path, *, budget: int | None = None, trust: Collection[str] = ()) -> TrainedRun:
    """The classifier of the run in ``folder``, by its best checkpoint.

    Parameters
    ----------
    folder
        Of a run that is finished or still going on.
    budget
        Bytes that a pass may hold; None takes the run's.
    trust
        Factories ``package.module:factory`` that may be called if the run names one. Anyone who can write the
        run's files can name any callable there.

    Raises
    ------
    UntrustedModel
        If the run's model is a factory that is not in ``trust``.
    RunMismatch
        If there is no run, its file holds something else, or none of its epochs is over.
    DamagedCheckpoint
        If the best checkpoint is damaged, or of another model.
    """
    config, made = _read(folder)
    require_trust(config.model, trust, folder / RUN)
    best = CheckpointFolder(folder / "checkpoints").best()
    if best is None:
        raise RunMismatch(f"no epoch of the run in {folder} is over: train it on")
    try:
        state = load_checkpoint(best)
    except FileNotFoundError:
        raise DamagedCheckpoint(f"{best}, the best checkpoint, is not there: train the run on") from None
    require_state(state, best)
    try:
        model = _restored(config, made, best_weights(state), best)
    except StreamError:
        raise
    except ValueError as error:
        raise RunMismatch(f"{folder / RUN}: {error}") from error
    model.budget = model.budget if budget is None else budget
    progress = state["progress"]
    return TrainedRun(
        config,
        model.eval(),
        made.classes,
        config.choice if made.read_by is None else made.read_by,
        progress["update"],
        progress["best_accuracy"],
    )


def read_run(folder: Path) -> RunConfig:
    """What the run in ``folder`` is of.

    Raises
    ------
    RunMismatch
        If there is none, or its file holds something else.
    """
    return _read(folder)[0]


def present_devices() -> list[str]:
    """Kinds of devices that there are to train on, the fastest last."""
    return ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]


def best_weights(state: Mapping[str, Any]) -> dict[str, Any]:
    """The model's state that a checkpoint was validated by: the averaged one, if there is one."""
    averaged = state.get("averaged")
    if averaged is None:
        return dict(state["model"])
    prefix = "module."
    return {key.removeprefix(prefix): value for key, value in averaged.items() if key.startswith(prefix)}


@dataclass(frozen=True, slots=True, kw_only=True)
class _Made:
    """What a run's file says of the model that was made for the images."""

    num_classes: int
    num_channels: int
    classes: tuple[str, ...] | None
    read_by: ImageChoice | None = None
    """How files were read; None in runs from before there were choices."""

    def __post_init__(self) -> None:
        for name in ("num_classes", "num_channels"):
            if not 1 <= getattr(self, name) < 2**31:
                raise ValueError(f"{name}={getattr(self, name)}: allowed are 1 and more, below 2**31")
        if self.classes is not None and len(self.classes) > self.num_classes:
            raise ValueError(f"classes: {len(self.classes)} names for num_classes={self.num_classes}")


def _found(folder: Path) -> Mapping[str, Any]:
    """What the run's file holds, if it is there; nothing where it is none, for it will be written anew."""
    try:
        values = parse_json(read_within(folder, folder / RUN, error=RunMismatch), RUN, error=RunMismatch)
    except (OSError, RunMismatch):
        return {}
    return values if isinstance(values, dict) else {}


def _divides_by_type(values: Mapping[str, Any]) -> bool:
    """Whether a run is from before pixels were divided by what images say is their largest."""
    normalise = values.get("normalise")
    return isinstance(normalise, dict) and normalise.get("divisor", "type") == "type"


def _read(folder: Path) -> tuple[RunConfig, _Made]:
    path = folder / RUN
    try:
        content = read_within(folder, path, error=RunMismatch)
    except (FileNotFoundError, NotADirectoryError):
        raise RunMismatch(f"{folder} has no run: give the folder that `streamcnn train` wrote") from None
    except OSError as error:
        raise RunMismatch(f"{path} cannot be read: {error.strerror}") from None
    values = parse_json(content, path, error=RunMismatch)
    if not isinstance(values, dict):
        raise RunMismatch(f"{path} holds a {type(values).__name__}: allowed is an object of settings by name")
    made = {name: values[name] for name in _Made.__slots__ if name in values}
    return RunConfig.from_dict(values, path), conform(_Made, made, path, error=RunMismatch)


def _restored(config: RunConfig, made: _Made, weights: Mapping[str, Any], where: Path) -> StreamingModel:
    """The run's model with weights of a checkpoint."""
    if not is_factory(config.model):
        # Weights come from the checkpoint: nothing else that the file names is read or downloaded.
        options = {key: found for key, found in config.model_options.items() if key not in WEIGHT_OPTIONS}
        config = replace(config, model_options=options)
    _compare_without_memory(config, made, weights, where)
    model = config.build(made.num_classes, made.num_channels)
    _require_same_shapes(model, weights, where)
    model.load_state_dict(weights)
    return model


def _compare_without_memory(config: RunConfig, made: _Made, weights: Mapping[str, Any], where: Path) -> None:
    """Compare the network with a checkpoint before memory is taken: the file may ask for any size."""
    try:
        with torch.device("meta"):
            net = config.make_net(made.num_classes, made.num_channels)
    except Exception:
        if not is_factory(config.model):
            raise
        return  # a factory may look at its weights; one that fails in earnest will do so when it is called
    _require_same_shapes(net, weights, where)


def _require_same_shapes(net: nn.Module, weights: Mapping[str, Any], where: Path) -> None:
    """Make sure that a checkpoint's tensors are those of ``net``."""
    wanted, found = (
        {key: list(tensor.shape) for key, tensor in state.items() if isinstance(tensor, Tensor)}
        for state in (net.state_dict(), weights)
    )
    differing = [key for key in sorted({*wanted, *found}) if wanted.get(key) != found.get(key)]
    if differing:
        key = differing[0]
        raise DamagedCheckpoint(
            f"{where} is of another model than the run's: {key} is {found.get(key, 'missing')} there and "
            f"{wanted.get(key, 'missing')} in the model, and {len(differing) - 1} more differ"
        )


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
