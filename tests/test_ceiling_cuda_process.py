"""The ceiling on a made-up card: its samples, and what it changes in the process."""

from __future__ import annotations

import inspect
import itertools
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from fake_cuda import CONTEXT, FakeCuda
from fake_nvml import Device, FakeNvml
from made_up_card import GB, GPU, sampling_threads, wait_until
from torch import nn

from streamcnn import StreamingModel
from streamcnn.ceiling import cuda, device
from streamcnn.ceiling.cuda import MARGIN_BYTES, CudaCeiling
from streamcnn.ceiling.gauge import Gauge
from streamcnn.ceiling.nvml import Nvml, Reading, Source
from streamcnn.ceiling.sampler import Sampler
from streamcnn.errors import StreamError
from streamcnn.runtime import streaming_model


@pytest.fixture(autouse=True)
def _no_thread_is_left() -> Any:
    yield
    assert sampling_threads() == []


@contextmanager
def sampling(*options: Any) -> Iterator[Sampler[Any]]:
    """A sampler whose thread runs in the block, and whose error is raised behind it."""
    sampler = Sampler[Any](*options)
    try:
        sampler.start()
        yield sampler
    finally:
        sampler.close()
    sampler.raise_error()


class TestSampler:
    def test_what_reading_raises_is_raised(self) -> None:
        calls: list[int] = []

        def read() -> None:
            calls.append(1)
            if len(calls) == 3:
                raise KeyError("bug")

        with pytest.raises(KeyError, match="bug"), sampling(read, 0.001):
            wait_until(lambda: len(calls) == 3)
        assert len(calls) == 3

    def test_an_error_of_the_block_goes_before(self) -> None:
        def read() -> None:
            if threading.current_thread() is not threading.main_thread():
                raise KeyError("bug")

        def run() -> None:
            with sampling(read, 0.001) as sampler:
                wait_until(lambda: sampler.thread is not None and not sampler.thread.is_alive())
                raise ValueError("mine")

        with pytest.raises(ValueError, match="mine"):
            run()

    def test_reading_that_fails_at_once_starts_no_thread(self) -> None:
        def read() -> None:
            raise KeyError("bug")

        with pytest.raises(KeyError, match="bug"), sampling(read):
            pytest.fail("the block was entered")

    def test_a_sample_without_memory_for_itself_is_left_out(self) -> None:
        readings = iter([1, None, None, 5])

        def read() -> Reading:
            nbytes = next(readings, 3)
            if nbytes is None:
                raise MemoryError
            return Reading(nbytes, Source.OWN_PROCESS)

        with sampling(read, 0.001) as sampler:
            wait_until(lambda: len(sampler.samples) > 2)
        assert [nbytes for _, nbytes in sampler.samples][:3] == [1, 5, 3]
        assert sampler.peak == Reading(5, Source.OWN_PROCESS)

    def test_samples_stay_few_and_even(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("streamcnn.ceiling.sampler.MOST_SAMPLES", 8)
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
        with sampling(lambda: Reading(1, Source.OWN_PROCESS), 0.001) as sampler:
            wait_until(lambda: len(sampler.samples) > 3)
        times = [when for when, _ in sampler.samples]
        assert times == sorted(times)


class TestProcess:
    """What is the process's: idle baselines and warm gauges."""

    @pytest.fixture(autouse=True)
    def _fresh(self, monkeypatch: pytest.MonkeyPatch) -> Any:
        monkeypatch.setattr(cuda, "idle_bytes", {})
        cuda.gauge_of.cache_clear()
        yield
        cuda.gauge_of.cache_clear()

    def test_idle_is_noted_until_there_is_a_context(self, monkeypatch: pytest.MonkeyPatch) -> None:
        card, fake = Device("GPU-aaaa", used=3 * GB), FakeCuda()
        session = Nvml.open(FakeNvml(card))
        monkeypatch.setattr(cuda, "nvml_session", lambda: session)
        fake.initialised = False
        cuda.record_idle_memory(cuda=fake)
        card.used = 4 * GB
        cuda.record_idle_memory(cuda=fake)
        fake.initialised = True
        card.used = 9 * GB
        cuda.record_idle_memory(cuda=fake)
        assert cuda.idle_bytes == {"GPU-aaaa": 4 * GB}

    def test_a_model_notes_it_before_it_moves(self, monkeypatch: pytest.MonkeyPatch) -> None:
        order: list[str] = []
        monkeypatch.setattr(streaming_model, "record_idle_memory", lambda: order.append("idle"))
        monkeypatch.setattr(StreamingModel, "to", lambda model, *args: order.append("to"))
        StreamingModel(nn.Conv2d(3, 4, 3), device="cpu")
        assert order == ["idle", "to"]

    def test_libraries_are_loaded_once_and_before(self, monkeypatch: pytest.MonkeyPatch) -> None:
        fake, order = FakeCuda(), []
        monkeypatch.setattr(cuda, "nvml_session", lambda: None)
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
