"""The search for saved values that are overwritten behind autograd's back."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from streamcnn.capture.flat import saved_values
from streamcnn.capture.forward_pass import capture


def test_only_calls_that_touch_what_is_overwritten_are_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every norm in training mode overwrites its statistics, and a network may have hundreds of them."""
    looked_at: list[str] = []
    saves = saved_values._saves
    monkeypatch.setattr(
        saved_values, "_saves", lambda node, memory: looked_at.append(node.name) or saves(node, memory)
    )

    def count(num_norms: int) -> int:
        looked_at.clear()
        layers = [nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), nn.ReLU()) for _ in range(num_norms)]
        capture(nn.Sequential(*layers), (2, 3, 8, 8), torch.float32)
        return len(looked_at)

    few = count(4)
    assert 0 < few
    assert count(16) == 4 * few
