"""Texts for the user when a pass was refused memory."""

from __future__ import annotations

from streamcnn.ceiling.rooms import Room
from streamcnn.errors import BudgetExceeded
from streamcnn.plan.plan import Plan
from streamcnn.support.units import format_bytes

TOGETHER = "a pass in which processes meet is not begun again with smaller ones"
PROFILED = (
    "a pass under a profiler is not begun again with smaller ones, since its records take memory of the "
    "budget too: profile with budget=None and the same tiles"
)


def refusal(plan: Plan, direction: str, error: BaseException, room: Room | None, *, why_last: str) -> str:
    """The error's text when memory was refused or the budget passed, and the pass is given up.

    Parameters
    ----------
    room
        The room that another limit left, if that was less than the budget.
    why_last
        Why the pass was not begun again; empty if there was no plan with smaller tiles.
    """
    budget = "no budget" if plan.budget is None else f"budget {format_bytes(plan.budget)}"
    what = f"an allocation in the {direction} pass was refused: {budget}"
    if isinstance(error, BudgetExceeded):
        what = str(error)
    advice = "raise budget=" if room is None else f"a larger budget= does not help, since {room}"
    why = why_last or "there is no plan with smaller ones"
    return (
        f"{what}, projected {format_bytes(plan.projected_bytes)} with tiles of "
        f"{plan.tile[0]}x{plan.tile[1]} pixels, and {why}. "
        f"Nothing was changed; {advice}"
    )
