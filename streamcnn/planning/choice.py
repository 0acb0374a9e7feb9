"""Which candidate each stage takes, given where maps are: the fastest ones that fit together."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from streamcnn.plan.level_bytes import Ints
from streamcnn.planning.candidate_scores import CandidateScores

_ROUNDS = 16
"""How often the room is tightened at most."""
_KEPT_ROUNDS = 4
"""How often candidates are chosen again, given what the backend keeps of the last choice, at most."""


@dataclass(frozen=True, slots=True)
class Choice:
    """Which candidate each stage takes, and the time and bytes of that."""

    indices: tuple[int, ...]
    seconds: float
    nbytes: int
    fits: bool

    @property
    def rank(self) -> tuple[bool, float]:
        """Smaller is better."""
        return not self.fits, self.seconds if self.fits else self.nbytes


def choose(scores: CandidateScores, limit: int, budget: int | None) -> Choice:
    """For each stage the fastest candidate that fits, with at most ``limit`` reusable bytes in a step.

    What the backend keeps depends on all choices together, so they may take more than the budget. Then they
    are made again with room for a little less than the last ones took, until that stops falling. If they
    still do not fit, this starts over from the smallest candidates. The outcome then does not depend on the
    budget, so the budget that an error names as enough is enough.
    """
    allowed = math.inf if budget is None else budget
    choice = _tightened(scores, limit, room=allowed, allowed=allowed)
    if choice.nbytes > allowed:
        choice = _tightened(scores, limit, room=0, allowed=allowed)
    return choice


def _tightened(scores: CandidateScores, limit: int, *, room: float, allowed: float) -> Choice:
    """The first choice that fits ``allowed``: for ``room``, then for less than the last choice took.

    If none fits, the smallest.
    """
    best = _choose_once(scores, limit, room, allowed)
    for _ in range(_ROUNDS):
        if best.nbytes <= allowed:
            break
        choice = _choose_once(scores, limit, best.nbytes - 1, allowed)
        if choice.nbytes >= best.nbytes:
            break
        best = choice
    return best


def _choose_once(scores: CandidateScores, limit: int, room: float, allowed: float) -> Choice:
    """For each stage the fastest candidate that fits ``room``, given what the backend keeps of them all."""
    found, choice = scores.pass_bytes(None, limit), None
    for _ in range(_KEPT_ROUNDS):
        before, choice = choice, _fastest(scores, scores.peaks(found), limit, room)
        if before is not None and np.array_equal(before, choice):
            break
        found = scores.pass_bytes(choice, limit)
    assert choice is not None
    rows = np.arange(len(choice))
    found = scores.pass_bytes(choice, int(scores.reusable[rows, choice].max(initial=0)))
    nbytes = max(int(scores.peaks(found)[rows, choice].max(initial=0)), scores.other_peak(found))
    return Choice(
        indices=tuple(choice.tolist()),
        seconds=float(scores.seconds[rows, choice].sum()),
        nbytes=nbytes,
        fits=nbytes <= allowed,
    )


def _fastest(scores: CandidateScores, peaks: Ints, limit: int, room: float) -> Ints:
    """By stage: the fastest candidate that fits; where none does, the smallest."""
    fitting = (peaks <= room) & (scores.reusable <= limit)
    seconds = np.where(fitting, scores.seconds, np.inf)
    choice: Ints = np.where(fitting.any(axis=1), seconds.argmin(axis=1), peaks.argmin(axis=1))
    return choice
