"""Hardware profiles: measured once for a machine, kept, and the same plan from the same profile."""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
import warnings
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import pytest
import torch
from copy_engines import LateCopies
from helpers import no_home
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from streamcnn import StreamingModel
from streamcnn.errors import RatesUnusable
from streamcnn.plan.hardware import NOMINAL, HardwareProfile
from streamcnn.plan.plan import Tier
from streamcnn.runtime import calibration, rates
from streamcnn.runtime.calibration import hardware_profile
from streamcnn.runtime.rates import measured_rates
from streamcnn.stores import GpuTransfers, HostStore, SparePinned, StoreSpec

CPU = torch.device("cpu")


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[HardwareProfile]:
    """Made-up measurements, each twice as fast as the one before, kept in a file of their own."""
    made: list[HardwareProfile] = []

    def measure(device: torch.device, dtype: torch.dtype, source: str) -> HardwareProfile:
        hardware = NOMINAL["cpu"]
        made.append(dataclasses.replace(hardware, source="made up", dense_flops=2 ** len(made) * 1e9))
        return made[-1]

    monkeypatch.setenv(calibration.VARIABLE, str(tmp_path / "deep" / "rates.json"))
    monkeypatch.setattr(calibration, "measured_rates", measure)
    return made


def test_a_machine_is_measured_once(measured: list[HardwareProfile]) -> None:
    assert hardware_profile(CPU) == hardware_profile(CPU) == measured[0]
    assert len(measured) == 1


def test_what_was_measured_with_is_given_back(
    measured: list[HardwareProfile], monkeypatch: pytest.MonkeyPatch
) -> None:
    emptied: list[int] = []
    ceiling = SimpleNamespace(empty_cache=lambda: emptied.append(len(measured)))
    monkeypatch.setattr(calibration, "ceiling_for", lambda device: ceiling)
    hardware_profile(CPU)
    hardware_profile(CPU)
    assert emptied == [1]


class _Timed(TorchDispatchMode):
    """Notes the element types of the maps that convolutions and norms are given."""

    def __init__(self) -> None:
        super().__init__()
        self.dtypes: dict[str, set[torch.dtype]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(part in func.__name__ for part in ("convolution", "batch_norm")):
            name = func.__name__.partition(".")[0]
            self.dtypes.setdefault(name, set()).add(args[0].dtype)
        return func(*args, **(kwargs or {}))


@pytest.fixture
def untimed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything on the device is done once, and taken to take a second."""

    def once(device: torch.device, action: Callable[[], object], *, times: int = 1) -> float:
        action()
        return 1.0

    monkeypatch.setattr(rates, "_seconds", once)
    monkeypatch.setattr(rates, "_fresh", lambda device: 1.0)
    monkeypatch.setattr(rates, "_flushed", lambda path: 1.0)
    monkeypatch.setattr(rates, "_stores", lambda *args: ({}, {Tier.DISK: 2.0}, {}))


@pytest.mark.usefixtures("untimed")
def test_random_numbers_are_as_if_nothing_had_been_measured() -> None:
    before = torch.get_rng_state()
    measured_rates(CPU, torch.float32, "")
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.usefixtures("untimed")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_what_is_timed_is_of_the_type_asked_for_in_both_passes(dtype: torch.dtype) -> None:
    with torch.autocast("cpu", torch.bfloat16), torch.inference_mode(), _Timed() as timed:
        measured_rates(CPU, dtype, "")
    backward = {name for name in timed.dtypes if "backward" in name}
    assert len(backward) == 2
    assert len(timed.dtypes) > len(backward)
    assert set().union(*timed.dtypes.values()) == {dtype}


@pytest.mark.usefixtures("untimed")
def test_what_reaches_the_disk_and_what_ram_takes_are_rates_of_their_own() -> None:
    found = measured_rates(CPU, torch.float32, "")
    assert (found.write_bytes[Tier.DISK], found.buffered_write_bytes) == (1.0, 2.0)


def test_what_is_slow_is_not_timed_often(monkeypatch: pytest.MonkeyPatch) -> None:
    now = itertools.count(step=10)
    monkeypatch.setattr(rates.time, "perf_counter", lambda: next(now))
    done: list[None] = []
    assert rates._seconds(CPU, lambda: done.append(None)) == 10
    assert len(done) == 1


def test_another_number_of_threads_is_another_machine(
    measured: list[HardwareProfile], monkeypatch: pytest.MonkeyPatch
) -> None:
    first = hardware_profile(CPU)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 77)
    assert hardware_profile(CPU) != first
    assert len(measured) == 2


def test_a_pass_is_planned_with_the_rates_of_the_type_that_it_computes_in(
    measured: list[HardwareProfile],
) -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1))
    shape = (1, 3, 60, 50)
    plans = [StreamingModel(net, tile=16).plan(shape)]
    with torch.autocast("cpu", torch.bfloat16):
        plans.append(StreamingModel(net, tile=16).plan(shape))
    plans.append(StreamingModel(net.double(), tile=16).plan(shape, torch.float64))
    assert len(measured) == 3
    plans.append(StreamingModel(net.float(), tile=16).plan(shape))
    assert len(measured) == 3
    assert plans[0].digest == plans[3].digest


@pytest.mark.parametrize("left", ["", "{", "[]"])
def test_a_damaged_file_is_measured_again(measured: list[HardwareProfile], tmp_path: Path, left: str) -> None:
    hardware_profile(CPU)
    path = tmp_path / "deep" / "rates.json"
    path.write_text(left)
    assert hardware_profile(CPU) == measured[1]
    assert json.loads(path.read_text())
    assert list(path.parent.iterdir()) == [path]


GOOD = json.loads(json.dumps(dataclasses.asdict(NOMINAL["cpu"])))
CRAFTED = [
    *(
        {name: value}
        for name in ("dense_flops", "operator_seconds")
        for value in ("1", None, [], -1, 0, 1e99)
    ),
    *({name: value} for name in ("read_bytes", "write_bytes") for value in (3, [], {}, {"disk": 1.0})),
    {"read_bytes": {**GOOD["read_bytes"], "../x": 1.0}},
    {"read_bytes": {**GOOD["read_bytes"], "disk": "fast"}},
    {"source": 7},
]


@pytest.mark.parametrize("values", CRAFTED, ids=str)
def test_rates_that_are_none_are_measured_again(
    measured: list[HardwareProfile], tmp_path: Path, values: dict[str, object]
) -> None:
    path = tmp_path / "deep" / "rates.json"
    hardware_profile(CPU)
    (key,) = json.loads(path.read_text())
    path.write_text(json.dumps({key: {**GOOD, **values}, "another machine": GOOD}))
    assert hardware_profile(CPU) == measured[1]
    assert json.loads(path.read_text())["another machine"] == GOOD


@pytest.mark.parametrize("left", ["3", "[" * 100_000, '{"a": NaN}', '{"a": 1, "a": 2}', "\xff"])
def test_a_file_that_is_no_json_object_is_measured_again(
    measured: list[HardwareProfile], tmp_path: Path, left: str
) -> None:
    hardware_profile(CPU)
    (tmp_path / "deep" / "rates.json").write_text(left, encoding="latin-1")
    assert hardware_profile(CPU) == measured[1]


@pytest.mark.parametrize("place", ["/dev/zero", "pipe", "folder", "file/rates.json"])
def test_rates_are_kept_in_a_file(
    measured: list[HardwareProfile], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").write_text("")
    path = tmp_path / place
    monkeypatch.setenv(calibration.VARIABLE, str(path))
    text = f"{path} is no regular file"
    if place.startswith("file/"):
        text = f"cannot keep this machine's rates in {path}: .*STREAMCNN_CALIBRATION, or set it to off"
    with pytest.raises(RatesUnusable, match=text):
        hardware_profile(CPU)


@pytest.mark.parametrize("home", ["/proc", "file", None])
def test_where_no_file_was_named_and_none_can_be_kept_the_process_measures_for_itself(
    measured: list[HardwareProfile], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, home: str | None
) -> None:
    monkeypatch.delenv(calibration.VARIABLE)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    (tmp_path / "file").write_text("")
    if home is None:
        monkeypatch.setattr(Path, "home", no_home)
    else:
        monkeypatch.setenv("HOME", str(tmp_path / home))
    monkeypatch.setattr(calibration, "_not_kept", {})
    with pytest.warns(UserWarning, match="cannot keep this machine's rates.*each process measures them anew"):
        first = hardware_profile(CPU)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert hardware_profile(CPU) is first
    assert len(measured) == 1


def test_nominal_rates_where_nothing_shall_be_measured(
    measured: list[HardwareProfile], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(calibration.VARIABLE, "off")
    assert hardware_profile(CPU) is NOMINAL["cpu"]
    assert not measured


def test_this_machine() -> None:
    hardware = measured_rates(CPU, torch.float32, "this machine")
    assert hardware.source == "this machine"
    assert 1e8 < hardware.dense_flops < 1e14
    assert hardware.grouped_flops < hardware.dense_flops
    assert 0 < hardware.operator_seconds < 0.1
    for by_home in (hardware.read_bytes, hardware.write_bytes):
        assert set(by_home) == set(Tier)
        assert all(1e5 < rate < 1e13 for rate in by_home.values())
    assert hardware.fresh_bytes > 1e6
    assert hardware.buffered_write_bytes >= hardware.write_bytes[Tier.DISK]


def test_a_card_is_timed_while_it_computes_and_not_while_the_host_waits(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    clock = [0.0]

    def pass_time(seconds: float) -> None:
        clock[0] += seconds

    monkeypatch.setattr(rates.time, "perf_counter", lambda: clock[0])
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: pass_time(20e-6))
    card = torch.device("cuda")
    assert rates._seconds(card, lambda: pass_time(10e-6), times=20) == pytest.approx(11e-6)
    assert rates._seconds(CPU, lambda: pass_time(10e-6)) == pytest.approx(10e-6)


def test_what_a_card_loads_when_it_first_computes_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, loading = [0.0], iter([30.0])

    def action() -> None:
        clock[0] += next(loading, 1e-3)

    monkeypatch.setattr(rates.time, "perf_counter", lambda: clock[0])
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    assert rates._seconds(torch.device("cuda"), action, times=8) == pytest.approx(1e-3)


def test_host_memory_beside_a_card_is_timed_as_maps_are_written() -> None:
    """Once, from the card to where they lie: what is written again goes by way of a buffer and the host."""
    transfers, spares = GpuTransfers(LateCopies()), SparePinned()
    spec = StoreSpec(rates._MAP, torch.float32, (2, 3))
    with patch.object(GpuTransfers, "take", autospec=True, side_effect=GpuTransfers.take) as take:
        rates._store(CPU, rates._GPU_WORK, lambda: HostStore(spec, transfers, spares), once=True)
    assert {call.args[2].numel() for call in take.call_args_list} == {64 * 4 * 4}
    assert spares.nbytes <= 2 * spec.nbytes


def test_rates_say_what_they_were_measured_on(
    measured: list[HardwareProfile], monkeypatch: pytest.MonkeyPatch
) -> None:
    sources: list[str] = []

    def measure(device: torch.device, dtype: torch.dtype, source: str) -> HardwareProfile:
        sources.append(source)
        return NOMINAL["cpu"]

    monkeypatch.setattr(calibration, "measured_rates", measure)
    hardware_profile(CPU, torch.bfloat16)
    assert len(sources) == 1
    assert "bfloat16" in sources[0]
    assert sources[0].endswith(f"torch {torch.__version__}")


def test_a_slow_disk_changes_the_plan_and_the_same_rates_do_not(
    measured: list[HardwareProfile], monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    layers = [nn.Conv2d(16, 16, 3, padding=1) if i else nn.Conv2d(3, 16, 3) for i in range(4)]
    net = nn.Sequential(*(m for c in layers for m in (c, nn.BatchNorm2d(16))), nn.AdaptiveAvgPool2d(1))
    shape = (1, 3, 700, 700)
    first, second = (StreamingModel(net, "150MB").plan(shape) for _ in range(2))
    assert first.digest == second.digest
    slow = dataclasses.replace(
        measured[0],
        source="slow",
        read_bytes={**measured[0].read_bytes, Tier.DISK: 1e6},
        write_bytes={**measured[0].write_bytes, Tier.DISK: 1e6},
    )
    monkeypatch.setattr("streamcnn.runtime.machines.hardware_profile", lambda *args: slow)
    other = StreamingModel(net, "150MB").plan(shape)
    assert other.projected_seconds > first.projected_seconds
    assert other.bytes_on(Tier.DISK) < first.bytes_on(Tier.DISK)
    assert other.recomputation > first.recomputation
