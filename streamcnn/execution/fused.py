"""Steps with fused operators, where one pass over a map replaces several.

Operators are fused in steps and not in the program. Plans are made for single operators, and a fused operator
holds no more memory than those that it replaces.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise

from streamcnn.execution.step import Operator, Step
from streamcnn.graph.fusion import runs
from streamcnn.graph.ops.fused_norms import fused
from streamcnn.graph.ops.rules import Call


def with_fused_operators(step: Step) -> Step:
    """The step with one operator for each run that has a fused form, in place of the run's last operator."""
    operators = {operator.node.name: operator for operator in step.operators}
    releases = dict(step.releases)
    for nodes in list(runs([operator.node for operator in step.operators], step.owned)):
        run = [operators[node.name] for node in nodes]
        if not _is_whole(run):
            continue
        names = [node.name for node in nodes]
        operators[names[-1]] = _fused(names, run)
        for name in names[:-1]:
            del operators[name]
        dead = [value for name in names for value in releases.pop(name, ()) if value not in names[:-1]]
        releases[names[-1]] = tuple(dead)
    return replace(step, operators=tuple(operators.values()), releases=releases)


def _is_whole(run: Sequence[Operator]) -> bool:
    """Whether each operator gives just what the next one reads, without padding or positions."""
    alike = all(
        operator.is_placed
        and not operator.keywords
        and not operator.is_skipped
        and all(operand.part == operand.window for operand in operator.operands.values())
        for operator in run
    )
    return (
        alike
        and all(after.operands[before.node.name].part == before.out for before, after in pairwise(run))
        and len({operator.out.size for operator in run}) == 1
    )


def _fused(names: Sequence[str], run: Sequence[Operator]) -> Operator:
    call = fused(names, [Call(each.target, each.node.args, each.node.kwargs) for each in run])
    assert call is not None
    last = run[-1]
    node = replace(last.node, target=call.target, args=call.args, kwargs=call.kwargs, in_place=None)
    operands = {name: operand for each in run for name, operand in each.operands.items() if name not in names}
    return replace(last, node=node, target=call.target, operands=operands)
