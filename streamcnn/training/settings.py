"""The settings of a run, and which of them may differ when it is resumed."""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, ClassVar

import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

from streamcnn.data.dataset import OF_CONTENT
from streamcnn.errors import RunMismatch, UnsupportedModel
from streamcnn.support.documents import require_storable

AUTOCAST_TYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16}
PER_EPOCH = ("epoch", "update")


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainSettings:
    """The settings that decide what a run computes.

    Raises
    ------
    ValueError
        If a value has no meaning; the text says what is allowed.
    """

    # Pydantic's, for settings that are read from a file.
    __pydantic_config__: ClassVar[dict[str, Any]] = {"extra": "forbid"}

    epochs: int = 10
    """Largest number of passes over the training images."""
    batch_size: int = 1
    """Images in one forward pass."""
    accumulate: int = 1
    """Forward passes whose gradients make one update; the last update of an epoch may have fewer."""
    optimizer: str = "Adam"
    """A class of ``torch.optim``."""
    learning_rate: float = 1e-3
    optimizer_options: Mapping[str, Any] = field(default_factory=dict)
    """Passed on to the optimiser."""
    schedule: str | None = None
    """A class of ``torch.optim.lr_scheduler``; None keeps the learning rate."""
    schedule_options: Mapping[str, Any] = field(default_factory=dict)
    """Passed on to the schedule."""
    schedule_every: str = "epoch"
    """When the schedule advances: after each ``"epoch"`` or each ``"update"``."""
    clip_norm: float | None = None
    """Largest norm of all gradients together."""
    ema_decay: float | None = None
    """Factor of the averaged weights in each update; if given, these weights are validated."""
    autocast: str | None = None
    """``"bfloat16"`` or ``"float16"``."""
    balanced: bool = False
    """Each epoch takes as many images of every label as the rarest has."""
    patience: int | None = None
    """Epochs without a better validation score after which the run ends."""
    save_every: int = 100
    """Updates from one checkpoint to the next; there is one after every epoch besides."""
    seed: int = 0
    """Seed of the order of images and of all other random numbers."""

    def __post_init__(self) -> None:
        for name in ("epochs", "batch_size", "accumulate", "save_every"):
            _require_whole(name, getattr(self, name), 1, 2**31 - 1)
        _require_whole("seed", self.seed, -(2**63), 2**64 - 1)
        for name in ("learning_rate", "clip_norm", "ema_decay"):
            _require_number(name, getattr(self, name))
        for name in ("optimizer_options", "schedule_options"):
            _require_options(name, getattr(self, name))
        if not 0 < self.learning_rate < math.inf:
            raise ValueError(f"learning_rate={self.learning_rate}: allowed are positive numbers")
        if self.clip_norm is not None and not 0 < self.clip_norm < math.inf:
            raise ValueError(f"clip_norm={self.clip_norm}: allowed are positive numbers, or None")
        if self.ema_decay is not None and not 0 <= self.ema_decay < 1:
            raise ValueError(f"ema_decay={self.ema_decay}: allowed are 0 and more, and less than 1")
        if self.patience is not None:
            _require_whole("patience", self.patience, 1, 2**31 - 1, otherwise=", or None")
        if self.autocast is not None and self.autocast not in AUTOCAST_TYPES:
            raise ValueError(f"autocast={self.autocast!r}: allowed are {', '.join(AUTOCAST_TYPES)}, or None")
        if self.schedule_every not in PER_EPOCH:
            raise ValueError(f"schedule_every={self.schedule_every!r}: allowed are {' and '.join(PER_EPOCH)}")
        if self.schedule is None and self.schedule_options:
            raise ValueError(
                f"schedule_options={dict(self.schedule_options)} without a schedule: name one too"
            )
        self._try_out()

    def _try_out(self) -> None:
        """Check the options of optimiser and schedule by one step on a small convolution's parameters."""
        _class_of(torch.optim, Optimizer, self.optimizer, "optimizer")
        if self.schedule is not None:
            _class_of(torch.optim.lr_scheduler, LRScheduler, self.schedule, "schedule")
        net = nn.Module()
        net.weight, net.bias = nn.Parameter(torch.zeros(2, 2, 3, 3)), nn.Parameter(torch.zeros(2))
        for parameter in net.parameters():
            parameter.grad = torch.zeros_like(parameter)
        try:
            optimizer = self.make_optimizer(net)
            optimizer.step()
        except (TypeError, ValueError, RuntimeError) as error:
            raise ValueError(
                f"optimizer={self.optimizer!r} with optimizer_options={dict(self.optimizer_options)}: {error}"
            ) from error
        try:
            schedule = self.make_schedule(optimizer)
            if schedule is not None:
                optimizer.step()
                self.step_schedule(schedule, 0.0)
        except (TypeError, ValueError, RuntimeError, AttributeError) as error:
            raise ValueError(
                f"schedule={self.schedule!r} with schedule_options={dict(self.schedule_options)}: {error}"
            ) from error
        if isinstance(schedule, ReduceLROnPlateau) and self.schedule_every == "update":
            raise ValueError(
                "schedule='ReduceLROnPlateau' goes by the validation loss: allowed is schedule_every='epoch'"
            )

    @property
    def images_per_update(self) -> int:
        """Images in an update, except the last of an epoch, which may have fewer."""
        return self.batch_size * self.accumulate

    def casting(self, device: torch.device) -> torch.autocast:
        """The context manager in which passes run: autocast, disabled if the settings have none."""
        dtype, enabled = AUTOCAST_TYPES.get(self.autocast or "bfloat16"), self.autocast is not None
        return torch.autocast(device.type, dtype, enabled=enabled, cache_enabled=False)

    def step_schedule(self, schedule: LRScheduler, validation_loss: float) -> None:
        """Advance a schedule, by the validation loss if it goes by that."""
        if isinstance(schedule, ReduceLROnPlateau):
            schedule.step(validation_loss)
        else:
            schedule.step()

    def make_optimizer(self, net: nn.Module) -> Optimizer:
        """The optimiser of ``net``'s trainable parameters.

        Raises
        ------
        UnsupportedModel
            If there are none.
        """
        kind = _class_of(torch.optim, Optimizer, self.optimizer, "optimizer")
        parameters = [p for p in net.parameters() if p.requires_grad]
        if not parameters:
            raise UnsupportedModel(
                "no parameter of the model can be trained: give it some, or requires_grad to those it has"
            )
        return kind(parameters, lr=self.learning_rate, **self.optimizer_options)  # type: ignore[no-any-return]

    def make_schedule(self, optimizer: Optimizer) -> LRScheduler | None:
        """The schedule of an optimiser's learning rate; None if the settings have none."""
        if self.schedule is None:
            return None
        kind = _class_of(torch.optim.lr_scheduler, LRScheduler, self.schedule, "schedule")
        return kind(optimizer, **self.schedule_options)  # type: ignore[no-any-return]

    def to_dict(self) -> dict[str, Any]:
        """All values by name."""
        return asdict(self)


_MOST_NAMED = 5
"""Differing values of one name that a message shows."""
_FINGERPRINTS = {"images": "the training images", "validation": "the validation images"}
"""Names of the fingerprints of images, with texts for messages."""
_FIRST_TASK = "classification"
"""Of runs that name none."""
MAY_GROW = frozenset({"epochs", "patience", "save_every"})
"""Settings that say when a run ends or is saved, and not what it computes until then."""


def require_same(found: Mapping[str, Any], expected: Mapping[str, Any]) -> None:
    """Compare the identity with which a run is resumed, ``found``, to that with which it began.

    Raises
    ------
    RunMismatch
        If they differ, with all differences.
    """
    then, now = (each.get("task") or _FIRST_TASK for each in (expected, found))
    if then != now:
        # Nearly all of its values are others then.
        raise RunMismatch(
            f"the run cannot go on, since it is of the task {then}, with the model {expected.get('model')}, "
            f"and this is the task {now}: go on with what it began with, or begin another run in another "
            "folder"
        )
    differing = [
        _difference(name, expected.get(name), found.get(name))
        for name in sorted({*found, *expected})
        if found.get(name) != expected.get(name) and name not in MAY_GROW
    ]
    if differing:
        raise RunMismatch(
            f"the run cannot go on, since it began differently: {'; '.join(differing)}. Go on with what it "
            f"began with, or begin another run in another folder{_about_times(found, expected)}"
        )


def _difference(name: str, then: Any, now: Any) -> str:
    """The difference between two values as text; of mappings, the first five entries that differ."""
    if name in _FINGERPRINTS and isinstance(then, str) and isinstance(now, str):
        return f"{_FINGERPRINTS[name]} or their labels, masks or augmentations are others ({then}, now {now})"
    if not (isinstance(then, Mapping) and isinstance(now, Mapping)):
        what = " (of all processes together)" if name == "accumulate" else ""
        return f"{name}{what} was {then!r} and is {now!r}"
    keys = [key for key in (*then, *(key for key in now if key not in then)) if then.get(key) != now.get(key)]
    described = [
        f"{key} was {then[key]} and is {now[key]}"
        if key in then and key in now
        else (
            f"{key} was {then[key]} and is missing" if key in then else f"{key} is {now[key]} and was missing"
        )
        for key in keys[:_MOST_NAMED]
    ]
    more = [f"{len(keys) - _MOST_NAMED} more differ"] if len(keys) > _MOST_NAMED else []
    return f"{name}: {', '.join([*described, *more])}"


def _about_times(found: Mapping[str, Any], expected: Mapping[str, Any]) -> str:
    """A hint that images may be unchanged after all, if an old run told them by their files' times."""
    old = [
        name
        for name in _FINGERPRINTS
        if str(found.get(name)).startswith(OF_CONTENT)
        and not str(expected.get(name)).startswith(OF_CONTENT)
        and found.get(name) != expected.get(name)
    ]
    if not old:
        return ""
    return (
        ". The run is of an older version, which told images by the times of their files, and these are "
        "others now: if the images are the same, give the files their times back, as `cp -p` and `rsync -t` "
        "do"
    )


def _require_whole(name: str, found: object, least: int, most: int, *, otherwise: str = "") -> None:
    """Make sure that a setting is a whole number in a range."""
    if not isinstance(found, int) or isinstance(found, bool) or not least <= found <= most:
        allowed = "1 and more" if least == 1 else f"{least} to {most}"
        raise ValueError(f"{name}={found!r}: allowed are {allowed}{otherwise}")


def _require_number(name: str, found: object) -> None:
    """Make sure that a setting is a number, or None."""
    if found is not None and (isinstance(found, bool) or not isinstance(found, int | float)):
        raise ValueError(f"{name}={found!r}: allowed are numbers")


def _require_options(name: str, found: object) -> None:
    """Make sure that a setting is a mapping of arguments by name that a file can hold."""
    if not isinstance(found, Mapping) or not all(isinstance(key, str) for key in found):
        raise ValueError(f"{name}={found!r}: allowed are values by name")
    require_storable(name, found)


def _class_of(module: Any, base: type, name: str, setting: str) -> Any:
    """The subclass of ``base`` in ``module`` of this name; ``base`` itself is not allowed."""
    known = {
        key: value
        for key, value in vars(module).items()
        if inspect.isclass(value) and issubclass(value, base) and value is not base and key[0] != "_"
    }
    if name not in known:
        raise ValueError(f"{setting}={name!r}: allowed are {', '.join(sorted(known))}")
    return known[name]
