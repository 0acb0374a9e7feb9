"""What a report says of itself."""

from __future__ import annotations

import dataclasses

from streamcnn.runtime.report import Report

REPORT = Report(
    budget=2**30,
    projected_bytes=2**29,
    measured_bytes=2**28,
    reading="VmHWM",
    seconds=1.5,
    phases=(),
)


def test_stores_of_passes_that_wait_are_told_of() -> None:
    assert REPORT.waiting_bytes == 0
    assert "wait" not in REPORT.explain()
    waiting = dataclasses.replace(REPORT, waiting_bytes=3 * 2**20)
    (line,) = set(waiting.explain().splitlines()) - set(REPORT.explain().splitlines())
    assert line.startswith("3.00 MiB more are held by other forward passes that wait for their backward pass")
