"""What the process of a kind is told when it starts."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass

from benchmarks.speed.cases import Case
from benchmarks.speed.kinds import Kind


@dataclass(frozen=True, slots=True)
class Task:
    """One kind of pass over one case, on a device."""

    case: Case
    kind: Kind
    device: str
    """``cpu`` or ``cuda``."""
    threads: int | None
    """Of PyTorch's operators; None leaves them to it."""

    def to_json(self) -> str:
        """For a command line."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Task:
        """What `to_json` wrote."""
        fields = json.loads(text)
        case = {**fields.pop("case"), "budgets": ()}
        return cls(case=Case(**case), kind=Kind(**fields.pop("kind")), **fields)
