"""Plans for this machine and for others, each made once."""

from __future__ import annotations

import dataclasses
import itertools
import json
from collections.abc import Collection
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from streamcnn import StreamingModel, cli
from streamcnn.graph.program import TensorSpec
from streamcnn.plan.plan import PassPart
from streamcnn.plan.storage import MemoryTerm, Tier
from streamcnn.planning.backends.base import Fragmentation
from streamcnn.planning.memory_model import PeakPoint
from streamcnn.planning.overlapping import Crossing, OnTheWay, PhaseEnds, on_the_way
from streamcnn.planning.spec import OffloadTier
from streamcnn.runtime import plan_cache
from streamcnn.runtime.machines import CONTEXT_BYTES, cuda_card, this_machine

SHAPE = (1, 3, 4000, 4000)
MODEL = "resnet18"


def make_net() -> nn.Sequential:
    torch.manual_seed(0)
    layers = [nn.Conv2d(64 if i else 3, 64, 3, padding=1) for i in range(5)]
    return nn.Sequential(*(m for c in layers for m in (c, nn.BatchNorm2d(64))), nn.AdaptiveAvgPool2d(1))


def test_a_card_that_is_not_here() -> None:
    net = make_net()
    machine = cuda_card(net, host_bytes=4 * 10**9, optimizer_copies=2)
    weights = sum(p.nbytes for p in net.parameters())
    assert machine.reserved == CONTEXT_BYTES + 3 * weights + sum(b.nbytes for b in net.buffers())
    # Were it as fast as a card is, all maps would be computed again.
    slow = dataclasses.replace(machine.hardware, dense_flops=1e11)
    plan = StreamingModel(net, "6GB").plan_for(dataclasses.replace(machine, hardware=slow), SHAPE)
    assert plan.fits
    assert plan.terms[0].name == "reserved (context, libraries, weights, optimiser)"
    assert plan.terms[0].nbytes == machine.reserved
    # Twenty gigabytes of maps: the host takes what it has room for.
    assert plan.bytes_on(Tier.HOST) <= 4 * 10**9
    assert plan.bytes_on(Tier.DISK) > 0
    lines = plan.explain().splitlines()
    assert lines[1].startswith("fits in 5.59 GiB with tiles of ")
    assert lines[1].endswith(" on disk")


@pytest.mark.parametrize("budget", ["900GB", "40GB"])
def test_no_tile_is_larger_than_kernels_are_made_for(budget: str) -> None:
    """Where a card has room for more, too: maps of 2**32 elements are cut, and are no part of the tail."""
    shape = (1, 3, 8192, 8192)
    net = make_net()
    model, machine = StreamingModel(net, budget), cuda_card(net, host_bytes=10**12, optimizer_copies=2)
    planned = model.planned(shape, torch.float32, image_gradient=False, machine=machine)
    assert planned.plan.fits
    nodes, most = planned.program.nodes, machine.backend.most_elements
    assert most == 2**31 - 1
    for phase in planned.plan.phases:
        for row, col, name in itertools.product(range(len(phase.rows)), range(len(phase.cols)), phase.nodes):
            height, width = phase.needed(row, col, name).size
            assert nodes[name].tensor.shape[1] * height * width <= most
    computed = (nodes[name] for segment in planned.plan.segments for name in segment.nodes)
    assert all(node.tensor.numel <= most for node in computed if isinstance(node.spec, TensorSpec))
    # Of that size only one that is asked for.
    asked = dataclasses.replace(machine, backend=dataclasses.replace(machine.backend, most_elements=1))
    plan = StreamingModel(make_net(), "900GB", tile=4096).plan_for(asked, shape)
    assert {phase.num_tiles for phase in plan.phases} == {4}


def test_tiles_are_moved_beside_others_where_there_is_memory_for_it() -> None:
    net = make_net()
    machine = cuda_card(net, host_bytes=10**12, optimizer_copies=2)
    # Were it as fast as a card is, all maps would be computed again.
    slow = dataclasses.replace(machine, hardware=dataclasses.replace(machine.hardware, dense_flops=1e11))
    at_once = dataclasses.replace(slow, backend=dataclasses.replace(slow.backend, overlaps=False))
    plan, other = (StreamingModel(net, "4GB").plan_for(each, SHAPE) for each in (slow, at_once))
    assert plan.fits
    assert plan.projected_seconds < other.projected_seconds
    away = {name for name, store in plan.stores.items() if store.tier is not Tier.MEMORY}
    phases = {phase.level: phase for phase in plan.phases}
    assert plan.overlapped
    for direction, level in plan.overlapped:
        phase = phases[level]
        assert direction in ("forward", "backward", "again")
        assert phase.num_tiles > 1
        assert away & {*phase.inputs, *phase.stored}
    counted = len(plan.overlapped)
    again = sum(map(len, plan.rematerialised.values()))
    passes = len(plan.phases) + sum(phase.differentiated for phase in plan.phases) + again
    assert f"{counted} of {passes} runs of a phase move tiles while others are computed" in plan.explain()
    assert len(json.loads(plan.to_json())["overlapped"]) == counted
    for crossing in ("trailing", "leading"):
        assert getattr(plan, crossing)
        assert len(json.loads(plan.to_json())[crossing]) == len(getattr(plan, crossing))
        assert not getattr(other, crossing)
    assert not other.overlapped
    assert not {"overlapped", "trailing", "leading"} & json.loads(other.to_json()).keys()


def test_a_map_that_a_card_has_room_for_stays_there() -> None:
    """Moving it would be hidden behind the computation, but gain nothing."""
    net = nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.MaxPool2d(3, 2, 1),
        nn.Conv2d(4, 6, 3, stride=2),
        nn.BatchNorm2d(6),
        nn.SiLU(),
        nn.AdaptiveAvgPool2d(1),
    )
    model = StreamingModel(net, tile=32)
    model.resident_tail = False
    plan = model.plan_for(cuda_card(net, host_bytes=10**12, optimizer_copies=0), (2, 3, 75, 61))
    assert plan.stores
    assert {tier for store in plan.stores.values() for tier in (store.tier, store.gradient_tier)} == {
        Tier.MEMORY
    }
    assert not plan.overlapped


def test_what_a_tile_gives_before_its_end_is_on_the_way_twice() -> None:
    stage = SimpleNamespace(inputs=(), stored=("early", "last"), nodes=("early", "between", "last"))
    tiled: Any = SimpleNamespace(num_tiles=2, stage=stage, largest_nbytes=lambda name: 10)
    moved = on_the_way(tiled)
    # The tile's own, still being taken away while the rest of it is computed, and that of the tile before it.
    assert moved["early"] == OnTheWay(forward=20, backward=10, gradient=10)
    # The step counts the one that it ends with.
    assert moved["last"] == OnTheWay(forward=10, backward=10, gradient=10)


def _point(part: PassPart, nbytes: int) -> PeakPoint:
    return PeakPoint("", part, "", (MemoryTerm("all", nbytes),), 0)


def test_tiles_cross_the_end_of_a_phase_where_all_that_runs_meanwhile_has_room() -> None:
    card = cuda_card(make_net(), host_bytes=10**12, optimizer_copies=0)
    # It wastes nothing.
    backend = dataclasses.replace(card.backend, returning=Fragmentation())
    forward, backward = ["forward", "segment forward"], ["segment backward", "again", "backward"]
    parts = [*itertools.product(forward, [1]), *itertools.product(forward, [2])]
    parts += [*itertools.product(backward, [2]), ("segment backward", 1), ("backward", 1)]
    points = [_point(part, 100) for part in parts]
    sent: dict[PassPart, int] = {("forward", 1): 10, ("forward", 2): 7, ("again", 2): 5, ("backward", 2): 20}

    def found(room: int | None, overlapped: Collection[PassPart] = ()) -> Crossing:
        return PhaseEnds(overlapped, backend, room).trailing(points, sent)

    everywhere = found(None)
    assert everywhere.parts == sent.keys()
    assert everywhere.beside == {
        ("segment forward", 1): 10,
        ("forward", 2): 10,
        ("segment forward", 2): 7,
        ("backward", 2): 5,
        ("segment backward", 1): 20,
        ("backward", 1): 20,
    }
    assert found(120).parts == {("forward", 1), ("forward", 2), ("again", 2)}
    assert found(110).parts == {("forward", 2), ("again", 2)}
    # A phase that overlaps has room for what a tile of its own sends, but the segment before it has not.
    beside = found(None, {("forward", 2), ("backward", 2)}).beside
    assert (beside["segment forward", 1], beside["forward", 2]) == (10, 3)
    assert ("backward", 2) not in beside
    # What the next phase's first tile reads has room, but for what a tile of the phase itself reads.
    ahead = PhaseEnds({("again", 2)}, backend, None).leading(points, sent)
    assert ahead.parts == {("forward", 1), ("again", 2)}
    assert ahead.beside == {("forward", 1): 7, ("segment forward", 1): 7, ("again", 2): 15}
    assert PhaseEnds((), backend, 110).leading(points, sent).parts == {("forward", 1)}


def test_a_gradient_map_stays_in_memory_where_that_is_faster() -> None:
    net = make_net()
    machine = cuda_card(net, host_bytes=10**12, optimizer_copies=2)
    slow = dataclasses.replace(machine, hardware=dataclasses.replace(machine.hardware, dense_flops=1e11))
    plan = StreamingModel(net, "6GB").plan_for(slow, SHAPE)
    tiers = {(store.tier, store.gradient_tier) for store in plan.stores.values()}
    assert (Tier.HOST, Tier.MEMORY) in tiers
    assert (Tier.MEMORY, Tier.HOST) not in tiers


def test_the_smallest_budget_named_counts_what_the_card_holds() -> None:
    net = make_net()
    machine = cuda_card(net, host_bytes=10**12, optimizer_copies=2)
    refused = StreamingModel(net, 10**6).plan_for(machine, SHAPE)
    assert not refused.fits
    enough = StreamingModel(net, refused.projected_bytes).plan_for(machine, SHAPE)
    assert enough.fits
    assert enough.projected_bytes <= refused.projected_bytes


@pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")
def test_the_command_plans_for_a_card(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--size", "8000", "--budget", "4GB", "--card", "--host-memory", "8GB", "--json"]
    monkeypatch.setattr("sys.argv", ["streamcnn", "plan", MODEL, *options])
    with pytest.raises(SystemExit) as caught:
        cli.main()
    assert caught.value.code == 0
    found = json.loads(capsys.readouterr().out)
    assert found["projected_bytes"] <= 4 * 10**9
    assert found["terms"]["reserved (context, libraries, weights, optimiser)"] > CONTEXT_BYTES
    assert {store["tier"] for store in found["stores"].values()} & {"host", "disk"}
    assert found["projected_seconds"] > 0
    assert found["recomputation"] >= 1


def test_a_plan_is_made_once_for_each_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    made = []
    original = plan_cache.make_plan
    monkeypatch.setattr(plan_cache, "make_plan", lambda *args: made.append(1) or original(*args))
    model = StreamingModel(nn.Sequential(nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1)), "1GB")
    here = this_machine(torch.device("cpu"))
    shape = (1, 3, 100, 90)
    first = model.plan_for(here, shape)
    assert model.plan_for(here, shape) is first
    assert model.plan(shape) is first
    assert len(made) == 1
    # A plan depends on all that is known of the machine.
    hardware = here.hardware
    others = [
        dataclasses.replace(here, reserved=10**6),
        dataclasses.replace(here, offload_tiers=(OffloadTier(Tier.DISK, 10**6),)),
        dataclasses.replace(here, hardware=dataclasses.replace(hardware, source="x")),
        dataclasses.replace(here, hardware=dataclasses.replace(hardware, dense_flops=1.0)),
        dataclasses.replace(
            here, hardware=dataclasses.replace(hardware, read_bytes={**hardware.read_bytes, Tier.DISK: 1.0})
        ),
    ]
    for other in others:
        assert model.plan_for(other, shape) is not first
    assert len(made) == 1 + len(others)
    assert model.plan_for(dataclasses.replace(here), shape) is first


def test_many_sizes_of_images_keep_their_plans(monkeypatch: pytest.MonkeyPatch) -> None:
    model = StreamingModel(nn.Sequential(nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1)), "1GB")
    shapes = [(1, 3, 100 + index, 90) for index in range(12)]
    plans = [model.plan(shape) for shape in shapes]
    assert [model.plan(shape) for shape in shapes] == plans
    made = []
    original = plan_cache.make_plan
    monkeypatch.setattr(plan_cache, "make_plan", lambda *args: made.append(1) or original(*args))
    assert all(model.plan(shape) is plan for shape, plan in zip(shapes, plans, strict=True))
    assert made == []
