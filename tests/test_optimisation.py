"""What changes the weights: which steps count, and what follows them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from training_runs import Images, OnTensors

from streamcnn.training import Trainer, TrainSettings
from streamcnn.training.optimisation import Optimisation


def optimisation(net: nn.Module, **changes: Any) -> Optimisation:
    return Optimisation(net, TrainSettings(**{"optimizer": "SGD", **changes}), torch.device("cpu"))


def test_gradients_beyond_float16_are_no_step_of_the_schedule_and_the_average() -> None:
    net = nn.Linear(1, 1, bias=False)
    made = optimisation(
        net,
        autocast="float16",
        ema_decay=0.5,
        clip_norm=1.0,
        schedule="ExponentialLR",
        schedule_options={"gamma": 0.5},
        schedule_every="update",
        learning_rate=0.1,
    )
    before = net.weight.detach().clone()
    made.backward(net.weight.sum() * 1e36)
    made.step()
    assert torch.equal(net.weight, before)
    assert made.learning_rate == 0.1
    assert made.state_dict()["averaged"]["n_averaged"] == 0
    scale = made.state_dict()["scaler"]["scale"]

    made.clear_gradients()
    made.backward(net.weight.sum())
    made.step()
    assert not torch.equal(net.weight, before)
    assert made.learning_rate == 0.05
    assert made.state_dict()["averaged"]["n_averaged"] == 1
    assert made.state_dict()["scaler"]["scale"] == scale


class Noted(nn.Module):
    """Counts its forward passes in what modules may keep besides tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(1, 3)
        self.note = {"passes": 0}

    def get_extra_state(self) -> dict[str, int]:
        return dict(self.note)

    def set_extra_state(self, state: dict[str, int]) -> None:
        self.note = dict(state)

    def forward(self, x: Tensor) -> Tensor:
        self.note["passes"] += 1
        return self.head(x.mean((2, 3)))


def test_a_module_may_keep_more_than_tensors(tmp_path: Path) -> None:
    def trainer(epochs: int) -> Trainer:
        settings = TrainSettings(epochs=epochs, ema_decay=0.5)
        return Trainer(OnTensors(Noted()), Images(4), Images(3, seed=1), settings, tmp_path)

    trainer(1).run()
    resumed = trainer(2)
    resumed.run()
    # Validation is by a copy of the state, whose passes are not the net's.
    assert resumed.net.net.note == {"passes": 8}
