"""The planner, which makes a frozen plan for one image shape under a budget.

For each of a few places where the resident tail may begin, the program is staged with more and with fewer
split points, and the search picks tiles, stores and maps to recompute. Of the plans that fit, the planner
takes the one with the least projected time. If none fits, it returns the one that comes closest, which can be
read but not run. No plan takes more bytes than plain PyTorch, which is the whole program as a tail, unless a
tile is asked for.
"""

from __future__ import annotations

from dataclasses import replace

from streamcnn.graph.program import Program
from streamcnn.plan.plan import Plan
from streamcnn.planning.attempts import Attempt, Attempts, Retrace
from streamcnn.planning.candidates import TilingCandidates
from streamcnn.planning.freezing import frozen_plan
from streamcnn.planning.spec import Machine, PassSpec
from streamcnn.planning.tails import can_be_whole, tails_to_try, whole_program


def make_plan(retrace: Retrace, spec: PassSpec, machine: Machine) -> tuple[Program, Plan, str | None]:
    """Make a plan; return its program, the plan, and the captured call with which the tail begins, if any.

    Check :attr:`Plan.fits` before running the plan.
    """
    attempts = Attempts(retrace, spec, machine)
    untailed = attempts.tilings(None)
    plain = attempts.make(whole_program(untailed), untailed)
    best = min(_all_attempts(attempts, untailed, plain), key=lambda attempt: attempt.rank)
    best = replace(best, solution=best.search.improved(best.solution))
    plan = frozen_plan(best, untailed, plain.solution.nbytes, spec, machine)
    return best.search.program, plan, best.tail.start if best.tail else None


def _all_attempts(attempts: Attempts, untailed: TilingCandidates, plain: Attempt) -> list[Attempt]:
    """Attempts without a tail and with several, none larger than ``plain``, the whole program as a tail."""
    spec = attempts.spec
    # Where a tile is asked for, there are tiles.
    may_be_plain = spec.tail and spec.tile is None
    most = plain.solution.nbytes if may_be_plain else None
    first = attempts.make(None, untailed, most)
    found = [first]
    if spec.tail:
        tails = tails_to_try(untailed, first.solution.tilings, _spare_bytes(attempts, first))
        found += [attempts.make(tail, untailed, most) for tail in tails]
    if most is not None:
        found = [each for each in found if each.solution.nbytes <= most]
        if not found or can_be_whole(untailed):
            found.insert(0, plain)
    return found


def _spare_bytes(attempts: Attempts, attempt: Attempt) -> int:
    """Bytes of the budget that an attempt leaves for a tail; 0 where a tail is not to fill them."""
    room = attempts.room
    if room is None or attempts.spec.tile is not None or not attempt.solution.fits:
        return 0
    return room - attempt.solution.nbytes
