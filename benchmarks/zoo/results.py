"""What was found of the families, and what it says: the verdicts."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from benchmarks import record as records
from benchmarks.zoo.families import Family

NAME = "zoo"
"""Of the file of results."""

EXACT, WITH_RESIDENTS, REFUSED = "exact", "exact with residents", "refused"
WRONG, FAILED, UNFINISHED, EXCLUDED = "WRONG", "FAILED", "unfinished", "excluded"
VERDICTS = (EXACT, WITH_RESIDENTS, REFUSED, WRONG, FAILED, UNFINISHED, EXCLUDED)


@dataclass(frozen=True, slots=True)
class Row:
    """The last record of a family."""

    family: Family
    fields: Mapping[str, Any]
    """As recorded: what the process found, and where and when."""

    @property
    def passes(self) -> list[Mapping[str, Any]]:
        """What came of the streamed passes, in train mode and in evaluation mode."""
        return [self.fields[mode] for mode in ("train", "eval") if mode in self.fields]

    @property
    def plan(self) -> Mapping[str, Any]:
        """The plan, or how planning ended; empty if it was not come to."""
        return self.fields.get("plan", {})

    @property
    def is_planned(self) -> bool:
        """Whether there is a plan, which fits or not."""
        return "fits" in self.plan

    @property
    def verdict(self) -> str:
        """One of `VERDICTS`."""
        if "excluded" in self.fields:
            return EXCLUDED
        parts = [*self.passes, self.plan]
        if any("failed" in part for part in parts):
            return FAILED
        if any(part.get("num_wrong") for part in self.passes):
            return WRONG
        if any("refused" in part for part in parts):
            return REFUSED
        if len(self.passes) < 2 or any("unfit" in each for each in self.passes):
            return UNFINISHED
        held = any(part.get("residents") for part in parts)
        return WITH_RESIDENTS if held else EXACT

    @property
    def reason(self) -> str:
        """Why the verdict is not ``exact``; empty if it is."""
        if "excluded" in self.fields:
            return str(self.fields["excluded"])
        parts = [*self.passes, self.plan]
        for way in ("failed", "wrong", "refused"):
            for part in parts:
                if part.get(way):
                    return _worst(part) if way == "wrong" else str(part[way])
        if self.verdict == UNFINISHED:
            unfit = next((each["unfit"] for each in self.passes if "unfit" in each), "")
            return str(unfit or self.fields.get("ended", ""))
        return ", ".join(self.resident_reasons)

    @property
    def resident_reasons(self) -> list[str]:
        """Why operators of the plan are resident, each reason once, those that hold most first."""
        return list(dict.fromkeys(each["reason"] for each in self.plan.get("residents", ())))

    @property
    def exceeds_plain(self) -> bool:
        """Whether the plan takes more memory than plain PyTorch."""
        return self.is_planned and self.plan["projected_bytes"] > self.plan["plain_bytes"]


def _worst(found: Mapping[str, Any]) -> str:
    """The value of a pass that is furthest from the plain one."""
    name, error = next(iter(found["wrong"].items()))
    return f"{found['mode']}: {found['num_wrong']} of {found['compared']}, {name} {error:.1e}"


def newest() -> dict[Family, Row]:
    """The last record of each family, in the order of first records."""
    path = records.RESULTS / f"{NAME}.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    found = {}
    for fields in map(json.loads, lines):
        family = Family(fields["library"], fields["family"])
        found[family] = Row(family, fields)
    return found


def record(family: Family, command: str, found: Mapping[str, Any], versions: Mapping[str, str]) -> Row:
    """Append what was found of a family to the file of results."""
    fields = {"library": family.library, "family": family.name, "versions": dict(versions), **found}
    return Row(family, json.loads(records.append(NAME, command, **fields)))
