"""A training step on one large image, planned and not run."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.zoo.states import Shape
from streamcnn import StreamingModel
from streamcnn.capture.capture import RawGraph
from streamcnn.capture.forward_pass import stand_in
from streamcnn.capture.lowering.tracing import Trace
from streamcnn.graph.costs import Operation, cost_of, counted
from streamcnn.graph.program import Kind, Node, Program, on_whole_maps
from streamcnn.planning.cost_model import resident_work, work
from streamcnn.runtime.machines import this_machine

BUDGET = "11GB"
_MOST_REASONS = 8
_DTYPE, _DEVICE = torch.float32, torch.device("cpu")


def planned(net: nn.Module, shape: Shape) -> dict[str, Any]:
    """The plan in train mode, and which products of the program stream, ready for a line of JSON.

    Raises
    ------
    UnsupportedModel
        If the model cannot be captured at this shape.
    """
    model = StreamingModel(net.train(), BUDGET)
    # What this process may take here and now is no matter: nothing is run.
    machine = this_machine(_DEVICE)
    start = time.perf_counter()
    plan = model.plan_for(machine, shape)
    seconds = time.perf_counter() - start
    program = _program(model, shape)
    return {
        "shape": shape,
        "fits": plan.fits,
        "projected_bytes": plan.projected_bytes,
        "plain_bytes": plan.plain_bytes,
        "projected_seconds": round(plan.projected_seconds, 2),
        "plain_seconds": round(plan.plain_seconds, 2),
        "planning_seconds": round(seconds, 1),
        "phases": len(plan.phases),
        **products(program),
        "residents": residents(program),
    }


def _program(model: StreamingModel, shape: Shape) -> Program:
    """All that streams, the last layers too, which a plan may leave on whole maps."""

    def trace(graph: RawGraph, states: Mapping[str, Tensor]) -> Program:
        return Trace(graph, states, _DTYPE, _DEVICE).program()

    # The model's own has the capture already.
    return model._call.until_captured(model.net, stand_in(shape, _DTYPE, _DEVICE), (), {}, trace)


def products(program: Program) -> dict[str, int]:
    """How many convolutions and matrix products of maps there are, how many stream, and their arithmetic."""
    whole = {node.name for node in on_whole_maps(program)}
    streamed, resident = [], []
    for node in program.nodes.values():
        if node.kind is Kind.LOCAL and _is_product(program, node):
            streamed.append(work(program, node).flops)
        elif node.name in whole and _is_product(program, node):
            resident.append(resident_work(program, node).flops)
    return {
        "num_products": len(streamed) + len(resident),
        "num_streamed": len(streamed),
        "flops": sum(streamed) + sum(resident),
        "streamed_flops": sum(streamed),
    }


def residents(program: Program) -> list[dict[str, Any]]:
    """Operators that no rule streams, alike ones together, those with the most bytes first.

    Each has its reason, where it stands in the model, how often, and the bytes of results and operands.
    """
    times: Counter[tuple[str, str]] = Counter()
    nbytes: Counter[tuple[str, str]] = Counter()
    for node in program.residents:
        key = node.note, node.source
        times[key] += 1
        nbytes[key] += node.nbytes + sum(
            program.nodes[name].nbytes for name in node.operands if program.nodes[name].kind is Kind.GATHER
        )
    return [
        {"reason": reason, "source": source, "times": times[reason, source], "bytes": total}
        for (reason, source), total in nbytes.most_common(_MOST_REASONS)
    ]


def _is_product(program: Program, node: Node) -> bool:
    if cost_of(node.target).routine is not None:
        return True
    return node.kind is Kind.GLOBAL and counted(Operation.of(program, node)) > 0
