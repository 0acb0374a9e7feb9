"""A patch that has plans store maps away from the memory of the device."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest

from streamcnn.graph.program import Program
from streamcnn.plan.plan import PassPart, Plan
from streamcnn.plan.storage import Tier
from streamcnn.runtime import plan_cache


def away(
    monkeypatch: pytest.MonkeyPatch,
    choose: Callable[[str], Tier],
    overlaps: Callable[[PassPart], bool] = lambda part: True,
    crosses: Callable[[PassPart], bool] = lambda part: True,
) -> None:
    """Have plans keep maps away from memory, and move tiles while others of this and the next phase run."""
    original = plan_cache.make_plan

    def planned(*args: Any) -> tuple[Program, Plan, str | None]:
        program, plan, tail = original(*args)
        stores = {
            name: dataclasses.replace(store, tier=choose(name), gradient_tier=choose(name))
            for name, store in plan.stores.items()
        }
        again = [phase for phases in plan.rematerialised.values() for phase in phases]
        parts = {(direction, phase.level) for phase in plan.phases for direction in ("forward", "backward")}
        parts |= {("again", phase.level) for phase in again}
        chosen = {
            "overlapped": frozenset(filter(overlaps, parts)),
            "trailing": frozenset(filter(crosses, parts)),
            "leading": frozenset(filter(crosses, parts)),
        }
        return program, dataclasses.replace(plan, stores=stores, **chosen), tail

    monkeypatch.setattr(plan_cache, "make_plan", planned)
