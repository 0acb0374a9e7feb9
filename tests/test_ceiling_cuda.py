"""The ceiling on a made-up card: overhead, cap, peak and check."""

from __future__ import annotations

import os
import threading
from typing import Any

import pytest
import torch
from fake_cuda import CONTEXT, FakeCuda
from fake_nvml import Device, FakeNvml, Process
from made_up_card import BUDGET, CAP, GB, GPU, MB, make_card, sampling_threads, wait_until

from streamcnn import BudgetExceeded
from streamcnn.ceiling import caps
from streamcnn.ceiling.cuda import MARGIN_BYTES, RESERVED_STEP, CudaCeiling, CudaLimit
from streamcnn.ceiling.gauge import ASSUMED_OVERHEAD, Gauge
from streamcnn.ceiling.nvml import Nvml, Reading, Source


@pytest.fixture(autouse=True)
def _no_thread_is_left() -> Any:
    yield
    assert sampling_threads() == []


def make_blind(**options: Any) -> tuple[FakeCuda, Gauge]:
    """A card without NVML."""
    fake = FakeCuda(**options)
    return fake, Gauge(GPU, None, {}, cuda=fake)


def test_a_child_forked_within_a_block_is_told_nothing_of_the_card(monkeypatch: pytest.MonkeyPatch) -> None:
    fake, gauge = make_card()
    parent, told = os.getpid(), fake.get_per_process_memory_fraction

    def fraction(device: Any = None) -> float:
        if os.getpid() != parent:
            raise RuntimeError("Cannot re-initialize CUDA in forked subprocess.")
        return told()

    monkeypatch.setattr(fake, "get_per_process_memory_fraction", fraction)
    with CudaLimit(gauge, BUDGET):
        monkeypatch.setattr(os, "getpid", lambda: parent + 1)
        caps._after_fork()
        monkeypatch.undo()


def test_a_block_is_over_though_its_cap_cannot_be_lifted(monkeypatch: pytest.MonkeyPatch) -> None:
    gauge = Gauge(GPU, None, {}, cuda=FakeCuda())

    def refuse(owner: object) -> None:
        raise RuntimeError("the card is lost")

    monkeypatch.setattr(gauge, "uncap", refuse)
    with pytest.raises(RuntimeError, match="is lost"), CudaLimit(gauge, BUDGET) as limit:
        pass
    monkeypatch.undo()
    with CudaLimit(gauge, BUDGET) as later:
        assert not later.is_shared
    limit.close()


def test_only_blocks_of_one_card_share_their_peak() -> None:
    first, second = (Gauge(torch.device("cuda", index), None, {}, cuda=FakeCuda()) for index in range(2))
    with CudaLimit(first, BUDGET) as one, CudaLimit(second, BUDGET) as other:
        assert not one.is_shared
        assert not other.is_shared
        with CudaLimit(first, BUDGET) as inner:
            assert inner.is_shared
        assert one.is_shared
        assert not other.is_shared


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


class TestRoom:
    def test_is_what_the_process_holds_and_what_is_free(self) -> None:
        fake, gauge = make_card(others=30 * GB)
        fake.allocate(5 * GB)
        fake.free(2 * GB)
        room = CudaCeiling(gauge).room
        assert (room.nbytes, room.limit, room.used) == (50 * GB, 80 * GB, 30 * GB)
        assert str(room).startswith(
            "the memory of cuda:0 is 74.5 GiB, of which 27.9 GiB are in use by other processes or kept back "
            "by set_per_process_memory_fraction, so that 46.6 GiB can be had: end other processes on the card"
        )

    def test_holds_the_users_own_cap_on_the_allocator(self) -> None:
        fake, gauge = make_card()
        fake.fraction = 0.25
        assert CudaCeiling(gauge).room.nbytes == 20 * GB + CONTEXT
        # Not that of a pass on another thread.
        with CudaLimit(gauge, BUDGET):
            assert CudaCeiling(gauge).room.nbytes == 20 * GB + CONTEXT

    def test_leaves_the_same_to_a_plan_without_nvml(self) -> None:
        fake, gauge = make_blind(others=30 * GB)
        fake.allocate(5 * GB)
        room = CudaCeiling(gauge).room
        assert room.nbytes - gauge.overhead().nbytes == 50 * GB - CONTEXT

    def test_is_no_more_than_the_card_where_the_overhead_is_assumed(self) -> None:
        _, gauge = make_blind(overhead=0)
        assert CudaCeiling(gauge).room.nbytes == 80 * GB


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

    def test_the_card_is_asked_once_for_each_sample_and_not_after_every_step(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        fake, gauge = make_card()
        ceiling = CudaCeiling(gauge, interval=3600)
        asked: list[int] = []
        read = gauge.max_reserved
        monkeypatch.setattr(gauge, "max_reserved", lambda: (asked.append(1), read())[1])
        steps: list[int] = []

        def run() -> None:
            with ceiling.limit(BUDGET) as limit:
                for step in range(9):
                    ceiling.check()
                    steps.append(step)
                assert len(asked) == 1
                fake.grow(2 * GB)
                limit._sampler.sample()
                ceiling.check()
                steps.append(9)

        with pytest.raises(BudgetExceeded, match="cuda:0"):
            run()
        assert steps == list(range(9))

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
