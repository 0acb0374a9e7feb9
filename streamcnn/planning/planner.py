"""The planner: a frozen plan for one image shape under a budget.

For each of a few places where the resident tail may begin, the program is staged with more and with fewer
split points, and the search picks tiles, stores and what to recompute. Of the plans that fit, the one with
the least projected time is taken. If none fits, the one that comes closest is returned: it can be read, and
running it is refused. No plan takes more than plain PyTorch, which is all of the program as a tail, unless
tiles are asked for.
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
    """The best plan found, the program it is for, and the captured call that this one's tail begins with.

    Check :attr:`Plan.fits` before running it.
    """
    attempts = Attempts(retrace, spec, machine)
    untailed = attempts.tilings(None)
    plain = attempts.make(whole_program(untailed), untailed)
    best = min(_all_attempts(attempts, untailed, plain), key=lambda attempt: attempt.rank)
    best = replace(best, solution=best.search.improved(best.solution))
    plan = frozen_plan(best, untailed, plain.solution.nbytes, spec, machine)
    return best.search.program, plan, best.tail.start if best.tail else None


def _all_attempts(attempts: Attempts, untailed: TilingCandidates, plain: Attempt) -> list[Attempt]:
    """Attempts without a tail and with several, none of which takes more than ``plain``, all as a tail."""
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
    """What an attempt leaves of the budget for a tail; 0 where a tail is not to fill it."""
    room = attempts.room
    if room is None or attempts.spec.tile is not None or not attempt.solution.fits:
        return 0
    return room - attempt.solution.nbytes
