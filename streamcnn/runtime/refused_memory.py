"""What a user is told when a pass was refused memory."""

from __future__ import annotations

from streamcnn.ceiling.rooms import Room
from streamcnn.errors import BudgetExceeded
from streamcnn.plan.plan import Plan
from streamcnn.support.units import format_bytes

_TOGETHER = "a pass in which processes meet is not begun again with smaller ones"


def refusal(plan: Plan, direction: str, error: BaseException, room: Room | None, *, is_alone: bool) -> str:
    """The error's text when memory was refused or the budget passed, and the pass is given up.

    Parameters
    ----------
    room
        What another limit left, if that was less than the budget.
    is_alone
        Whether the pass could have been begun again: processes that wait for each other cannot.
    """
    budget = "no budget" if plan.budget is None else f"budget {format_bytes(plan.budget)}"
    what = f"an allocation in the {direction} pass was refused: {budget}"
    if isinstance(error, BudgetExceeded):
        what = str(error)
    advice = "raise budget=" if room is None else f"a larger budget= does not help, since {room}"
    why = "there is no plan with smaller ones" if is_alone else _TOGETHER
    return (
        f"{what}, projected {format_bytes(plan.projected_bytes)} with tiles of "
        f"{plan.tile[0]}x{plan.tile[1]} pixels, and {why}. "
        f"Nothing was changed; {advice}"
    )
