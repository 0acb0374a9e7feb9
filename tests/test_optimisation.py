"""What changes the weights: which steps count, and what follows them."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor, nn
from training_runs import Images, OnTensors

from streamcnn.training import Trainer, TrainSettings


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
