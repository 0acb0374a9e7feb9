"""A run's identity: what has to be the same for it to be resumed, and warnings about what may differ."""

from __future__ import annotations

import platform
import warnings
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from importlib.metadata import version
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from streamcnn.data.dataset import ImageDataset, Images, input_shapes
from streamcnn.data.uniform import ImageKind
from streamcnn.errors import DatasetMismatch, RunMismatch, UnsupportedModel, some
from streamcnn.runtime.streaming_model import StreamingModel
from streamcnn.support.text import printable
from streamcnn.training.naming import naming
from streamcnn.training.processes import Processes
from streamcnn.training.settings import TrainSettings
from streamcnn.training.task import Task


def identity_of(
    model: nn.Module,
    images: Images,
    validation: Images,
    settings: TrainSettings,
    device: torch.device,
) -> dict[str, Any]:
    """What has to be the same for a run to be resumed, by name."""
    streamed = model if isinstance(model, StreamingModel) else None
    net = model if streamed is None else streamed.net
    return {
        **settings.to_dict(),
        # A module's extra state may be anything, and another one later.
        "tensors": {
            key: f"{value.dtype}{tuple(value.shape)}"
            for key, value in net.state_dict().items()
            if isinstance(value, Tensor)
        },
        "images": images.fingerprint,
        "validation": validation.fingerprint,
        "budget": streamed and streamed.budget,
        "tile": streamed and streamed.tile and list(streamed.tile),
        "device": device.type,
    }


def require_no_collectives(model: nn.Module, processes: Processes) -> None:
    """Make sure that the forward pass of a planned model calls no collective of its own.

    Raises
    ------
    UnsupportedModel
        If it calls ``torch.distributed``: processes need not make equally many passes.
    """
    if processes.count > 1 and isinstance(model, StreamingModel) and model.calls_collectives:
        raise UnsupportedModel(
            "the model calls torch.distributed in its forward pass, and processes that train it make passes "
            "by themselves: leave that out, or train it in a loop of your own, with as many passes in each"
        )


def require_alike(identity: Mapping[str, Any], processes: Processes) -> None:
    """Make sure that all processes have the same model, images and settings.

    Raises
    ------
    RunMismatch
        If those of one process differ from the first one's.
    """
    of_first = processes.first(lambda: dict(identity))
    with processes.agreeing():
        names = sorted({*of_first, *identity})
        differing = [name for name in names if of_first.get(name) != identity.get(name)]
        if differing:
            raise RunMismatch(
                f"process {processes.rank} differs from the first in {some(differing)}: give all processes "
                "the same arguments, and images of the same content"
            )


def with_present_fingerprints(
    saved: Mapping[str, Any], present: Mapping[str, Any], images: Mapping[str, Images]
) -> dict[str, Any]:
    """A checkpoint's identity, with older fingerprints of unchanged images replaced by present ones.

    Parameters
    ----------
    saved, present
        The identity in the checkpoint, and that of the present run.
    images
        The images whose fingerprints the identities hold, by name.
    """
    found = dict(saved)
    for name, each in images.items():
        if found.get(name) != present[name] and isinstance(each, ImageDataset):
            if found.get(name) == each.former_fingerprint:
                found[name] = present[name]
    return found


def versions() -> dict[str, str]:
    """Versions of the packages that a run's results depend on, by name."""
    return {
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "numpy": np.__version__,
        "streamcnn": version("streamcnn"),
        "threads": str(torch.get_num_threads()),
    }


def plan_digest(
    task: Task[Any],
    model: nn.Module,
    images: Images,
    batch_size: int,
    device: torch.device,
    casting: Callable[[], AbstractContextManager[None]],
) -> str | None:
    """The fingerprint of the plan that carries out updates; None if the model is not streamed.

    Parameters
    ----------
    task, model, images, batch_size
        The task, its model and images, and how many go into a batch; the plan is made for the first image.
    device
        Where further inputs go.
    casting
        Makes the context manager in which updates run, such as autocast.

    Raises
    ------
    PlanDoesNotFit
        If no plan stays within the budget.
    """
    if not isinstance(model, StreamingModel):
        return None
    was_training = model.training
    model.train()
    with naming("the first plan", [0], [images[0][0].name]):
        with torch.enable_grad(), casting():
            plan = task.plan(model, images, batch_size, device)
        model.train(was_training)
        plan.validate()
    return plan.digest


def tell_differences(saved: Mapping[str, Any], plan: str | None) -> None:
    """Warn of versions and plans that have changed, which may make a resumed run end differently."""
    present = {**versions(), "plan": plan}
    for name, value in {**saved["versions"], "plan": saved["plan"]}.items():
        if value != present.get(name):
            warnings.warn(
                f"the run began with {printable(f'{name} {value}')} and goes on with {present.get(name)}: "
                "rounding may make it end differently from one without a break",
                stacklevel=4,
            )


def require_same_inputs(images: Images, validation: Images) -> None:
    """Make sure that training and validation images are of one kind.

    Raises
    ------
    DatasetMismatch
        If the first images differ in further inputs, channels, or the type or range of pixels.
    """
    of_training, of_validation = (ImageKind.of(found[0][0]) for found in (images, validation))
    if of_training.channels != of_validation.channels or not of_training.has_values_of(of_validation):
        raise DatasetMismatch(
            f"training images have {of_training.described}, and validation images {of_validation.described}: "
            "write both in the same way"
        )
    trained, validated = (input_shapes(found[0]) for found in (images, validation))
    if trained != validated:
        raise DatasetMismatch(
            f"training images have inputs of the shapes {trained}, and validation images {validated}: "
            "give both the same inputs"
        )
