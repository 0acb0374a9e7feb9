"""The benchmark of planning itself."""

from __future__ import annotations

import pytest

from benchmarks.record import in_fresh_process


def test_each_part_of_planning_is_timed() -> None:
    pytest.importorskip("timm")
    found = in_fresh_process("benchmarks.planning_time", "one", "resnet18", "256", "1GiB")
    parts = [found[f"{name}_seconds"] for name in ("capture", "trace", "make_plan")]
    assert all(seconds > 0 for seconds in parts)
    assert sum(parts) == pytest.approx(found["seconds"], abs=0.01)
    assert found["again_seconds"] < sum(parts)
    assert found["fits"]
