"""Plans where the disk has no room for all maps that memory has none for: some are computed again."""

from __future__ import annotations

from copy import deepcopy
from pathlib import Path

import pytest
import torch
from streaming_cases import assert_same_gradients, assert_same_states, error_of
from torch import Tensor, nn

from streamcnn import StreamingModel
from streamcnn.errors import PlanDoesNotFit
from streamcnn.plan.storage import Tier
from streamcnn.runtime import pass_stores

BUDGET = "60MiB"
SHAPE = (1, 3, 360, 360)


class Gated(nn.Module):
    """Normalised convolutions beside each other, of which one gates the other."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.value, self.gate = (
            nn.Sequential(nn.Conv2d(channels, channels, 3, padding=1, bias=False), nn.BatchNorm2d(channels))
            for _ in range(2)
        )

    def forward(self, x: Tensor) -> Tensor:
        """The same shape, (N, C, H, W)."""
        return torch.relu(x + self.value(x) * self.gate(x).sigmoid())


def make_net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, stride=2, padding=1),
        *(Gated(16) for _ in range(4)),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(16, 3),
    ).double()


def make_model(folder: Path, budget: str = BUDGET) -> StreamingModel:
    return StreamingModel(make_net(), budget, spill=folder)


@pytest.mark.parametrize("percent", [50, 35])
def test_gradients_are_those_of_the_whole_image(
    percent: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make_model(tmp_path)
    anywhere = model.plan(SHAPE, torch.float64)
    needed = anywhere.bytes_on(Tier.DISK)
    assert needed
    room = needed * percent // 100
    monkeypatch.setattr(pass_stores, "free_bytes", lambda parent: room)
    with pytest.warns(
        UserWarning, match=r"room for .*, and the fastest plan spills .*: more is computed again"
    ):
        plan = model.plan(SHAPE, torch.float64)
    assert plan.bytes_on(Tier.DISK) <= room
    assert plan.recomputation > anywhere.recomputation
    image, plain = torch.rand(SHAPE, dtype=torch.float64), deepcopy(model.net)
    found = model(image)
    found.square().sum().backward()
    wanted = plain(image)
    wanted.square().sum().backward()
    assert error_of(found, wanted) < 1e-9
    assert_same_gradients(model.net, plain)
    assert_same_states(model.net, plain)
    assert model.last_report is not None
    assert model.last_report.projected_bytes == plan.projected_bytes
    assert model.last_report.num_smaller_plans == 0


def test_where_no_plan_finds_room_nothing_is_begun(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_model(tmp_path)
    monkeypatch.setattr(pass_stores, "free_bytes", lambda parent: 1000)
    with pytest.raises(PlanDoesNotFit, match=r"spills .* and .* has 1000 bytes left: pass spill="):
        model(torch.rand(SHAPE, dtype=torch.float64))
    assert not list(tmp_path.iterdir())
