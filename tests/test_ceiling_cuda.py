"""The ceiling on a GPU's memory, on a card and an NVML that are made up here."""

from __future__ import annotations

import inspect
import itertools
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from fake_cuda import CONTEXT, FakeCuda
from fake_nvml import Device, FakeNvml, NVMLError_NotSupported, Process
from torch import Tensor, nn

from streamcnn import BudgetExceeded, PlanDoesNotFit, StreamingModel
from streamcnn.ceiling import cuda, device
from streamcnn.ceiling.cuda import MARGIN_BYTES, RESERVED_STEP, CudaCeiling, CudaLimit
from streamcnn.ceiling.gauge import ASSUMED_OVERHEAD, Gauge
from streamcnn.ceiling.nvml import Nvml, Reading, Source
from streamcnn.ceiling.sampler import Sampler
from streamcnn.errors import StreamError
from streamcnn.execution.interpreter import TileRun
from streamcnn.runtime import machines, smaller_plans, streamed_pass, streaming_model

MB, GB = 10**6, 10**9
GPU = torch.device("cuda:0")
BUDGET = 2 * GB
CAP = BUDGET - CONTEXT - MARGIN_BYTES


def make_card(*, listed: bool = True, others: int = 0, **options: Any) -> tuple[FakeCuda, Gauge]:
    """A card with NVML, on which this process is listed or not."""
    process = Process(os.getpid(), 0)
    card = Device("GPU-aaaa", processes=[process] if listed else [])
    fake = FakeCuda(card, process, others=others, **options)
    return fake, Gauge(GPU, Nvml.open(FakeNvml(card)), {}, cuda=fake)


def make_blind(**options: Any) -> tuple[FakeCuda, Gauge]:
    """A card without NVML."""
    fake = FakeCuda(**options)
    return fake, Gauge(GPU, None, {}, cuda=fake)


def sampling_threads() -> list[str]:
    return [t.name for t in threading.enumerate() if t.name == "streamcnn-sampler"]


def wait_until(condition: Callable[[], bool]) -> None:
    until = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < until, "nothing happened within 10 seconds"
        time.sleep(0.001)


@pytest.fixture(autouse=True)
def _no_thread_is_left() -> Any:
    yield
    assert sampling_threads() == []


class TestOverhead:
    def test_is_what_nvml_counts_beyond_the_allocator(self) -> None:
        fake, gauge = make_card(others=5 * GB)
        fake.allocate(300 * MB)
        fake.free(100 * MB)
        overhead = gauge.overhead()
        assert (overhead.nbytes, overhead.source) == (CONTEXT, Source.ALLOCATOR)

    def test_without_nvml_is_all_that_is_in_use_beyond_the_allocator(self) -> None:
        fake, gauge = make_blind(others=3 * GB)
        fake.allocate(300 * MB)
        overhead = gauge.overhead()
        assert (overhead.nbytes, overhead.source) == (CONTEXT + 3 * GB, Source.ALLOCATOR_BOUND)

    def test_where_nothing_tells_is_assumed(self) -> None:
        fake, gauge = make_blind(overhead=0)
        fake.allocate(300 * MB)
        overhead = gauge.overhead()
        assert (overhead.nbytes, overhead.source) == (ASSUMED_OVERHEAD, Source.ALLOCATOR_ASSUMED)

    def test_a_card_unknown_to_nvml_is_read_without_it(self) -> None:
        fake = FakeCuda(uuid="bbbb")
        gauge = Gauge(GPU, Nvml.open(FakeNvml(Device("GPU-aaaa", used=GB))), {}, cuda=fake)
        assert gauge.read() is None
        assert gauge.overhead().source is Source.ALLOCATOR_BOUND

    def test_the_idle_baseline_is_the_devices_own(self) -> None:
        process = Process(os.getpid(), None)
        card = Device("GPU-aaaa", processes=[process])
        fake = FakeCuda(card, others=5 * GB)
        idle = {"GPU-aaaa": 5 * GB, "GPU-bbbb": GB}
        gauge = Gauge(GPU, Nvml.open(FakeNvml(card)), idle, cuda=fake)
        assert gauge.read() == Reading(CONTEXT, Source.DEVICE_LESS_IDLE)

    def test_what_is_reserved_has_the_margin_and_live_tensors_but_no_cache(self) -> None:
        fake, gauge = make_card()
        fake.allocate(300 * MB)
        fake.free(100 * MB)
        reserved = CudaCeiling(gauge).reserved_bytes()
        held = CONTEXT + 200 * MB + MARGIN_BYTES
        assert held <= reserved < held + RESERVED_STEP
        assert reserved % RESERVED_STEP == 0
        fake.allocate(1000)
        assert CudaCeiling(gauge).reserved_bytes() == reserved


class TestCap:
    def test_the_allocator_may_hold_the_budget_less_overhead_and_margin(self) -> None:
        fake, gauge = make_card()
        with CudaLimit(gauge, BUDGET):
            assert fake.fraction * fake.total == pytest.approx(CAP, abs=2)
            fake.allocate(CAP - MB)
            with pytest.raises(torch.OutOfMemoryError):
                fake.allocate(2 * MB)
        assert fake.fraction == 1.0

    def test_without_a_budget_there_is_none(self) -> None:
        fake, gauge = make_card()
        with CudaLimit(gauge, None) as limit:
            fake.allocate(5 * GB)
        assert fake.fractions == []
        assert limit.peak_bytes == CONTEXT + 5 * GB

    def test_a_lower_one_of_the_users_holds_and_comes_back(self) -> None:
        fake, gauge = make_card()
        fake.fraction = 0.001
        with CudaLimit(gauge, BUDGET):
            assert fake.fraction == 0.001
        assert fake.fraction == 0.001

    def test_a_budget_below_the_overhead_leaves_nothing(self) -> None:
        fake, gauge = make_card()
        with pytest.raises(BudgetExceeded), CudaLimit(gauge, CONTEXT // 2):
            assert fake.fraction == 0.0
        assert fake.fraction == 1.0

    def test_the_larger_figure_of_the_cards_size_counts(self) -> None:
        fake, gauge = make_card()
        fake.mem_get_info = lambda device=None: (10 * GB, 2 * fake.total)  # type: ignore[method-assign]
        with CudaLimit(gauge, BUDGET):
            assert fake.fraction * 2 * fake.total == pytest.approx(CAP, abs=2)

    def test_cached_memory_past_the_cap_is_given_back_first(self) -> None:
        fake, gauge = make_card()
        fake.allocate(5 * GB)
        fake.free(5 * GB)
        with CudaLimit(gauge, BUDGET) as limit:
            fake.allocate(MB)
        assert fake.num_emptied == 1
        assert limit.peak_bytes == CONTEXT + MB

    def test_cached_memory_below_the_cap_is_kept(self) -> None:
        fake, gauge = make_card()
        fake.allocate(GB)
        fake.free(GB)
        with CudaLimit(gauge, BUDGET):
            pass
        assert fake.num_emptied == 0

    def test_overlapping_blocks_keep_the_lowest(self) -> None:
        fake, gauge = make_card()
        first, second = CudaLimit(gauge, BUDGET), CudaLimit(gauge, 3 * GB)
        first.__enter__()
        lowest = fake.fraction
        second.__enter__()
        assert fake.fraction == lowest
        first.__exit__(None, None, None)
        assert fake.fraction * fake.total == pytest.approx(CAP + GB, abs=2)
        second.__exit__(None, None, None)
        assert fake.fraction == 1.0

    @pytest.mark.parametrize("error", [KeyError("stop"), KeyboardInterrupt(), torch.OutOfMemoryError("full")])
    def test_any_error_lets_everything_go(self, error: BaseException) -> None:
        fake, gauge = make_card()
        seen: list[int] = []

        def fail() -> None:
            with CudaLimit(gauge, BUDGET):
                seen.append(len(sampling_threads()))
                raise error

        with pytest.raises(type(error)):
            fail()
        assert seen == [1]
        assert fake.fraction == 1.0
        assert sampling_threads() == []

    def test_an_error_on_entry_lets_everything_go(self, monkeypatch: pytest.MonkeyPatch) -> None:
        fake, gauge = make_card()

        def refuse(thread: threading.Thread) -> None:
            raise RuntimeError("can't start new thread")

        monkeypatch.setattr(threading.Thread, "start", refuse)
        with pytest.raises(RuntimeError, match="new thread"), CudaLimit(gauge, BUDGET):
            pass
        assert fake.fractions[-1] == fake.fraction == 1.0

    def test_an_error_hides_no_other(self) -> None:
        fake, gauge = make_card()

        def fail() -> None:
            with CudaLimit(gauge, BUDGET):
                fake.grow(5 * GB)
                raise KeyError("stop")

        with pytest.raises(KeyError, match="stop"):
            fail()


class TestPeak:
    def test_is_sampled_in_between(self) -> None:
        fake, gauge = make_card()
        with CudaLimit(gauge, None, interval=0.001) as limit:
            fake.grow(3 * GB)
            wait_until(lambda: limit.peak_bytes == CONTEXT + 3 * GB)
            fake.grow(-3 * GB)
        assert (limit.peak_bytes, limit.reading) == (CONTEXT + 3 * GB, Source.OWN_PROCESS)

    def test_is_read_at_the_end(self) -> None:
        fake, gauge = make_card()
        with CudaLimit(gauge, None, interval=1000) as limit:
            fake.allocate(GB)
        assert (limit.peak_bytes, limit.reading) == (CONTEXT + GB, Source.OWN_PROCESS)
        assert [nbytes for _, nbytes in limit.samples] == [CONTEXT, CONTEXT + GB]

    def test_the_allocators_own_shows_what_samples_missed(self) -> None:
        fake, gauge = make_card()
        with CudaLimit(gauge, None, interval=1000) as limit:
            fake.allocate(GB)
            fake.free(GB)
            fake.empty_cache()
        assert (limit.peak_bytes, limit.reading) == (CONTEXT + GB, Source.ALLOCATOR)

    def test_the_allocators_own_begins_with_the_block(self) -> None:
        fake, gauge = make_card()
        fake.allocate(GB)
        fake.free(GB)
        fake.empty_cache()
        with CudaLimit(gauge, None) as limit:
            pass
        assert limit.peak_bytes == CONTEXT

    def test_of_an_outer_block_outlasts_the_inner_ones(self) -> None:
        fake, gauge = make_card()
        with CudaLimit(gauge, None, interval=1000) as outer:
            fake.allocate(GB)
            fake.free(GB)
            fake.empty_cache()
            with CudaLimit(gauge, None, interval=1000) as inner:
                fake.allocate(100 * MB)
                fake.free(100 * MB)
                fake.empty_cache()
            assert inner.peak_bytes == CONTEXT + 100 * MB
        assert outer.peak_bytes == CONTEXT + GB

    def test_what_comes_after_does_not_count(self) -> None:
        fake, gauge = make_card()
        with CudaLimit(gauge, None) as limit:
            pass
        fake.allocate(GB)
        assert limit.peak_bytes == CONTEXT

    def test_without_nvml_is_the_allocators_and_the_overhead(self) -> None:
        fake, gauge = make_blind()
        with CudaLimit(gauge, BUDGET) as limit:
            fake.allocate(GB)
            fake.free(GB)
        assert (limit.peak_bytes, limit.reading) == (CONTEXT + GB, Source.ALLOCATOR_BOUND)
        assert limit.samples == ()

    @pytest.mark.parametrize("nothing", [0, None])
    def test_nvml_that_stops_telling_is_not_a_small_reading(self, nothing: int | None) -> None:
        fake, gauge = make_card()
        with CudaLimit(gauge, BUDGET, interval=1000) as limit:
            process, fake.process = fake.process, None
            assert process is not None
            process.usedGpuMemory = nothing
            fake.allocate(GB)
        assert (limit.peak_bytes, limit.reading) == (CONTEXT + GB, Source.ALLOCATOR)

    def test_before_the_block_is_unknown(self) -> None:
        limit = CudaLimit(make_card()[1], None)
        assert (limit.peak_bytes, limit.reading) == (None, "unknown")


class TestCheck:
    def test_memory_taken_past_the_cap_is_found_at_the_end(self) -> None:
        fake, gauge = make_card()
        message = (
            r"^2\.34 GiB were held on cuda:0 \(NVML, own process\), and the budget is 1\.86 GiB; .* 500 MiB"
        )
        with pytest.raises(BudgetExceeded, match=message), CudaLimit(gauge, BUDGET):
            fake.grow(2000 * 2**20 - 100 * 2**20)
        assert fake.fraction == 1.0

    def test_after_a_step(self) -> None:
        fake, gauge = make_card()
        ceiling = CudaCeiling(gauge)
        ceiling.check()
        limit = ceiling.limit(None)
        with limit:
            ceiling.check()
        limit = ceiling.limit(BUDGET)
        passed: list[int] = []

        def run() -> None:
            with limit:
                ceiling.check()
                fake.grow(2 * GB)
                wait_until(lambda: (limit.peak_bytes or 0) > BUDGET)
                passed.append(1)
                ceiling.check()
                passed.append(2)

        with pytest.raises(BudgetExceeded, match="cuda:0"):
            run()
        assert passed == [1]

    def test_the_budget_itself_is_allowed(self) -> None:
        fake, gauge = make_card()
        with CudaLimit(gauge, BUDGET) as limit:
            fake.grow(BUDGET - CONTEXT)
        assert limit.peak_bytes == BUDGET
        with pytest.raises(BudgetExceeded), CudaLimit(gauge, BUDGET):
            fake.grow(1)

    def test_of_a_blind_card_counts_too(self) -> None:
        fake, gauge = make_blind()
        with pytest.raises(BudgetExceeded, match="all else on the device"), CudaLimit(gauge, BUDGET):
            fake.live = fake.peak = BUDGET

    def test_the_overhead_is_measured_again_for_the_next_limit(self) -> None:
        fake, gauge = make_card()
        ceiling = CudaCeiling(gauge)
        fake.grow(300 * MB)
        with ceiling.limit(BUDGET):
            assert fake.fraction * fake.total == pytest.approx(CAP - 300 * MB, abs=2)


class TestSampler:
    def test_what_reading_raises_is_raised(self) -> None:
        calls: list[int] = []

        def read() -> None:
            calls.append(1)
            if len(calls) == 3:
                raise KeyError("bug")

        with pytest.raises(KeyError, match="bug"), Sampler(read, 0.001):
            wait_until(lambda: len(calls) == 3)
        assert len(calls) == 3

    def test_an_error_of_the_block_goes_before(self) -> None:
        def read() -> None:
            if threading.current_thread() is not threading.main_thread():
                raise KeyError("bug")

        def run() -> None:
            with Sampler(read, 0.001) as sampler:
                wait_until(lambda: sampler._error is not None)
                raise ValueError("mine")

        with pytest.raises(ValueError, match="mine"):
            run()

    def test_reading_that_fails_at_once_starts_no_thread(self) -> None:
        def read() -> None:
            raise KeyError("bug")

        with pytest.raises(KeyError, match="bug"), Sampler(read):
            pytest.fail("the block was entered")

    def test_a_sample_without_memory_for_itself_is_left_out(self) -> None:
        readings = iter([1, None, None, 5])

        def read() -> Reading:
            nbytes = next(readings, 3)
            if nbytes is None:
                raise MemoryError
            return Reading(nbytes, Source.OWN_PROCESS)

        with Sampler(read, 0.001) as sampler:
            wait_until(lambda: len(sampler.samples) > 2)
        assert [nbytes for _, nbytes in sampler.samples][:3] == [1, 5, 3]
        assert sampler.peak == Reading(5, Source.OWN_PROCESS)

    def test_samples_stay_few_and_even(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("streamcnn.ceiling.sampler._MOST_SAMPLES", 8)
        values = iter(range(1, 1000))
        sampler = Sampler(lambda: Reading(next(values), Source.OWN_PROCESS))
        for _ in range(100):
            sampler.sample()
        found = [nbytes for _, nbytes in sampler.samples]
        assert 4 <= len(found) <= 9
        assert len({b - a for a, b in itertools.pairwise(found)}) == 1
        assert found[0] == 1
        assert found[-1] > 80
        assert sampler.peak == Reading(100, Source.OWN_PROCESS)

    def test_times_rise(self) -> None:
        with Sampler(lambda: Reading(1, Source.OWN_PROCESS), 0.001) as sampler:
            wait_until(lambda: len(sampler.samples) > 3)
        times = [when for when, _ in sampler.samples]
        assert times == sorted(times)


class TestProcess:
    """What is the process's: idle baselines and warm gauges."""

    @pytest.fixture(autouse=True)
    def _fresh(self, monkeypatch: pytest.MonkeyPatch) -> Any:
        monkeypatch.setattr(cuda, "_idle", {})
        cuda._gauge.cache_clear()
        yield
        cuda._gauge.cache_clear()

    def test_idle_is_noted_until_there_is_a_context(self, monkeypatch: pytest.MonkeyPatch) -> None:
        card, fake = Device("GPU-aaaa", used=3 * GB), FakeCuda()
        session = Nvml.open(FakeNvml(card))
        monkeypatch.setattr(cuda, "_session", lambda: session)
        fake.initialised = False
        cuda.record_idle_memory(cuda=fake)
        card.used = 4 * GB
        cuda.record_idle_memory(cuda=fake)
        fake.initialised = True
        card.used = 9 * GB
        cuda.record_idle_memory(cuda=fake)
        assert cuda._idle == {"GPU-aaaa": 4 * GB}

    def test_a_model_notes_it_before_it_moves(self, monkeypatch: pytest.MonkeyPatch) -> None:
        order: list[str] = []
        monkeypatch.setattr(streaming_model, "record_idle_memory", lambda: order.append("idle"))
        monkeypatch.setattr(StreamingModel, "to", lambda model, *args: order.append("to"))
        StreamingModel(nn.Conv2d(3, 4, 3), device="cpu")
        assert order == ["idle", "to"]

    def test_libraries_are_loaded_once_and_before(self, monkeypatch: pytest.MonkeyPatch) -> None:
        fake, order = FakeCuda(), []
        monkeypatch.setattr(cuda, "_session", lambda: None)
        monkeypatch.setattr(cuda, "warm_up", lambda device: order.append(device))
        monkeypatch.setattr(cuda, "Gauge", lambda device, nvml, idle: Gauge(device, nvml, idle, cuda=fake))
        assert device.reserved_bytes(GPU) >= CONTEXT + MARGIN_BYTES
        assert isinstance(device.ceiling_for(GPU), CudaCeiling)
        monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
        assert isinstance(device.ceiling_for(torch.device("cuda")), CudaCeiling)
        assert order == [GPU]

    @pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
    def test_the_warm_up_leaves_no_trace(self, mode: Any) -> None:
        state = torch.get_rng_state()
        with mode(), torch.autocast("cpu", torch.bfloat16):
            cuda.warm_up(torch.device("cpu"))
            assert torch.is_autocast_enabled("cpu")
        assert torch.equal(torch.get_rng_state(), state)

    def test_host_memory_counts_from_where_a_pass_begins(self) -> None:
        assert device.reserved_bytes(torch.device("cpu")) == 0

    def test_another_device_has_no_ceiling(self) -> None:
        ceiling = device.ceiling_for(torch.device("meta"))
        with ceiling.limit(None, reuse_heap=True) as limit:
            ceiling.check()
        assert (limit.peak_bytes, limit.reading, limit.samples) == (None, "unknown", ())
        with pytest.raises(StreamError, match="budget= cannot be enforced on device meta"):
            ceiling.limit(GB, reuse_heap=True)


class TestTheAllocatorsSettings:
    def asked(self, environ: dict[str, str], **known: object) -> list[str]:
        asked: list[str] = []
        api = SimpleNamespace(_accelerator_setAllocatorSettings=asked.append, **known)
        cuda.let_segments_grow(environ, api=api)
        return asked

    def test_segments_may_grow(self) -> None:
        assert self.asked({"OTHER": "x"}) == ["expandable_segments:True"]

    @pytest.mark.parametrize("name", cuda.ALLOCATOR_SETTINGS)
    def test_the_users_settings_hold(self, name: str) -> None:
        assert self.asked({name: "max_split_size_mb:512"}) == []

    @pytest.mark.parametrize(("told", "expected"), [("x:1", []), ("", ["expandable_segments:True"])])
    def test_what_was_set_at_run_time_holds(self, told: str, expected: list[str]) -> None:
        assert self.asked({}, _accelerator_getAllocatorSettings=lambda: told) == expected

    def test_pytorch_takes_the_setting(self) -> None:
        assert callable(torch._C._accelerator_setAllocatorSettings)


class TestTheFake:
    """It has the functions of ``torch.cuda``, and no others."""

    def test_signatures(self) -> None:
        functions = {
            name: function
            for name, function in vars(FakeCuda).items()
            if callable(function) and not name.startswith("_") and name not in ("allocate", "free", "grow")
        }
        assert len(functions) == 8
        for name, function in functions.items():
            fake = list(inspect.signature(function).parameters)[1:]
            assert fake == list(inspect.signature(getattr(torch.cuda, name)).parameters), name

    def test_properties(self) -> None:
        # Only a GPU has real ones; the package's type information says what they have.
        stub = (Path(torch.__file__).parent / "_C" / "__init__.pyi").read_text()
        described = stub.split("class _CudaDeviceProperties:")[1].split("\nclass ")[0]
        for name in vars(FakeCuda().get_device_properties()):
            assert f"    {name}: " in described


# --- passes of a model whose memory is on the made-up card -------------------------------------------------


SHAPE = (1, 3, 300, 280)


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

    def __init__(self, monkeypatch: pytest.MonkeyPatch, fake: FakeCuda, gauge: Gauge, factor: int) -> None:
        self.fake = fake
        self.factor = factor
        self.leak = 0
        self.calls = 0
        evaluate = TileRun._evaluate

        def evaluated(run: TileRun, *args: Any) -> Tensor:
            self.calls += 1
            value = evaluate(run, *args)
            nbytes = value.nbytes * self.factor
            fake.allocate(nbytes)
            fake.free(nbytes)
            fake.grow(self.leak)
            return value

        monkeypatch.setattr(TileRun, "_evaluate", evaluated)
        monkeypatch.setattr(streamed_pass, "ceiling_for", lambda device, *, counted: CudaCeiling(gauge))
        monkeypatch.setattr(machines, "reserved_bytes", lambda device: CudaCeiling(gauge).reserved_bytes())


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
    on_card = OnCard(monkeypatch, fake, gauge, factor=1)

    def rarely(ceiling: CudaCeiling, budget: int | None, *, reuse_heap: bool = False) -> CudaLimit:
        ceiling._limit = CudaLimit(gauge, budget, interval=1000)
        return ceiling._limit

    def emptied() -> None:
        on_card.leak, fake.cached = 0, 0
        fake.grow(CONTEXT - fake.overhead)

    monkeypatch.setattr(CudaCeiling, "limit", rarely)
    monkeypatch.setattr(fake, "empty_cache", emptied)
    on_card.leak = BUDGET
    model = StreamingModel(make_net(), BUDGET, tile=128)
    found = update(model)
    assert model.last_report is not None
    assert model.last_report.num_retries == 1
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
