"""The benchmark of what a step takes beside its operators."""

from __future__ import annotations

import pytest

from benchmarks.record import in_fresh_process


def test_plain_and_streamed_steps_are_timed_side_by_side() -> None:
    pytest.importorskip("timm")
    found = in_fresh_process("benchmarks.host_time", "one", "64", "64", "2", "cpu")
    # One for each of 53 norms, four of which share theirs with a norm beside them, and one for the pool.
    assert found["num_tiles"] == 50
    assert 0 < found["plain"] < found["forward"] + found["backward"]
