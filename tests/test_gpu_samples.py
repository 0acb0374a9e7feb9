"""On a CUDA device: every family's own samples of operators, streamed and plain."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
from gpu_cases import GPU

from streamcnn import verify
from streamcnn.graph.ops import samples
from streamcnn.graph.ops.rules import Sample
from streamcnn.graph.program import Program
from streamcnn.plan.plan import Plan
from streamcnn.plan.storage import Tier
from streamcnn.runtime import plan_cache

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.usefixtures("gpu_left_clean"),
    # Plain PyTorch says that it copies its input; streaming does not.
    pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel:UserWarning"),
]


@pytest.fixture(params=["on the device", "away"])
def place(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> str:
    """Where maps are stored: as planned, or in host memory with copies while others are computed."""
    if request.param == "away":
        original = plan_cache.make_plan

        def away(*args: Any) -> tuple[Program, Plan, str | None]:
            program, plan, tail = original(*args)
            stores = {
                name: dataclasses.replace(store, tier=Tier.HOST, gradient_tier=Tier.HOST)
                for name, store in plan.stores.items()
            }
            parts = {(d, phase.level) for phase in plan.phases for d in ("forward", "backward")}
            return program, dataclasses.replace(plan, stores=stores, overlapped=frozenset(parts)), tail

        monkeypatch.setattr(plan_cache, "make_plan", away)
    return str(request.param)


@pytest.mark.parametrize("sample", samples(), ids=lambda sample: sample.name)
def test_sample(place: str, sample: Sample) -> None:
    net = sample.build().train(sample.train).to(GPU)
    found = verify(net, sample.shape, tile=(16, 13))
    assert found.max_error < 1e-7, found.explain()
