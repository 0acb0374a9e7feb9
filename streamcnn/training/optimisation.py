"""Updates of the weights: optimiser, learning-rate schedule, loss scaling and averaged weights."""

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
    """Updates the weights of a network from their gradients.

    Parameters
    ----------
    net
        The network to train.
    settings
        Of the run.
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
        """The learning rate of the next step, of the first parameter group."""
        return float(self._optimizer.param_groups[0]["lr"])

    def clear_gradients(self) -> None:
        """Clear the gradients of the previous update."""
        self._optimizer.zero_grad(set_to_none=True)

    def backward(self, loss: Tensor) -> None:
        """Add the gradients of a scalar loss, which is scaled first under float16 autocast."""
        self._scaler.scale(loss).backward()  # type: ignore[no-untyped-call]

    def add_up(self, processes: Processes) -> None:
        """Sum each gradient over all processes; a gradient that no process has stays None.

        Raises
        ------
        UnsupportedModel
            If a gradient is sparse.
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
        """Make one optimiser step, then update the averaged weights and a per-update schedule.

        If gradients overflow float16, all of these stay as they are, and the next loss is scaled by less.
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
        """Make one optimiser step; return whether one was made, which float16 overflow prevents."""
        scale = self._scaler.get_scale()
        self._scaler.step(self._optimizer)
        self._scaler.update()
        return self._scaler.get_scale() >= scale

    def end_epoch(self, validation_loss: float) -> None:
        """Advance the schedule, if it moves with each epoch."""
        if self._schedule is not None and self._settings.schedule_every == "epoch":
            with self._first_use("epoch"):
                self._settings.step_schedule(self._schedule, validation_loss)

    @contextmanager
    def averaged_weights(self) -> Iterator[None]:
        """Give the network the averaged weights for the block, if there are any."""
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
        """The states of the optimiser, schedule, loss scaling and averaged weights, by name."""
        return {
            "optimizer": self._optimizer.state_dict(),
            "schedule": None if self._schedule is None else self._schedule.state_dict(),
            "scaler": self._scaler.state_dict(),
            "averaged": None if self._averaged is None else self._averaged.state_dict(),
        }

    def load_state_dict(self, saved: Mapping[str, Any], folder: Path) -> None:
        """Restore the states of :meth:`state_dict`, which come from a checkpoint in ``folder``."""
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
        """Blame the checkpoint if the first use of its states fails: loading does not check all of them."""
        if self._restored_from is None or what not in self._untried:
            yield
            return
        with restoring(self._restored_from):
            yield
        self._untried.discard(what)


def _copy_of(value: Any) -> Any:
    """A copy of a state's value: a tensor, or a module's extra state, which may be anything."""
    return value.clone() if isinstance(value, Tensor) else deepcopy(value)


def _layout_of(gradient: Tensor | None) -> str:
    """The gradient's layout as text; empty if there is no gradient."""
    return "" if gradient is None else str(gradient.layout)
