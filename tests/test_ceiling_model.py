"""A model under its ceiling on host memory, in a process of its own: ``python test_ceiling_model.py``.

What happened is printed as one JSON object, which the tests read.
"""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from streamcnn import BudgetExceeded, StreamingModel
from streamcnn.ceiling.allocator import set_mmap_threshold
from streamcnn.ceiling.heap import free_heap_bytes
from streamcnn.ceiling.process import resident_bytes
from streamcnn.execution.interpreter import TileRun
from streamcnn.runtime import smaller_plans
from streamcnn.runtime.plan_cache import PlanCache

MB = 10**6
SHAPE = (1, 3, 900, 800)
PLAIN_BYTES = 3 * 16 * SHAPE[2] * SHAPE[3] * 4
"""The first three maps, which plain PyTorch makes."""
BUDGET = 56 * MB
TOO_SMALL = 2 * MB
"""Half of one tile of a 16-channel map, which is always a block of its own."""

LARGE_SHAPE = (1, 3, 1800, 1600)
LARGE_BUDGET = 100 * MB

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the ceiling needs Linux")


def make_net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1, bias=False),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.Conv2d(16, 16, 3, stride=2),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(16, 3),
    )


def soft_limit() -> int:
    import resource

    return resource.getrlimit(resource.RLIMIT_DATA)[0]


def states_of(model: nn.Module) -> dict[str, Tensor]:
    gradients = {f"gradient of {name}": p.grad for name, p in model.named_parameters() if p.grad is not None}
    found = {**model.state_dict(), **gradients, "random state": torch.get_rng_state()}
    return {name: value.clone() for name, value in found.items()}


def identical(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def within(model: StreamingModel, image: Tensor) -> dict[str, Any]:
    """All that a budget which fits promises."""
    limits = [soft_limit()]
    output = model(image)
    limits.append(soft_limit())
    # Between the passes the process may take what it likes.
    between = torch.ones(2 * BUDGET // 4)
    del between
    output.sum().backward()
    limits.append(soft_limit())
    assert model.last_report is not None
    training = model.last_report
    with torch.no_grad():
        model(image)
    limits.append(soft_limit())
    plan = model.plan(SHAPE)
    return {
        "limits": limits,
        "measured": [training.measured_bytes, model.last_report.measured_bytes],
        "reading": training.reading,
        "projected": plan.projected_bytes,
        "homes": sorted({store.tier.value for store in plan.stores.values()}),
        "digest": plan.digest,
    }


def limit_inside(model: StreamingModel, image: Tensor) -> list[int]:
    """The limit while a tile is computed, and after an error there."""
    seen = []
    original = TileRun.evaluate_operator

    def stop(*args: Any) -> Tensor:
        seen.append(soft_limit())
        raise KeyError("stop")

    loss = model(image).sum()
    TileRun.evaluate_operator = stop
    for action in (loss.backward, lambda: model(image)):
        try:
            action()
        except KeyError:
            seen.append(soft_limit())
    TileRun.evaluate_operator = original
    return seen


def refused(model: StreamingModel, image: Tensor) -> list[Any]:
    """What a plan does that promises too much: in forward, and in backward alone."""
    results = []
    planned = PlanCache.plan
    smaller_plans.SMALLEST_TILE = 256  # so that there are no smaller tiles

    def optimistic(*args: Any) -> Any:
        found = planned(*args)
        plan = dataclasses.replace(found.plan, budget=TOO_SMALL, terms=())
        return dataclasses.replace(found, plan=plan)

    for fails_forward in (True, False):
        before = states_of(model)
        PlanCache.plan = optimistic
        try:
            if fails_forward:
                model(image)
            else:
                PlanCache.plan = planned
                output = model(image)
                before = states_of(model)
                node = output.grad_fn
                current = node.run.current
                current.plan = dataclasses.replace(current.plan, budget=TOO_SMALL)
                output.sum().backward()
        except BudgetExceeded as error:
            results.append([str(error), identical(before, states_of(model)), soft_limit()])
        finally:
            PlanCache.plan = planned
    smaller_plans.SMALLEST_TILE = 32
    return results


def retried(model: StreamingModel, image: Tensor, fails_forward: bool) -> dict[str, Any]:
    """A plan that promises too much, refused by the kernel; then smaller tiles."""
    planned = PlanCache.plan
    budget = TOO_SMALL

    def optimistic(*args: Any) -> Any:
        found = planned(*args)
        # Only at first: what is planned after a refusal is to be right.
        PlanCache.plan = planned
        return dataclasses.replace(found, plan=dataclasses.replace(found.plan, budget=budget, terms=()))

    model.zero_grad()
    if fails_forward:
        PlanCache.plan = optimistic
    output = model(image)
    PlanCache.plan = planned
    if not fails_forward:
        run = output.grad_fn.run.current
        run.plan = dataclasses.replace(run.plan, budget=budget)
    output.sum().backward()
    assert model.last_report is not None
    return {
        "retries": model.last_report.num_retries,
        "measured": model.last_report.measured_bytes,
        "gradients": {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None},
        "buffers": {name: buffer.clone() for name, buffer in model.named_buffers()},
    }


def distance(first: dict[str, Tensor], second: dict[str, Tensor]) -> float:
    """The largest difference, as a share of the largest value: a bias before batch norm is rounding alone."""
    assert first.keys() == second.keys()
    largest = max(float(value.abs().max()) for value in second.values())
    return max(float((first[name] - second[name]).abs().max()) for name in first) / largest


def with_free_heap() -> dict[str, Any]:
    """An update in a process whose heap holds more free than the budget."""
    torch.set_num_threads(1)
    # Code of libraries that runs for the first time is resident then, 6 to 20 MB more or less by chance.
    StreamingModel(make_net(), BUDGET)(torch.randn(SHAPE)).sum().backward()
    set_mmap_threshold()
    blocks = [bytearray(100_000) for _ in range(2 * BUDGET // 100_000)]
    # The last one stays, and keeps the heap from shrinking.
    del blocks[:-1]
    free = free_heap_bytes()
    model = StreamingModel(make_net(), BUDGET)
    model(torch.randn(SHAPE)).sum().backward()
    assert model.last_report is not None
    return {
        "free": free,
        "retries": model.last_report.num_retries,
        "measured": model.last_report.measured_bytes,
        "alive": len(blocks),
    }


def marks() -> list[int]:
    """What the user reads of the process's own peak: ``ru_maxrss`` and ``VmHWM``, in KiB."""
    import resource

    with open("/proc/self/status") as lines:
        mark = next(int(line.split()[1]) for line in lines if line.startswith("VmHWM:"))
    return [resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, mark]


def peak_of_an_update(held_before: int) -> dict[str, Any]:
    """The report of an update in a process that has held so many bytes more; 0 if it still does."""
    torch.set_num_threads(1)
    # Of some 40 MB, so that no tensor that comes and goes between two samples is a large part of it.
    image = torch.randn(LARGE_SHAPE)
    model = StreamingModel(make_net(), LARGE_BUDGET)
    # Capturing, planning and measuring the machine take memory of their own, and more than the update.
    model(image).sum().backward()
    # Kept blocks are resident already: an update that takes them again raises no mark.
    model.release()
    known = resident_bytes()
    assert known is not None
    large = torch.ones((held_before or known[1] - known[0]) // 4)
    if held_before:
        del large
    before = marks()
    model(image).sum().backward()
    report = model.last_report
    assert report is not None
    return {
        "marks": [before, marks()],
        "measured": report.measured_bytes,
        "reading": report.reading,
        "samples": [nbytes for _, nbytes in report.samples],
        "alive": 0 if held_before else len(large),
    }


def after_a_large_block() -> dict[str, Any]:
    return peak_of_an_update(400 * MB)


def without_one() -> dict[str, Any]:
    return peak_of_an_update(0)


def channels_last() -> dict[str, Any]:
    """Two updates of a model in this layout; the second compiles nothing."""
    torch.set_num_threads(1)
    model = StreamingModel(make_net().to(memory_format=torch.channels_last), LARGE_BUDGET)
    image = torch.randn(LARGE_SHAPE).to(memory_format=torch.channels_last)
    reports = []
    for _ in range(2):
        model(image).sum().backward()
        reports.append(model.last_report)
    return {
        "projected": model.plan(LARGE_SHAPE).projected_bytes,
        "measured": [report.measured_bytes for report in reports if report is not None],
        "retries": [report.num_retries for report in reports if report is not None],
    }


def cases() -> dict[str, Any]:
    torch.set_num_threads(1)
    image = torch.randn(SHAPE, generator=torch.Generator().manual_seed(0))
    with tempfile.TemporaryDirectory() as folder:
        model = StreamingModel(make_net(), BUDGET, spill=folder)
        at_first = states_of(model)
        results: dict[str, Any] = {"within": within(model, image)}
        gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
        results["inside"] = limit_inside(model, image)
        # With a tile of its own, a refused pass is begun again with half of that.
        model.tile = (256, 256)
        results["refused"] = refused(model, image)
        results["left"] = os.listdir(folder)
        model.load_state_dict({name: at_first[name] for name in model.state_dict()})
        model.zero_grad()
        model.tile = None
        model(image).sum().backward()
        model.tile = (256, 256)
        again = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
        results["retried"] = []
        for fails_forward in (True, False):
            model.load_state_dict({name: at_first[name] for name in model.state_dict()})
            found = retried(model, image, fails_forward)
            distances = [distance(found.pop("gradients"), again), distance(found.pop("buffers"), buffers)]
            results["retried"].append({**found, "distances": distances, "limit": soft_limit()})
    return {**results, "works after it": identical(gradients, again)}


def in_fresh_process(case: str) -> Any:
    """What the function ``case`` returns there."""
    run = subprocess.run(
        [sys.executable, "-W", "error", __file__, case],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])},
    )
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout)


@pytest.fixture(scope="module")
def results() -> Any:
    return in_fresh_process("cases")


def test_a_budget_that_fits_is_kept(results: Any) -> None:
    within = results["within"]
    assert BUDGET < PLAIN_BYTES
    assert within["projected"] <= BUDGET
    # Between the directions the process held more, so the mark cannot tell of the backward pass.
    assert within["reading"] == "VmRSS, sampled"
    assert all(0 < measured <= BUDGET for measured in within["measured"]), within["measured"]
    assert "disk" in within["homes"]
    assert results["left"] == []


def test_nothing_is_enforced_outside_of_a_pass(results: Any) -> None:
    (limit,) = set(results["within"]["limits"])
    in_backward, after_backward, in_forward, after_forward = results["inside"]
    assert after_backward == after_forward == limit
    assert in_backward != limit
    assert in_forward != limit


def test_an_allocation_that_the_kernel_refuses_changes_nothing(results: Any) -> None:
    (limit,) = set(results["within"]["limits"])
    assert len(results["refused"]) == 2
    for direction, (text, unchanged, after) in zip(("forward", "backward"), results["refused"], strict=True):
        assert f"an allocation in the {direction} pass was refused: budget 1.91 MiB" in text
        assert unchanged
        assert after == limit
    assert results["works after it"]


def test_a_refused_pass_is_begun_again_with_smaller_tiles(results: Any) -> None:
    (limit,) = set(results["within"]["limits"])
    assert len(results["retried"]) == 2
    for found in results["retried"]:
        assert found["retries"] >= 1
        assert max(found["distances"]) < 1e-4
        assert 0 < found["measured"] <= BUDGET
        assert found["limit"] == limit


def test_a_heap_that_holds_more_free_than_the_budget_is_no_obstacle() -> None:
    found = in_fresh_process("with_free_heap")
    assert found["free"] > 1.9 * BUDGET
    assert found["retries"] == 0
    assert 0 < found["measured"] <= BUDGET


def test_the_projection_of_a_channels_last_model_is_an_upper_bound() -> None:
    found = in_fresh_process("channels_last")
    assert found["retries"] == [0, 0]
    assert found["projected"] <= LARGE_BUDGET
    assert all(0 < measured <= found["projected"] for measured in found["measured"])


def test_a_pass_leaves_the_processs_own_peak_to_the_user() -> None:
    # An update where the kernel's mark is exact.
    fresh = in_fresh_process("without_one")
    before, after = fresh["marks"]
    # ru_maxrss of a process that was started by a large one begins with that one's.
    assert after[0] >= before[0]
    assert after[1] > before[1]
    assert fresh["reading"] == "VmHWM"
    assert fresh["samples"] == []
    sampled: list[int] = []
    # Where the machine is busy, the thread that samples may have no turn at the peak.
    while len(sampled) < 5 and max(sampled, default=0) < 0.85 * fresh["measured"]:
        used = in_fresh_process("after_a_large_block")
        before, after = used["marks"]
        assert before == after
        assert used["reading"] == "VmRSS, sampled"
        assert max(used["samples"]) == used["measured"] <= 1.05 * fresh["measured"]
        sampled.append(used["measured"])
    assert max(sampled) >= 0.85 * fresh["measured"], sampled


def test_another_process_makes_the_same_plan(results: Any) -> None:
    assert StreamingModel(make_net(), BUDGET).plan(SHAPE).digest == results["within"]["digest"]


if __name__ == "__main__":
    CASES = (cases, channels_last, with_free_heap, after_a_large_block, without_one)
    print(json.dumps({case.__name__: case for case in CASES}[sys.argv[1]]()))
