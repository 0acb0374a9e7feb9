"""What two runs must have in common."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from streamcnn.training import read_log
from streamcnn.training.checkpoints import CheckpointFolder


def final_state(folder: Path) -> dict[str, Any]:
    """All that the last checkpoint holds but times and how often was saved."""
    state = CheckpointFolder(folder / "checkpoints").newest()
    assert state is not None
    del state["log_bytes"]
    best = state["progress"]["best"]
    state["progress"]["best"] = best and best.partition("-update-")[2]
    return state


def assert_equal(found: Any, expected: Any, where: str = "") -> None:
    """Every number and every bit the same."""
    assert type(found) is type(expected), where
    if isinstance(expected, torch.Tensor):
        assert torch.equal(found, expected), where
    elif isinstance(expected, dict):
        assert found.keys() == expected.keys(), where
        for key, value in expected.items():
            assert_equal(found[key], value, f"{where}.{key}")
    elif isinstance(expected, (list, tuple)):
        assert len(found) == len(expected), where
        for index, (one, other) in enumerate(zip(found, expected, strict=True)):
            assert_equal(one, other, f"{where}[{index}]")
    else:
        assert found == expected, where


def log_without_times(folder: Path) -> list[dict[str, Any]]:
    left_out = ("seconds", "megapixels_per_second", "measured_bytes")
    return [{k: v for k, v in line.items() if k not in left_out} for line in read_log(folder)]
