"""What changes the weights: optimiser, schedule, loss scaling and averaged weights."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from copy import deepcopy
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from streamcnn.errors import UnsupportedModel
from streamcnn.training.processes import Processes
from streamcnn.training.settings import TrainSettings
from streamcnn.training.state import restoring


class Optimisation:
    """Changes the weights of a network by their gradients.

    Parameters
    ----------
    net
        Whose weights.
    settings
        How.
    device
        Where the network is.
    """

    def __init__(self, net: nn.Module, settings: TrainSettings, device: torch.device) -> None:
        self._net = net
        self._settings = settings
        self._optimizer = settings.make_optimizer(net)
        self._schedule = settings.make_schedule(self._optimizer)
        self._scaler = torch.amp.GradScaler(device.type, enabled=settings.autocast == "float16")
        self._averaged: AveragedModel | None = None
        if settings.ema_decay is not None:
            average = get_ema_multi_avg_fn(settings.ema_decay)  # type: ignore[no-untyped-call]
            self._averaged = AveragedModel(net, multi_avg_fn=average)
        self._restored_from: Path | None = None
        self._untried = set[str]()

    @property
    def learning_rate(self) -> float:
        """Of the next step."""
        return float(self._optimizer.param_groups[0]["lr"])

    def clear_gradients(self) -> None:
        """Forget the gradients of the update before."""
        self._optimizer.zero_grad(set_to_none=True)

    def backward(self, loss: Tensor) -> None:
        """Add the gradients of a loss, a scalar, scaled where it is of half precision."""
        self._scaler.scale(loss).backward()  # type: ignore[no-untyped-call]

    def add_up(self, processes: Processes) -> None:
        """Add the gradients that several processes have; those that none has stay none.

        Raises
        ------
        UnsupportedModel
            If one is sparse.
        """
        if processes.count == 1:
            return
        parameters = [each for each in self._net.parameters() if each.requires_grad]
        layouts = processes.gathered([_layout_of(each.grad) for each in parameters])
        if "sparse" in " ".join(chain.from_iterable(layouts)):
            raise UnsupportedModel(
                "the model has sparse gradients, which are not added up among processes: make its embeddings "
                "with sparse=False, or train in one process"
            )
        summed = [each for each, *of_each in zip(parameters, *layouts, strict=True) if any(of_each)]
        for each in summed:
            if each.grad is None:
                each.grad = torch.zeros_like(each)
        processes.add_up(each.grad for each in summed if each.grad is not None)

    def step(self) -> None:
        """Change the weights by their gradients, and what follows the weights.

        Gradients that are beyond float16 leave all as it is, but that the next loss is scaled by less.
        """
        settings = self._settings
        if settings.clip_norm is not None:
            self._scaler.unscale_(self._optimizer)
            nn.utils.clip_grad_norm_(self._net.parameters(), settings.clip_norm)
        with self._first_use("update"):
            if not self._change_weights():
                return
            if self._averaged is not None:
                self._averaged.update_parameters(self._net)
            if self._schedule is not None and settings.schedule_every == "update":
                self._schedule.step()

    def _change_weights(self) -> bool:
        """Let the optimiser make its step; whether it has made one."""
        scale = self._scaler.get_scale()
        self._scaler.step(self._optimizer)
        self._scaler.update()
        return self._scaler.get_scale() >= scale

    def end_epoch(self, validation_loss: float) -> None:
        """Let the schedule make its step, if it makes one after each epoch."""
        if self._schedule is not None and self._settings.schedule_every == "epoch":
            with self._first_use("epoch"):
                self._settings.step_schedule(self._schedule, validation_loss)

    @contextmanager
    def averaged_weights(self) -> Iterator[None]:
        """Lend the network the averaged weights, if there are any."""
        if self._averaged is None:
            yield
            return
        own = {name: _copy_of(value) for name, value in self._net.state_dict().items()}
        averaged = self._averaged.module
        assert isinstance(averaged, nn.Module)
        self._net.load_state_dict(averaged.state_dict())
        try:
            yield
        finally:
            self._net.load_state_dict(own)

    def state_dict(self) -> dict[str, Any]:
        """All states but the network's, by name."""
        return {
            "optimizer": self._optimizer.state_dict(),
            "schedule": None if self._schedule is None else self._schedule.state_dict(),
            "scaler": self._scaler.state_dict(),
            "averaged": None if self._averaged is None else self._averaged.state_dict(),
        }

    def load_state_dict(self, saved: Mapping[str, Any], folder: Path) -> None:
        """Go on from such states, which are from a checkpoint in ``folder``."""
        self._optimizer.load_state_dict(saved["optimizer"])
        if self._schedule is not None:
            self._schedule.load_state_dict(saved["schedule"])
            # The steps that came first were another process's, and PyTorch warns of a schedule that begins.
            self._optimizer._opt_called = True  # type: ignore[attr-defined]
        self._scaler.load_state_dict(saved["scaler"])
        if self._averaged is not None:
            self._averaged.load_state_dict(saved["averaged"])
        self._restored_from, self._untried = folder, {"update", "epoch"}

    @contextmanager
    def _first_use(self, what: str) -> Iterator[None]:
        """Tell a checkpoint whose states were changed where they are used: loading does not look at all."""
        if self._restored_from is None or what not in self._untried:
            yield
            return
        with restoring(self._restored_from):
            yield
        self._untried.discard(what)


def _copy_of(value: Any) -> Any:
    """A value of a network's state, which is a tensor, or a module's extra state and may be anything."""
    return value.clone() if isinstance(value, Tensor) else deepcopy(value)


def _layout_of(gradient: Tensor | None) -> str:
    """How it lies in memory; nothing for none."""
    return "" if gradient is None else str(gradient.layout)
