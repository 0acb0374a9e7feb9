"""The profile of one tile size: the line of JSON that a measuring process prints."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass

from streamcnn.profiling.sketch import PlanSketch
from streamcnn.profiling.timeline import Timeline


@dataclass(frozen=True, slots=True)
class TileProfile:
    """The projected and the measured peak of an update with one tile size. Sizes are in bytes."""

    tile: int
    """Largest edge of a tile in input pixels, as requested."""
    projected_bytes: int
    measured_bytes: int | None
    """Largest peak of all updates above the baseline; ``None`` if none ran or it cannot be read."""
    reading: str
    """The counter that ``measured_bytes`` comes from."""
    seconds: float | None
    """Forward and backward, the median of the updates after the first; ``None`` if they did not run."""
    recomputation: float
    """Floating-point operations relative to plain PyTorch: 1 if nothing is recomputed."""
    bytes_moved: int | None
    """Read from and written to stores; ``None`` if the update did not run."""
    budget: int | None
    """``None`` for no ceiling."""
    plain_bytes: int
    """Projected peak of plain PyTorch on the whole image at once."""
    refusal: str | None
    """Why the update did not run under the budget; ``None`` if it did."""
    explanation: str
    """The plan in words."""
    plan: PlanSketch
    """The data of a drawing of the plan."""
    timeline: Timeline | None
    """Memory over the time of the update with the largest peak; ``None`` if none ran or it cannot be read."""

    def to_json(self) -> str:
        """The profile as one line of JSON; :meth:`from_json` reads it."""
        timeline = None if self.timeline is None else self.timeline.to_columns()
        return json.dumps({**asdict(self), "timeline": timeline})

    @classmethod
    def from_json(cls, text: str) -> TileProfile:
        """The profile from a line of JSON."""
        fields = json.loads(text)
        timeline, plan = fields.pop("timeline"), fields.pop("plan")
        return cls(
            **fields,
            plan=PlanSketch.from_fields(plan),
            timeline=None if timeline is None else Timeline.from_columns(timeline),
        )


def fastest(profiles: Sequence[TileProfile]) -> TileProfile | None:
    """The profile with the shortest update of those that ran; ``None`` if none did."""
    ran = [profile for profile in profiles if profile.seconds is not None]
    return min(ran, key=lambda profile: profile.seconds or 0.0, default=None)
