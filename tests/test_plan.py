"""The plan: frozen data that can be read, compared and refused."""

from __future__ import annotations

import dataclasses
import functools
import json
from typing import Any

import pytest
import torch
from torch import nn

from streamcnn import PlanDoesNotFit, StreamingModel
from streamcnn.geometry.regions import Interval, Region
from streamcnn.plan.plan import Phase, Plan, Segment
from streamcnn.plan.storage import MemoryTerm, StorePlan, Tier
from streamcnn.plan.tiles import AxisStep

SHAPE = (2, 3, 61, 47)
KIB = 2**10


def make_net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.Conv2d(4, 5, 3, stride=2),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(5, 3),
    )


@functools.cache
def some_plan() -> Plan:
    """A plan whose fields are of no matter."""
    return StreamingModel(make_net(), tile=40).plan(SHAPE)


def make_phase(level: int, **changes: Any) -> Phase:
    steps = tuple(
        AxisStep(
            own={"conv": Interval(start, start + 4)},
            needed={"x": Interval(max(start - 1, 0), start + 5)},
            shape=number,
            kind=number,
        )
        for number, start in enumerate((0, 4))
    )
    fields: dict[str, Any] = {
        "level": level,
        "nodes": ("conv",),
        "inputs": ("x",),
        "stored": ("conv",),
        "reductions": ("norm",),
        "rows": steps,
        "cols": steps[:1],
        "releases": {"conv": ("conv",)},
        "consumed": frozenset(),
        "in_place": frozenset(),
        "skipped": ("conv",),
        "differentiated": True,
        "halo": (2, 1),
    }
    return dataclasses.replace(some_plan().phases[0], **{**fields, **changes})


def make_plan(**changes: Any) -> Plan:
    fields: dict[str, Any] = {
        "image_shape": (1, 3, 8, 4),
        "dtype": "float32",
        "training": True,
        "tile": (4, 4),
        "phases": (make_phase(1), make_phase(2, nodes=("relu",), stored=(), reductions=(), halo=(0, 0))),
        "segments": (Segment(1, ("norm",)),),
        "stores": {
            "conv": StorePlan(Tier.MEMORY, Tier.DISK, 300 * KIB, kept=True, last_reader=2, tile=(4, 4)),
            "skip": StorePlan(Tier.DISK, Tier.DISK, 200 * KIB, kept=False, last_reader=2, tile=(4, 4)),
        },
        "levels": {"conv": 1, "norm": 1, "skip": 1, "relu": 2},
        "differentiated": frozenset({"conv"}),
        "budget": 1024 * KIB,
        "terms": (
            MemoryTerm("stored maps", 300 * KIB),
            MemoryTerm("nothing of this", 0),
            MemoryTerm("live activations", 100 * KIB),
            MemoryTerm("workspace", 50 * KIB),
            MemoryTerm("waste", 12 * KIB),
        ),
        "worst": "phase 2, backward",
        "worst_operator": "relu (net.1 (ReLU))",
        "plain_bytes": 2048 * KIB,
        "projected_seconds": 3.0,
        "plain_seconds": 2.0,
        "recomputation": 1.25,
        "num_resident": 3,
        "residents": ("aten.foo: it has no rule (body.3 (Foo))", "aten.foo: it has no rule (body.3 (Foo))"),
    }
    return dataclasses.replace(some_plan(), **{**fields, **changes})


def test_a_plan_is_frozen() -> None:
    plan = make_plan()
    for item, field in ((plan, "tile"), (plan.phases[0], "nodes"), (plan.terms[0], "nbytes")):
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(item, field, None)


def test_regions_of_a_tile() -> None:
    phase = make_phase(1)
    assert phase.num_tiles == 2
    assert phase.own(1, 0, "conv") == Region(Interval(4, 8), Interval(0, 4))
    assert phase.needed(1, 0, "x") == Region(Interval(3, 9), Interval(0, 5))


def test_explain() -> None:
    assert make_plan().explain() == (
        "image 1x3x8x4 float32, training, budget 1.00 MiB\n"
        "fits in 1.00 MiB with tiles of 4x4 pixels, up to 300 KiB of checkpoints and their gradients "
        "on disk\n"
        "projected peak 462 KiB, in phase 2, backward, at relu (net.1 (ReLU))\n"
        "  stored maps                              300 KiB\n"
        "  live activations                         100 KiB\n"
        "  workspace                               50.0 KiB\n"
        "  waste                                   12.0 KiB\n"
        "projected time 3.00 s, 1.50 of the whole image at once; arithmetic 1.25 of it\n"
        "plain PyTorch would need 2.00 MiB\n"
        "2 phases, 1 stored map in memory (300 KiB), 1 stored map on disk (200 KiB)\n"
        "  phase  tiles  pixels  halo  reduces  stores\n"
        "  1      2x1    4x4     2x1   1        conv (300 KiB in memory)\n"
        "  2      2x1    4x4     0x0   0        nothing\n"
        "then 3 operators on whole maps (the resident tail)\n"
        "resident: aten.foo: it has no rule (body.3 (Foo))"
    )
    dropped = dataclasses.replace(make_plan().stores["conv"], kept=False, rematerialised=2)
    again = make_plan(
        stores={**make_plan().stores, "conv": dropped}, rematerialised={2: (make_phase(1, reductions=()),)}
    )
    assert again.explain().splitlines()[11:14] == [
        "  1      2x1    4x4     2x1   1        conv (300 KiB in memory, dropped)",
        "  2      2x1    4x4     0x0   0        nothing",
        "dropped between the passes and computed again: 300 KiB, in 1 phase",
    ]
    bare = make_plan(budget=None, training=False, stores={}, phases=(), num_resident=0, residents=())
    assert bare.explain().splitlines()[0] == "image 1x3x8x4 float32, inference, no ceiling"
    assert bare.explain().splitlines()[-1] == "0 phases, no stored maps"
    assert make_plan(budget=KIB).explain().splitlines()[1] == (
        "does not fit: the smallest plan needs 461 KiB more, in phase 2, backward, at relu (net.1 (ReLU))"
    )


def test_explain_of_a_network() -> None:
    model = StreamingModel(make_net(), tile=(32, 24))
    model.resident_tail = False
    # The bytes and seconds are the models'; here are the words.
    plan = dataclasses.replace(
        model.plan(SHAPE),
        terms=(MemoryTerm("stored maps", 3 * KIB),),
        worst="phase 1, forward",
        worst_operator="conv2d_1 (3 (Conv2d))",
        plain_bytes=6 * KIB,
        projected_seconds=2.0,
        plain_seconds=1.0,
        recomputation=1.5,
    )
    assert plan.explain() == (
        "image 2x3x61x47 float32, training, no ceiling\n"
        "runs with tiles of 32x24 pixels\n"
        "projected peak 3.00 KiB, in phase 1, forward, at conv2d_1 (3 (Conv2d))\n"
        "  stored maps                             3.00 KiB\n"
        "projected time 2.00 s, 2.00 of the whole image at once; arithmetic 1.50 of it\n"
        "plain PyTorch would need 6.00 KiB\n"
        "2 phases, 1 stored map in memory (89.6 KiB)\n"
        "  phase  tiles  pixels  halo  reduces  stores\n"
        "  1      2x2    31x24   1x1   1        conv2d (89.6 KiB in memory)\n"
        "  2      2x2    31x24   0x1   1        nothing"
    )


def test_json_has_the_projected_bytes_term_by_term() -> None:
    plan = make_plan()
    found = json.loads(plan.to_json())
    assert found["projected_bytes"] == plan.projected_bytes == sum(found["terms"].values()) == 462 * KIB
    assert found["stores"]["conv"]["tier"] == "memory"
    assert found["phases"][0]["tiles"] == [2, 1]
    assert found["image_shape"] == [1, 3, 8, 4]
    assert found["residents"] == list(plan.residents)


def test_a_plan_that_does_not_fit_is_refused_when_it_is_run() -> None:
    make_plan().validate()
    make_plan(budget=None).validate()
    make_plan(budget=462 * KIB).validate()
    plan = make_plan(budget=462 * KIB - 1)
    assert not plan.fits
    with pytest.raises(PlanDoesNotFit) as caught:
        plan.validate()
    assert str(caught.value) == (
        "no plan for an image of shape (1, 3, 8, 4) fits in 462 KiB: the smallest needs 1 byte more, in "
        "phase 2, backward, at relu (net.1 (ReLU)), with tiles of 4x4 pixels (largest terms: stored maps 300 "
        "KiB, live activations 100 KiB, workspace 50.0 KiB). Raise budget= to at least 473088 bytes "
        "(462 KiB), leave tile= to the planner, or use a smaller batch, a narrower model or fewer resident "
        "operators."
    )


def test_equal_requests_have_equal_plans() -> None:
    first, second = (StreamingModel(make_net(), "1GB", tile=16).plan(SHAPE) for _ in range(2))
    assert first == second
    assert first.digest == second.digest
    others = [
        StreamingModel(make_net(), "1GB", tile=24).plan(SHAPE),
        StreamingModel(make_net(), "2GB", tile=16).plan(SHAPE),
        StreamingModel(make_net().eval(), "1GB", tile=16).plan(SHAPE),
        StreamingModel(make_net(), "1GB", tile=16).plan((1, *SHAPE[1:])),
        StreamingModel(make_net().double(), "1GB", tile=16).plan(SHAPE),
    ]
    assert len({plan.digest for plan in (first, *others)}) == 6


def test_a_plan_is_made_once_for_each_mode() -> None:
    model = StreamingModel(make_net(), tile=16)
    training = model.plan(SHAPE)
    assert model.plan(SHAPE) is training
    with torch.no_grad():
        inference = model.plan(SHAPE)
    assert (training.training, inference.training) == (True, False)
    assert training.differentiated
    assert not inference.differentiated
    assert not any(phase.differentiated for phase in inference.phases)
    assert not any(store.kept for store in inference.stores.values())
    assert inference.projected_bytes < training.projected_bytes
    assert model.eval().plan(SHAPE) is not training
    assert model.train().plan(SHAPE) is training
    assert model.plan(SHAPE, torch.float32) is training


def test_the_terms_of_a_network_sum_to_the_projected_bytes() -> None:
    plan = StreamingModel(make_net(), "1GB", tile=16).plan(SHAPE)
    assert plan.projected_bytes == sum(term.nbytes for term in plan.terms)
    assert json.loads(plan.to_json())["terms"] == {term.name: term.nbytes for term in plan.terms}
    assert plan.plain_bytes > 2 * 4 * 61 * 47 * 4
