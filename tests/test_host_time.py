"""The benchmark of what a step takes beside its operators."""

from __future__ import annotations

import json

import pytest


def test_plain_and_streamed_steps_are_timed_side_by_side(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("timm")
    from benchmarks.host_time import one

    one(64, 64, 2, "cpu")
    found = json.loads(capsys.readouterr().out)
    # One for each of 53 norms, four of which share theirs with a norm beside them, and one for the pool.
    assert found["num_tiles"] == 50
    assert 0 < found["plain"] < found["forward"] + found["backward"]
