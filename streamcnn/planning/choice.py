"""Choose each stage's tiling candidate, given where maps are stored: the fastest that fit together."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from streamcnn.plan.level_bytes import Ints
from streamcnn.planning.candidate_scores import CandidateScores, Floats

_ROUNDS = 16
"""The most times that the room is tightened."""
_KEPT_ROUNDS = 4
"""The most times that candidates are chosen, each time given what the backend keeps of the last choice."""


@dataclass(frozen=True, slots=True)
class Choice:
    """The candidate of each stage, and the time and bytes of all of them."""

    indices: tuple[int, ...]
    seconds: float
    nbytes: int
    fits: bool
    peaks: Ints
    """(stages, candidates): bytes of the pass at each stage, had it that candidate."""
    scores: CandidateScores

    def saved_with(self, room: int) -> Floats:
        """(stages,): the most seconds that each stage would save if its peaks may take ``room`` bytes."""
        scores = self.scores
        taken = scores.seconds[np.arange(len(self.indices)), list(self.indices)]
        fastest = np.where(self.peaks <= room, scores.seconds, np.inf).min(axis=1, initial=np.inf)
        saved: Floats = np.maximum(taken - fastest, 0.0)
        return saved

    @property
    def rank(self) -> tuple[bool, float]:
        """Sort key, smaller is better: choices that fit by time, others by bytes."""
        return not self.fits, self.seconds if self.fits else self.nbytes


def choose(scores: CandidateScores, limit: int, budget: int | None) -> Choice:
    """Choose each stage's fastest candidate that fits, with at most ``limit`` reusable bytes in a step.

    What the backend keeps depends on all stages' candidates together, so these may exceed the budget. If they
    do, the choice is repeated with a limit just below its bytes, until they stop falling. If it still does
    not fit, this starts over from the smallest candidates. The result then does not depend on the budget, so
    the budget that an error names as enough is enough.
    """
    allowed = math.inf if budget is None else budget
    choice = _tightened(scores, limit, room=allowed, allowed=allowed)
    if choice.nbytes > allowed:
        choice = _tightened(scores, limit, room=0, allowed=allowed)
    return choice


def _tightened(scores: CandidateScores, limit: int, *, room: float, allowed: float) -> Choice:
    """The first choice that fits ``allowed``, made for ``room``, then for less than the last choice took.

    If none fits, the smallest is returned.
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
    """Choose each stage's fastest candidate that fits ``room``, given what the backend keeps of them all."""
    found, choice = scores.pass_bytes(None, limit), None
    for _ in range(_KEPT_ROUNDS):
        before, choice = choice, _fastest(scores, scores.peaks(found), limit, room)
        if before is not None and np.array_equal(before, choice):
            break
        found = scores.pass_bytes(choice, limit)
    assert choice is not None
    rows = np.arange(len(choice))
    found = scores.pass_bytes(choice, int(scores.reusable[rows, choice].max(initial=0)))
    peaks = scores.peaks(found)
    nbytes = max(int(peaks[rows, choice].max(initial=0)), scores.other_peak(found))
    return Choice(
        indices=tuple(choice.tolist()),
        seconds=float(scores.seconds[rows, choice].sum()),
        nbytes=nbytes,
        fits=nbytes <= allowed,
        peaks=peaks,
        scores=scores,
    )


def _fastest(scores: CandidateScores, peaks: Ints, limit: int, room: float) -> Ints:
    """By stage: the fastest candidate that fits; where none does, the smallest."""
    fitting = (peaks <= room) & (scores.reusable <= limit)
    seconds = np.where(fitting, scores.seconds, np.inf)
    choice: Ints = np.where(fitting.any(axis=1), seconds.argmin(axis=1), peaks.argmin(axis=1))
    return choice
