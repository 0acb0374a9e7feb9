"""All cases, by kind."""

from __future__ import annotations

from benchmarks.compatibility.case import Case
from benchmarks.compatibility.cases import (
    architectures,
    arguments,
    around,
    blocks,
    captures,
    gradients,
    leftovers,
    objects,
    operators,
    states,
    unfollowed,
)


def all_cases() -> list[Case]:
    """Every case in the order of the table; a case's number is its place, from 1."""
    kinds = (
        captures,
        gradients,
        leftovers,
        blocks,
        operators,
        architectures,
        arguments,
        around,
        states,
        unfollowed,
        objects,
    )
    return [case for kind in kinds for case in kind.CASES]
