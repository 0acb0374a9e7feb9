"""A run in its folder: its configuration, its trainer, and the trained model.

::

    run/
      run.json        model, data and settings
      log.jsonl       a line for each update and each epoch
      checkpoints/    the two newest and the best, see `streamcnn.training.checkpoints`
      maps/           of segmentation: small maps of some validation images, by the best weights
      events/         for TensorBoard, if wanted
      run.lock        locked while a process trains, which `run.pid` then names
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from streamcnn.data.sources import ImageChoice, ImageSource, largest_of
from streamcnn.data.uniform import ImageKind
from streamcnn.errors import DamagedCheckpoint, DatasetMismatch, RunMismatch, StreamError
from streamcnn.runtime.streaming_model import StreamingModel
from streamcnn.support.atomic import replace_file
from streamcnn.support.disk import writing
from streamcnn.support.documents import conform, parse_json, read_within
from streamcnn.support.models import WEIGHT_OPTIONS, is_factory, require_trust
from streamcnn.support.units import plural
from streamcnn.training.checkpoint_file import load_checkpoint
from streamcnn.training.checkpoints import CheckpointFolder
from streamcnn.training.config import OF_TASKS, RUN, RunConfig, divides_by_type, require_device
from streamcnn.training.records import Listener
from streamcnn.training.state import progress_of, require_state
from streamcnn.training.trainer import Trainer


def make_trainer(
    config: RunConfig, folder: Path, *, events: bool = False, listener: Listener | None = None
) -> Trainer:
    """The trainer of the run in ``folder``, which starts the run, or resumes it if it exists.

    Raises
    ------
    DatasetMismatch, ValueError
        If the images, masks, inputs or model do not exist, or this machine does not have the device.
    RunMismatch
        If the run's file has invalid names of classes.
    """
    require_device(config.device)
    found = _found(folder)
    config = _named_as_before(config, found, folder / RUN)
    if divides_by_type(found):
        config = replace(config, normalise=replace(config.normalise, divisor="type"))
    task = config.make_task()
    images, validation = config.datasets()
    source = images[0][0]
    kind = ImageKind.of(source)
    model = config.build(task.num_classes(images, validation), kind.channels)
    values = config.to_dict()
    # Images, tasks and settings are compared separately: images by fingerprint, the others by name.
    left_out = ("data", "settings", *OF_TASKS)
    identity = {key: value for key, value in values.items() if key not in left_out}
    # Runs of versions without choices and ranges have none, and can be resumed.
    identity["choice"] = dict(config.choice.made) or None
    identity["normalise"] = {key: identity["normalise"][key] for key in ("mean", "std")}
    is_by_range = config.normalise.divisor == "range" and source.largest != largest_of(source.dtype)
    identity["largest"] = source.largest if is_by_range else None
    classes = task.class_names(images)
    derived = {
        "num_channels": kind.channels,
        "dtype": kind.dtype,
        "largest": kind.largest,
        "classes": classes and list(classes),
        "read_by": asdict(images.choice),
    }

    def write() -> None:
        num_classes = task.num_classes(images, validation, model)
        # With the passes of all processes together, as one that goes on alone would make them.
        whole = replace(config, settings=trainer.settings).to_dict()
        _write(folder, {**whole, **derived, "num_classes": num_classes})

    trainer = Trainer(
        model,
        images,
        validation,
        config.settings,
        folder,
        task=task,
        identity=identity,
        events=events,
        listener=listener,
        on_start=write,
    )
    return trainer


@dataclass(frozen=True, slots=True)
class TrainedRun:
    """The model that a run has trained, with what is needed to use it."""

    config: RunConfig
    model: StreamingModel
    """With the best weights, in eval mode."""
    classes: tuple[str, ...] | None
    """Names of the labels or classes 0, 1, …; None where they are numbers."""
    choice: ImageChoice
    """How the files of the training images were read; of a tile store, when it was written."""
    kind: ImageKind
    """What the training images were; runs from before types were kept have their channels alone."""
    update: int
    """After which these weights were found."""
    validation_score: float
    """The task's measure of the validation images: accuracy, or mean IoU."""

    def class_name(self, label: int) -> str:
        """The name of a class; its number if it has no name, as a class that no image has."""
        known = self.classes or ()
        return known[label] if label < len(known) else str(label)

    def require_as_trained(self, source: ImageSource, name: str) -> None:
        """Make sure that an image is of the training images' kind; predictions for others would be wrong.

        Parameters
        ----------
        source, name
            The image, and its name in the error's text.

        Raises
        ------
        DatasetMismatch
            If the image has another number of channels, or pixels of another type or range.
        """
        found, trained = ImageKind.of(source), self.kind
        if found.channels != trained.channels:
            what = f"has {plural(found.channels, 'channel')}, and training images had {trained.channels}"
        elif not found.has_values_of(trained):
            what = f"holds {found.values}, and training images held {trained.values}"
        else:
            return
        raise DatasetMismatch(
            f"{name} {what}: the model would take it for another picture; write it as the training images "
            "were, or give --other-pixels if it is as it should be"
        )


def load_run(
    folder: Path, *, budget: int | None = None, device: str | None = None, trust: Collection[str] = ()
) -> TrainedRun:
    """Load the model of the run in ``folder`` from its best checkpoint.

    Parameters
    ----------
    folder
        The folder of a run that is finished or still in progress.
    budget
        Bytes that a pass may hold; None takes the run's.
    device
        Device to put the model on; None takes the run's, which may be a device of another machine.
    trust
        Factories ``package.module:factory`` that may be called if the run names one. Anyone who can write the
        run's files can name any callable there.

    Raises
    ------
    UntrustedModel
        If the run's model is a factory that is not in ``trust``.
    RunMismatch
        If there is no run, its file is not a run's, none of its epochs is over, or this machine does not have
        its device.
    DamagedCheckpoint
        If the best checkpoint is damaged, or holds another model.
    ValueError
        If this machine does not have ``device``.
    """
    config, made = _read(folder)
    require_trust(config.model, trust, folder / RUN)
    if device is None:
        _require_its_device(config, folder / RUN)
    else:
        require_device(device)
        config = replace(config, device=device)
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
    progress = progress_of(state)
    return TrainedRun(
        config,
        model.eval(),
        made.classes,
        config.choice if made.read_by is None else made.read_by,
        ImageKind(made.num_channels, made.dtype, made.largest),
        progress["update"],
        progress["best_score"],
    )


def _require_its_device(config: RunConfig, where: Path) -> None:
    """Make sure that this machine has the device that a run was trained on.

    Raises
    ------
    RunMismatch
        If not.
    """
    try:
        require_device(config.device)
    except ValueError as error:
        raise RunMismatch(f"{where}: {error}: give another device, such as --device cpu") from None


def read_run(folder: Path) -> RunConfig:
    """The configuration of the run in ``folder``.

    Raises
    ------
    RunMismatch
        If there is no run, or its file is not a run's.
    """
    return _read(folder)[0]


def best_weights(state: Mapping[str, Any]) -> dict[str, Any]:
    """The model's state that was validated for a checkpoint: the averaged weights, if there are any."""
    averaged = state.get("averaged")
    if averaged is None:
        return dict(state["model"])
    prefix = "module."
    return {key.removeprefix(prefix): value for key, value in averaged.items() if key.startswith(prefix)}


@dataclass(frozen=True, slots=True, kw_only=True)
class _Made:
    """The entries of a run's file about the model as it was made for the images."""

    num_classes: int
    num_channels: int
    classes: tuple[str, ...] | None
    read_by: ImageChoice | None = None
    """How files were read; None in runs from before there were choices."""
    dtype: str | None = None
    """Of the pixels; None in runs from before it was kept."""
    largest: int | None = None

    def __post_init__(self) -> None:
        for name in ("num_classes", "num_channels"):
            if not 1 <= getattr(self, name) < 2**31:
                raise ValueError(f"{name}={getattr(self, name)}: allowed are 1 and more, below 2**31")
        if self.classes is not None and len(self.classes) > self.num_classes:
            raise ValueError(f"classes: {len(self.classes)} names for num_classes={self.num_classes}")


def _found(folder: Path) -> Mapping[str, Any]:
    """The values in the run's file; empty if there is none or it is invalid, as it will be written anew."""
    try:
        values = parse_json(read_within(folder, folder / RUN, error=RunMismatch), RUN, error=RunMismatch)
    except (OSError, RunMismatch):
        return {}
    return values if isinstance(values, dict) else {}


def _named_as_before(config: RunConfig, found: Mapping[str, Any], where: Path) -> RunConfig:
    """The config with the class names of the run's file, if none are given on resuming."""
    names = found.get("class_names")
    if config.class_names is not None or not isinstance(names, list) or found.get("task") != config.task:
        return config
    try:
        return replace(config, class_names=tuple(names))
    except ValueError as error:
        raise RunMismatch(f"{where}: {error}") from None


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
    """Build the run's model, with the weights of a checkpoint."""
    if not is_factory(config.model):
        # Weights come from the checkpoint alone: nothing that the file names is read or downloaded.
        options = {key: found for key, found in config.model_options.items() if key not in WEIGHT_OPTIONS}
        config = replace(config, model_options=options)
    _compare_without_memory(config, made, weights, where)
    model = config.build(made.num_classes, made.num_channels)
    _require_same_shapes(model, weights, where)
    model.load_state_dict(weights)
    return model


def _compare_without_memory(config: RunConfig, made: _Made, weights: Mapping[str, Any], where: Path) -> None:
    """Compare the network with a checkpoint before allocating it: the run's file may name any size."""
    try:
        with torch.device("meta"):
            net = config.make_net(made.num_classes, made.num_channels)
    except Exception:
        if not is_factory(config.model):
            raise
        return  # a factory may read its weights, which fails here; any other error recurs when it is called
    _require_same_shapes(net, weights, where)


def _require_same_shapes(net: nn.Module, weights: Mapping[str, Any], where: Path) -> None:
    """Make sure that a checkpoint's tensors have the names and shapes of those of ``net``."""
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
