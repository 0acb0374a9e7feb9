"""Passes of a model whose memory is on a made-up card."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from fake_cuda import CONTEXT, FakeCuda
from fake_nvml import Device, FakeNvml, NVMLError_NotSupported
from made_up_card import BUDGET, CAP, GB, GPU, MB, make_card, sampling_threads
from tile_operators import Evaluate, around_operators
from torch import Tensor, nn

from streamcnn import BudgetExceeded, PlanDoesNotFit, StreamingModel
from streamcnn.ceiling.cuda import MARGIN_BYTES, CudaCeiling, CudaLimit
from streamcnn.ceiling.gauge import Gauge
from streamcnn.ceiling.nvml import Nvml
from streamcnn.ceiling.sampler import INTERVAL
from streamcnn.runtime import machines, passes, smaller_plans, streamed_pass

SHAPE = (1, 3, 300, 280)


@pytest.fixture(autouse=True)
def _no_thread_is_left() -> Any:
    yield
    assert sampling_threads() == []


def make_net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Dropout(0.2),
        nn.Conv2d(8, 8, 3, stride=2),
        nn.BatchNorm2d(8),
        nn.AdaptiveAvgPool2d(1),
    ).double()


class OnCard:
    """Has a model's operators take memory of a made-up card while they run, a multiple of their tile's."""

    def __init__(
        self,
        monkeypatch: pytest.MonkeyPatch,
        fake: FakeCuda,
        gauge: Gauge,
        factor: int,
        *,
        interval: float = INTERVAL,
    ) -> None:
        """``interval`` is the seconds between samples of the card."""
        self.fake = fake
        self.factor = factor
        self.leak = 0
        self.calls = 0

        def evaluated(evaluate: Evaluate) -> Tensor:
            self.calls += 1
            value = evaluate()
            nbytes = value.nbytes * self.factor
            fake.allocate(nbytes)
            fake.free(nbytes)
            fake.grow(self.leak)
            return value

        around_operators(monkeypatch, evaluated)
        monkeypatch.setattr(
            streamed_pass, "ceiling_for", lambda device, *, counted: CudaCeiling(gauge, interval=interval)
        )
        monkeypatch.setattr(machines, "reserved_bytes", lambda device: CudaCeiling(gauge).reserved_bytes())
        monkeypatch.setattr(passes, "room_for", lambda device: CudaCeiling(gauge).room)


def update(model: StreamingModel) -> dict[str, Tensor]:
    torch.manual_seed(3)
    output = model(torch.randn(SHAPE, dtype=torch.float64))
    output.square().sum().backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {"output": output.detach(), **gradients, **dict(model.named_buffers())}


def test_a_pass_reports_the_whole_process(monkeypatch: pytest.MonkeyPatch) -> None:
    fake, gauge = make_card()
    OnCard(monkeypatch, fake, gauge, factor=2)
    model = StreamingModel(make_net(), BUDGET, tile=128)
    update(model)
    report = model.last_report
    assert report is not None
    assert report.measured_bytes == CONTEXT + fake.live + fake.cached
    assert fake.live + fake.cached > 2 * 4 * 128 * 128 * 8
    assert report.reading == "NVML, own process"
    assert "(NVML, own process)" in report.explain()
    assert report.samples
    assert all(0 <= when < 60 for when, _ in report.samples)
    assert report.num_retries == 0
    assert fake.fraction == 1.0
    assert len(fake.fractions) == 4


def test_the_plan_counts_what_the_card_holds_already(monkeypatch: pytest.MonkeyPatch) -> None:
    fake, gauge = make_card()
    bare = StreamingModel(make_net(), BUDGET, tile=128).plan(SHAPE)
    OnCard(monkeypatch, fake, gauge, factor=1)
    model = StreamingModel(make_net(), BUDGET, tile=128)
    reserved = CudaCeiling(gauge).reserved_bytes()
    plan = model.plan(SHAPE)
    assert plan.terms[0].name == "reserved (context, libraries, weights, optimiser)"
    assert plan.terms[0].nbytes == reserved
    assert plan.projected_bytes == bare.projected_bytes + reserved
    assert "  reserved (context, libraries, weights, optimiser) " in plan.explain()
    fake.allocate(500 * MB)
    assert model.plan(SHAPE).projected_bytes >= plan.projected_bytes + 400 * MB


def test_a_budget_that_the_context_leaves_no_room_in_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    fake, gauge = make_card()
    OnCard(monkeypatch, fake, gauge, factor=1)
    budget = CONTEXT + MARGIN_BYTES
    assert StreamingModel(make_net(), budget).plan(SHAPE).fits is False
    with pytest.raises(PlanDoesNotFit, match=r"reserved \(context, libraries, weights, optimiser\) 6"):
        update(StreamingModel(make_net(), budget))
    assert fake.fractions == []
    assert fake.peak == 0


@pytest.mark.parametrize("budget", [None, 70 * GB])
def test_a_plan_is_made_for_what_the_card_has(monkeypatch: pytest.MonkeyPatch, budget: int | None) -> None:
    fake, gauge = make_card()
    OnCard(monkeypatch, fake, gauge, factor=1)
    model = StreamingModel(make_net(), budget)
    wanted = model.plan(SHAPE)
    assert (wanted.budget, wanted.limited_by) == (budget, "")
    reserved = CudaCeiling(gauge).reserved_bytes()
    room = (reserved + 4 * wanted.projected_bytes) // 5
    fake.others = fake.total - room
    smaller = model.plan(SHAPE)
    assert smaller.fits
    assert smaller.projected_bytes <= smaller.budget <= room < wanted.projected_bytes
    assert "since the memory of cuda:0 is 74.5 GiB, of which" in smaller.explain()
    update(model)
    report = model.last_report
    assert report is not None
    assert (report.budget, report.num_retries) == (smaller.budget, 0)
    fake.others = 0
    assert model.plan(SHAPE) == wanted
    fake.others = fake.total - reserved
    with pytest.raises(PlanDoesNotFit, match="budget= does not help: the memory of cuda:0 is"):
        update(model)


def test_the_card_is_asked_for_its_room_once_a_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    fake, gauge = make_card()
    OnCard(monkeypatch, fake, gauge, factor=1)
    asked: list[None] = []
    monkeypatch.setattr(gauge, "within_reach", lambda: (asked.append(None), 80 * GB)[1])
    model = StreamingModel(make_net(), tile=32)
    for num_passes in (1, 2):
        update(model)
        assert len(asked) == num_passes


def test_without_a_budget_refused_memory_leads_to_a_smaller_plan(monkeypatch: pytest.MonkeyPatch) -> None:
    expected = update(StreamingModel(make_net()))
    fake, gauge = make_card()
    on_card = OnCard(monkeypatch, fake, gauge, factor=1)

    def emptied() -> None:
        on_card.leak = fake.cached = fake.others = 0
        fake.grow(CONTEXT - fake.overhead)

    monkeypatch.setattr(fake, "empty_cache", emptied)
    model = StreamingModel(make_net())
    model.resident_tail = False
    # The driver has nothing left at the third operator.
    on_card.leak = fake.total // 2
    found = update(model)
    report = model.last_report
    assert report is not None
    assert (report.budget, report.num_retries, report.num_smaller_plans) == (None, 1, 1)
    wanted = StreamingModel(make_net())
    wanted.resident_tail = False
    # A quarter less beside what is held anyway.
    reserved = CudaCeiling(gauge).reserved_bytes()
    taken = report.projected_bytes - reserved
    assert 0 < taken <= 3 * (wanted.plan(SHAPE).projected_bytes - reserved) // 4
    # Later passes begin with it, whatever an optimiser has taken since.
    fake.allocate(10 * GB)
    assert model.plan(SHAPE).projected_bytes - CudaCeiling(gauge).reserved_bytes() == taken
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-9, atol=1e-9, msg=name)


def test_refused_memory_leads_to_smaller_tiles_and_the_same_result(monkeypatch: pytest.MonkeyPatch) -> None:
    expected = update(StreamingModel(make_net(), tile=128))
    fake, gauge = make_card()
    # A tile of 128 x 128 with 8 channels of float64 is a MB: the cap has room for one of 64 x 64.
    OnCard(monkeypatch, fake, gauge, factor=CAP // (8 * 66 * 66 * 8))
    model = StreamingModel(make_net(), BUDGET, tile=128)
    model.resident_tail = False
    found = update(model)
    assert model.last_report is not None
    assert model.last_report.num_retries >= 1
    assert fake.num_emptied >= 1
    assert (model.last_report.measured_bytes or 0) <= BUDGET
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-9, atol=1e-9, msg=name)
    assert fake.fraction == 1.0


def test_memory_found_at_the_end_leads_to_the_same_result(monkeypatch: pytest.MonkeyPatch) -> None:
    expected = update(StreamingModel(make_net(), tile=128))
    state = torch.get_rng_state()
    fake, gauge = make_card()
    on_card = OnCard(monkeypatch, fake, gauge, factor=1, interval=1000)

    def emptied() -> None:
        on_card.leak, fake.cached = 0, 0
        fake.grow(CONTEXT - fake.overhead)

    monkeypatch.setattr(fake, "empty_cache", emptied)
    on_card.leak = BUDGET
    model = StreamingModel(make_net(), BUDGET, tile=128)
    found = update(model)
    assert model.last_report is not None
    assert model.last_report.num_retries == 1
    # The peak is that of the refused try too, which was found to be above the budget.
    assert (model.last_report.measured_bytes or 0) > BUDGET
    assert torch.equal(torch.get_rng_state(), state)
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-9, atol=1e-9, msg=name)


def test_memory_taken_past_the_cap_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    fake, gauge = make_card()
    on_card = OnCard(monkeypatch, fake, gauge, factor=1)
    on_card.leak = 100 * MB
    monkeypatch.setattr(smaller_plans, "SMALLEST_TILE", 128)
    net = make_net()
    before = {name: value.clone() for name, value in net.state_dict().items()}
    with pytest.raises(BudgetExceeded, match=r"were held on cuda:0 .*there is no plan with smaller ones"):
        update(StreamingModel(net, BUDGET, tile=128))
    assert all(torch.equal(net.state_dict()[name], value) for name, value in before.items())
    assert all(parameter.grad is None for parameter in net.parameters())
    assert fake.fraction == 1.0


@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_memory_taken_past_the_cap_ends_a_pass_with_its_tile(
    monkeypatch: pytest.MonkeyPatch, direction: str
) -> None:
    fake, gauge = make_card()
    on_card = OnCard(monkeypatch, fake, gauge, factor=1)
    check = CudaLimit.check

    def sampled(limit: CudaLimit) -> None:
        limit._sampler.sample()
        check(limit)

    monkeypatch.setattr(CudaLimit, "check", sampled)
    monkeypatch.setattr(smaller_plans, "SMALLEST_TILE", 64)
    model = StreamingModel(make_net(), BUDGET, tile=64)
    on_card.leak = 3 * GB if direction == "forward" else 0
    run: Callable[[], Any] = lambda: model(torch.randn(SHAPE, dtype=torch.float64))  # noqa: E731
    if direction == "backward":
        loss = run().square().sum()
        on_card.leak, on_card.calls, run = 3 * GB, 0, loss.backward
    with pytest.raises(BudgetExceeded, match="were held on cuda:0"):
        run()
    num_tiles = max(phase.num_tiles for phase in model.plan(SHAPE).phases)
    # A phase has at most three operators.
    assert 0 < on_card.calls <= 3 < num_tiles


def test_nvml_that_is_forbidden_still_gives_a_reading(monkeypatch: pytest.MonkeyPatch) -> None:
    card = Device("GPU-aaaa")
    fake = FakeCuda(card)
    fails = {name: NVMLError_NotSupported() for name in vars(FakeNvml) if name.startswith("nvmlDeviceGet")}
    gauge = Gauge(GPU, Nvml.open(FakeNvml(card, fails=fails)), {}, cuda=fake)
    OnCard(monkeypatch, fake, gauge, factor=2)
    model = StreamingModel(make_net(), BUDGET, tile=128)
    update(model)
    assert model.last_report is not None
    assert model.last_report.reading == "allocator's peak and all else on the device"
    assert model.last_report.measured_bytes == CONTEXT + fake.peak
