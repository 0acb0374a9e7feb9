"""Time and memory of a pass over both directions, as its limits measure them."""

from __future__ import annotations

import time
from dataclasses import dataclass, field

from streamcnn.ceiling.device import Limit
from streamcnn.execution.executor import PhaseReport
from streamcnn.plan.plan import Plan
from streamcnn.runtime.report import Report


@dataclass(slots=True)
class PassMeter:
    """Time and memory of one pass so far, including tries that were refused memory."""

    began: float = field(default_factory=time.perf_counter)
    seconds: float = 0.0
    peak: int | None = None
    """Bytes in the direction and the try with most; None if none was measured."""
    reading: str = "unknown"
    """Name of the counter behind the peak."""
    is_shared: bool = False
    """Whether another pass of this process ran at the same time."""
    samples: list[tuple[float, int]] = field(default_factory=list)
    """Seconds since the pass was made, and bytes held then."""
    num_retries: int = 0
    num_smaller_plans: int = 0

    def note(self, limit: Limit) -> None:
        """Add the measurements of the limit of one direction, which may have been refused memory."""
        peak, at_most = limit.peak_bytes, limit.at_most_bytes
        if peak is not None and at_most is not None:
            # This direction may be the one with more, as samples may have missed its peak.
            if self.peak is None or at_most > self.peak:
                self.reading = limit.reading
            self.peak = max(self.peak or 0, peak)
        self.is_shared = self.is_shared or limit.is_shared
        self.samples.extend((when - self.began, nbytes) for when, nbytes in limit.samples)

    def report(
        self,
        plan: Plan,
        *,
        phases: tuple[PhaseReport, ...],
        baseline_bytes: int | None,
        waiting_bytes: int,
        num_compiled: int | None,
    ) -> Report:
        """The report of the pass; the keyword arguments are the fields of :class:`Report`."""
        return Report(
            budget=plan.budget,
            projected_bytes=plan.projected_bytes,
            measured_bytes=self.peak,
            reading=self.reading,
            seconds=self.seconds,
            phases=phases,
            num_retries=self.num_retries,
            num_smaller_plans=self.num_smaller_plans,
            samples=tuple(self.samples),
            baseline_bytes=baseline_bytes,
            waiting_bytes=waiting_bytes,
            is_shared=self.is_shared,
            num_compiled=num_compiled,
        )
