"""The measured time and memory of a pass: the streamed model's ``last_report``."""

from __future__ import annotations

from dataclasses import dataclass

from streamcnn.execution.executor import PhaseReport
from streamcnn.support.units import format_bytes, plural


@dataclass(frozen=True, slots=True)
class Report:
    """Measured bytes and seconds of the last forward pass and its backward pass, if it has run."""

    budget: int | None
    """Bytes allowed, by the user or another limit (`Plan.limited_by`), counted as ``measured_bytes``;
    ``None`` for no ceiling."""
    projected_bytes: int
    measured_bytes: int | None
    """Peak in bytes: on the CPU above what the process held when the forward pass began, on a GPU all that
    the process held there. Tries that were refused memory count too, and may exceed the budget if that was
    found only afterwards. ``None`` if the peak cannot be read."""
    reading: str
    """Name of the counter behind ``measured_bytes``: ``VmHWM`` is exact, ``VmRSS, sampled`` a lower bound."""
    seconds: float
    """Time until all work was queued: a GPU may still be computing then. The same holds for each phase."""
    phases: tuple[PhaseReport, ...]
    num_retries: int = 0
    """How often memory was refused and the pass begun again, by the same plan or a smaller one."""
    samples: tuple[tuple[float, int], ...] = ()
    """Seconds since the pass was made and bytes held then, counted as ``measured_bytes``, where the peak
    comes from sampling."""
    baseline_bytes: int | None = None
    """Resident memory of the process when the forward pass began; ``None`` if it cannot be read."""
    waiting_bytes: int = 0
    """Bytes of stores held by other forward passes that still wait for their backward pass; not part of this
    one's budget."""
    is_shared: bool = False
    """Whether another pass of this process ran at the same time. ``measured_bytes`` are the process's, so
    they include that pass's, and the lower of both ceilings was in force."""
    num_compiled: int | None = None
    """Number of compiled parts; ``None`` without ``compile=True``. A first pass has none: the parts that it
    meets are compiled before the next one."""
    num_smaller_plans: int = 0
    """Retries with a plan for less memory, which mostly has smaller tiles. Other retries repeat the plan:
    without compiled parts, or with the code that libraries compile counted again."""

    @property
    def bytes_moved(self) -> int:
        """Bytes read from and written to stores."""
        return sum(phase.bytes_read + phase.bytes_written for phase in self.phases)

    def explain(self) -> str:
        """The report as text, one line per phase and direction."""
        measured = "unknown" if self.measured_bytes is None else format_bytes(self.measured_bytes)
        budget = "no ceiling" if self.budget is None else f"budget {format_bytes(self.budget)}"
        lines = [
            f"peak {measured} ({self.reading}), projected {format_bytes(self.projected_bytes)}, {budget}",
            f"{self.seconds:.2f} s, {format_bytes(self.bytes_moved)} moved through stores",
        ]
        if self.num_retries:
            times, smaller = plural(self.num_retries, "time"), self.num_smaller_plans
            how = f"{plural(smaller, 'time')} by a smaller plan" if smaller else "by the same plan"
            lines.append(f"memory was refused {times} and the pass begun again, {how}")
        if self.num_compiled is not None:
            lines.append(f"{self.num_compiled} parts of it are compiled")
        if self.is_shared:
            lines.append("another pass ran at the same time: the peak is that of both")
        if self.waiting_bytes:
            lines.append(
                f"{format_bytes(self.waiting_bytes)} more are held by other forward passes that wait for "
                "their backward pass, outside this budget"
            )
        lines.extend(
            f"  phase {phase.level:<4} {phase.direction:<9}{phase.num_tiles:>5} tiles {phase.seconds:8.3f} s"
            f"  read {format_bytes(phase.bytes_read):>10}, written {format_bytes(phase.bytes_written):>10}"
            for phase in self.phases
        )
        return "\n".join(lines)
