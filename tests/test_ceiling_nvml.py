"""Readings of device memory from NVML: their order, and all the ways in which NVML does not know."""

from __future__ import annotations

import inspect
import os
import sys
from typing import Any

import fake_nvml
import pynvml
import pytest
from fake_nvml import Device, FakeNvml, Process

from streamcnn.ceiling.nvml import Nvml, Reading, Source

GB = 10**9
OWN = os.getpid()
OTHER = 2**30
"""A process number that is not ours."""


def read(device: Device, *, idle: int | None = None, at_least: int = 0, **fails: Exception) -> Reading | None:
    session = Nvml.open(FakeNvml(device, fails=fails))
    assert session is not None
    return session.reading(device, idle=idle, at_least=at_least)


def card(*processes: Process, used: int = 0, **fields: Any) -> Device:
    return Device("GPU-aaaa", used=used, processes=list(processes), **fields)


class TestOrder:
    def test_the_own_process_is_first(self) -> None:
        device = card(Process(OTHER, 7 * GB), Process(OWN, 3 * GB), used=11 * GB)
        assert read(device, idle=GB) == Reading(3 * GB, Source.OWN_PROCESS)

    def test_no_more_is_asked_than_is_needed(self) -> None:
        """Each answer takes time, in which a card that waits for the host has nothing to do."""
        device = card(Process(OWN, 3 * GB), used=11 * GB)
        fake = FakeNvml(device)
        session = Nvml.open(fake)
        assert session is not None
        fake.calls.clear()
        assert session.reading(device, idle=GB, at_least=0) is not None
        assert fake.calls == ["nvmlDeviceGetComputeRunningProcesses"]

    def test_contexts_of_the_own_process_add_up(self) -> None:
        device = card(Process(OWN, 3 * GB, 1), Process(OTHER, GB), Process(OWN, 2 * GB, 2))
        assert read(device) == Reading(5 * GB, Source.OWN_PROCESS)

    def test_the_only_process_is_second(self) -> None:
        # Inside a container the own number is another one than NVML's.
        device = card(Process(OTHER, 3 * GB), used=11 * GB)
        assert read(device, idle=GB) == Reading(3 * GB, Source.ONLY_PROCESS)

    @pytest.mark.parametrize("nothing", [0, None])
    def test_what_is_beyond_the_idle_baseline_is_third(self, nothing: int | None) -> None:
        for processes in (
            [Process(OWN, nothing)],
            [Process(OTHER, nothing)],
            [Process(OTHER, GB), Process(OTHER + 1, GB)],
            [Process(OWN, nothing), Process(OTHER, 5 * GB)],
            [],
        ):
            device = card(*processes, used=11 * GB)
            assert read(device, idle=4 * GB) == Reading(7 * GB, Source.DEVICE_LESS_IDLE), processes

    @pytest.mark.parametrize("nothing", [0, None])
    def test_a_context_that_is_not_told_makes_the_sum_unknown(self, nothing: int | None) -> None:
        device = card(Process(OWN, 3 * GB), Process(OWN, nothing), used=11 * GB)
        assert read(device, idle=4 * GB) == Reading(7 * GB, Source.DEVICE_LESS_IDLE)

    @pytest.mark.parametrize("nothing", [0, None])
    def test_without_an_idle_baseline_it_is_unknown(self, nothing: int | None) -> None:
        assert read(card(Process(OWN, nothing), used=11 * GB)) is None
        assert read(card(Process(OTHER, GB), Process(OTHER + 1, GB), used=11 * GB)) is None

    @pytest.mark.parametrize("used", [0, 4 * GB, 3 * GB])
    def test_nothing_beyond_the_idle_baseline_is_unknown(self, used: int) -> None:
        assert read(card(used=used), idle=4 * GB) is None

    def test_less_than_is_held_for_certain_is_another_process(self) -> None:
        # A process outside the container has the number that ours has inside.
        device = card(Process(OWN, GB), Process(OTHER, 6 * GB), used=11 * GB)
        assert read(device, idle=4 * GB, at_least=5 * GB) == Reading(7 * GB, Source.DEVICE_LESS_IDLE)
        assert read(device, idle=4 * GB, at_least=8 * GB) is None
        assert read(card(Process(OTHER, GB)), at_least=5 * GB) is None


class TestFailures:
    @pytest.mark.parametrize(
        "error",
        [
            fake_nvml.NVMLError_NotSupported(),
            fake_nvml.NVMLError_NoPermission(),
            fake_nvml.NVMLError_GpuIsLost(),
            fake_nvml.NVMLLibraryMismatchError(),
        ],
        ids=repr,
    )
    def test_what_is_refused_is_unknown(self, error: Exception) -> None:
        device = card(Process(OWN, 3 * GB), used=11 * GB)
        processes = {"nvmlDeviceGetComputeRunningProcesses": error}
        assert read(device, idle=4 * GB, **processes) == Reading(7 * GB, Source.DEVICE_LESS_IDLE)
        assert read(device, **processes) is None
        assert read(device, idle=4 * GB, **processes, nvmlDeviceGetMemoryInfo=error) is None
        assert read(device, nvmlDeviceGetMemoryInfo=error) == Reading(3 * GB, Source.OWN_PROCESS)

    def test_other_errors_are_not_swallowed(self) -> None:
        with pytest.raises(KeyError):
            read(card(), nvmlDeviceGetComputeRunningProcesses=KeyError("bug"))

    @pytest.mark.parametrize(
        "error",
        [
            fake_nvml.NVMLError_LibraryNotFound(),
            fake_nvml.NVMLError_DriverNotLoaded(),
            fake_nvml.NVMLError_NoPermission(),
        ],
        ids=repr,
    )
    def test_no_session_where_nvml_is_not_to_be_had(self, error: Exception) -> None:
        assert Nvml.open(FakeNvml(card(), fails={"nvmlInit": error})) is None

    def test_no_session_without_the_package(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(sys.modules, "pynvml", None)
        assert Nvml.open() is None

    def test_the_package_is_used(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(sys.modules, "pynvml", FakeNvml(card(used=GB)))
        session = Nvml.open()
        assert session is not None
        assert session.used_everywhere() == {"GPU-aaaa": GB}

    def test_a_package_without_the_mismatch_error(self) -> None:
        class Older(FakeNvml):
            @property
            def NVMLLibraryMismatchError(self) -> Any:
                raise AttributeError

        error = fake_nvml.NVMLError_NotSupported()
        session = Nvml.open(Older(card(), fails={"nvmlDeviceGetMemoryInfo": error}))
        assert session is not None
        assert session.used(card()) is None


class TestFinding:
    """PyTorch's device is found by its UUID: CUDA_VISIBLE_DEVICES renumbers, and may name slices."""

    def setup_method(self) -> None:
        self.slices = [Device("MIG-s0-aaaa", used=GB), Device("MIG-s1-bbbb", used=2 * GB)]
        self.first, self.second = Device("GPU-aaaa", used=5 * GB, slices=[]), Device("GPU-bbbb", used=6 * GB)
        self.sliced = Device("GPU-cccc", used=7 * GB, slices=self.slices)
        self.session = Nvml.open(FakeNvml(self.first, self.second, self.sliced))
        assert self.session is not None

    def find(self, uuid: str, index: int = 0, visible: str | None = None) -> Device | None:
        assert self.session is not None
        return self.session.find(uuid, index, visible)

    def test_a_card_whatever_its_number(self) -> None:
        assert self.find("bbbb") is self.second
        assert self.find("GPU-bbbb") is self.second
        assert self.find("bbbb", 0, "1") is self.second
        assert self.find("aaaa", 1, "1,0") is self.first
        assert self.find("aaaa", 3, "1,0") is self.first
        assert self.find("bbbb", 1, "GPU-aaaa, GPU-bb") is self.second

    def test_a_card_unknown_to_nvml(self) -> None:
        assert self.find("dddd") is None

    def test_a_slice_by_its_own_uuid(self) -> None:
        assert self.find("s1-bbbb") is self.slices[1]

    def test_a_slice_named_by_the_environment_where_cuda_gives_the_cards_uuid(self) -> None:
        assert self.find("cccc", 0, "MIG-s1-bbbb") is self.slices[1]
        assert self.find("cccc", 1, "0, MIG-s0-aaaa") is self.slices[0]
        assert self.find("dddd", 0, "MIG-s1-bbbb") is self.slices[1]

    def test_a_slice_named_by_the_beginning_of_its_uuid(self) -> None:
        assert self.find("cccc", 0, "MIG-s0") is self.slices[0]

    def test_the_only_slice_of_a_card(self) -> None:
        self.sliced.slices = self.slices[:1]
        assert self.find("cccc", 0, "2") is self.slices[0]

    def test_a_card_whose_slice_is_not_named_is_unknown(self) -> None:
        # The card's own numbers are those of all its slices together.
        assert self.find("cccc", 0, "2") is None
        assert self.find("cccc", 0, "MIG-s") is None

    def test_what_is_in_use_everywhere(self) -> None:
        assert self.session is not None
        everything = {
            "GPU-aaaa": 5 * GB,
            "GPU-bbbb": 6 * GB,
            "GPU-cccc": 7 * GB,
            "MIG-s0-aaaa": GB,
            "MIG-s1-bbbb": 2 * GB,
        }
        assert self.session.used_everywhere() == everything
        self.second.used = 0
        del everything["GPU-bbbb"]
        assert self.session.used_everywhere() == everything


class TestTheFake:
    """It speaks the interface of the installed package, and no other."""

    def test_functions_take_the_same_arguments(self) -> None:
        functions = {name: f for name, f in vars(FakeNvml).items() if name.startswith("nvml")}
        assert len(functions) >= 10
        for name, function in functions.items():
            fake = list(inspect.signature(function).parameters)[1:]
            real = list(inspect.signature(inspect.unwrap(getattr(pynvml, name))).parameters)
            assert fake == real, name

    def test_constants_and_errors_are_the_same(self) -> None:
        for name, value in vars(fake_nvml).items():
            if name.startswith("NVML_"):
                assert getattr(pynvml, name) == value, name
                assert getattr(FakeNvml, name, value) == value
            elif name.startswith("NVMLError_"):
                real = getattr(pynvml, name)
                assert issubclass(real, pynvml.NVMLError)
                assert issubclass(value, fake_nvml.NVMLError)
                assert real().value == value.value, name
                assert getattr(FakeNvml, name) is value
        assert issubclass(pynvml.NVMLLibraryMismatchError, Exception)
        assert not issubclass(pynvml.NVMLLibraryMismatchError, pynvml.NVMLError)

    @pytest.mark.parametrize(
        ("fake", "real"),
        [(fake_nvml.Memory, pynvml.c_nvmlMemory_t), (Process, pynvml.c_nvmlProcessInfo_v3_t)],
    )
    def test_structures_have_the_same_fields(self, fake: Any, real: Any) -> None:
        assert sorted(fake.__dataclass_fields__) == sorted(name for name, _ in real._fields_)

    def test_unavailable_memory_of_a_process_is_none(self) -> None:
        source = inspect.getsource(pynvml.nvmlDeviceGetComputeRunningProcesses_v3)
        assert "obj.usedGpuMemory = None" in source

    def test_migs_mode_is_a_pair(self) -> None:
        source = inspect.getsource(pynvml.nvmlDeviceGetMigMode)
        assert "return [c_currentMode.value, c_pendingMode.value]" in source


def test_this_machine_gives_a_session_or_none() -> None:
    session = Nvml.open()
    if session is not None:
        assert all(used > 0 for used in session.used_everywhere().values())
