"""On a CUDA device: the ceiling holds, everything counts, and the results are plain PyTorch's.

``make test-gpu`` runs these. Numbers of bytes are the device's own, read here independently of streamcnn.
"""

from __future__ import annotations

import copy
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import pynvml
import pytest
import torch
from gpu_cases import GPU, SHAPE, assert_same, make_net, others_leave, update
from stores_away import away
from tile_operators import Evaluate, RefusedOnce, around_operators
from torch import Tensor, nn
from torch.nn import functional as F

from streamcnn import BudgetExceeded, PlanDoesNotFit, StreamingModel, verify
from streamcnn.ceiling.cuda import MARGIN_BYTES, cuda_ceiling
from streamcnn.ceiling.device import reserved_bytes
from streamcnn.plan.storage import Tier
from streamcnn.runtime.rates import measured_rates
from streamcnn.support.models import load_model
from streamcnn.verification import rounding

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.usefixtures("gpu_left_clean"),
    # timm asks for a deprecated annotation when it is imported.
    pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning"),
]

GB = 10**9
LARGE = (1, 3, 900, 800)


class DevicePeak:
    """The most that NVML says of this process, or of the whole device where it does not know processes."""

    def __init__(self) -> None:
        pynvml.nvmlInit()
        uuid = str(torch.cuda.get_device_properties(GPU).uuid)
        self.handle = pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{uuid}")
        self.nbytes = 0

    def read(self) -> int:
        for process in pynvml.nvmlDeviceGetComputeRunningProcesses(self.handle):
            if process.pid == os.getpid() and process.usedGpuMemory:
                return int(process.usedGpuMemory)
        return int(pynvml.nvmlDeviceGetMemoryInfo(self.handle).used)

    @contextmanager
    def watched(self) -> Iterator[None]:
        stop = threading.Event()

        def watch() -> None:
            while not stop.wait(0.005):
                self.nbytes = max(self.nbytes, self.read())

        thread = threading.Thread(target=watch)
        thread.start()
        try:
            yield
        finally:
            stop.set()
            thread.join()
            self.nbytes = max(self.nbytes, self.read())


@pytest.fixture
def device_peak() -> DevicePeak:
    try:
        return DevicePeak()
    except pynvml.NVMLError as error:
        pytest.skip(f"NVML does not tell of this device: {error}")


def refuse(monkeypatch: pytest.MonkeyPatch, budget: int, at: int, *, always: bool = False) -> RefusedOnce:
    """Have an operator ask the allocator for more than the budget."""
    refused = RefusedOnce(
        at, always=always, refuse=lambda: torch.empty(budget, dtype=torch.uint8, device=GPU)
    )
    around_operators(monkeypatch, refused)
    return refused


def held_with(model: StreamingModel, share: float) -> int:
    """Bytes that the process holds with ``share`` of what the model's plan takes beside what is reserved."""
    reserved = reserved_bytes(GPU)
    return reserved + int(share * (model.plan(LARGE, torch.float64).projected_bytes - reserved))


# --- the ceiling --------------------------------------------------------------------------------------------


def test_a_budget_that_is_too_small_is_refused_before_an_allocation() -> None:
    budget = reserved_bytes(GPU) + 2**20
    model = StreamingModel(make_net(), budget, device=GPU)
    image = torch.randn(1, 3, 2000, 2000)
    assert not model.plan((1, 3, 2000, 2000)).fits
    torch.cuda.reset_peak_memory_stats(GPU)
    before = torch.cuda.memory_allocated(GPU)
    with pytest.raises(PlanDoesNotFit, match="reserved"):
        model(image)
    # Not the image's 48 MB: the reader looks at what `preprocess` makes of one pixel.
    assert torch.cuda.max_memory_allocated(GPU) <= before + 2**16


@pytest.mark.parametrize("share", [0.1, 0.4, 0.6, 0.9])
def test_memory_refused_in_flight_leads_to_the_same_result(
    monkeypatch: pytest.MonkeyPatch, share: float
) -> None:
    budget = reserved_bytes(GPU) + GB
    image = torch.randn(SHAPE, dtype=torch.float64, device=GPU)
    net = make_net().double().to(GPU)
    with monkeypatch.context() as patch:
        counter = refuse(patch, 0, -1)
        expected = update(StreamingModel(copy.deepcopy(net), budget, tile=64), image)
    refuse(monkeypatch, budget, 1 + int(share * counter.calls))
    model = StreamingModel(net, budget, tile=64)
    found = update(model, image)
    assert model.last_report is not None
    assert model.last_report.num_retries == 1
    assert_same(found, expected, 1e-9)
    # It was the cap that refused: the card has room.
    torch.empty(budget, dtype=torch.uint8, device=GPU)


def test_when_the_smallest_tiles_are_refused_nothing_has_changed(monkeypatch: pytest.MonkeyPatch) -> None:
    budget = reserved_bytes(GPU) + GB
    net = make_net().to(GPU)
    before = {name: value.clone() for name, value in net.state_dict().items()}
    states = torch.get_rng_state(), torch.cuda.get_rng_state(GPU)
    refuse(monkeypatch, budget, 3, always=True)
    with pytest.raises(BudgetExceeded, match="there is no plan with smaller ones"):
        StreamingModel(net, budget, tile=64)(torch.randn(SHAPE, generator=torch.Generator()).to(GPU))
    assert all(torch.equal(net.state_dict()[name], value) for name, value in before.items())
    assert all(parameter.grad is None for parameter in net.parameters())
    assert torch.equal(torch.get_rng_state(), states[0])
    assert torch.equal(torch.cuda.get_rng_state(GPU), states[1])


def test_without_a_budget_a_plan_is_made_for_what_the_card_has() -> None:
    net = make_net().double().to(GPU)
    image = torch.randn(LARGE, dtype=torch.float64, device=GPU)
    expected = update(copy.deepcopy(net), image)
    model = StreamingModel(net)
    wanted = model.plan(LARGE, torch.float64)
    assert not wanted.limited_by
    room = held_with(model, 0.6)
    gauge = cuda_ceiling(GPU).gauge
    torch.cuda.empty_cache()
    with others_leave(room - gauge.overhead().nbytes - gauge.reserved()):
        assert "the memory of cuda:0 is" in model.plan(LARGE, torch.float64).limited_by
        found = update(model, image)
    report = model.last_report
    assert report is not None
    assert report.num_retries == 0
    assert report.projected_bytes <= (report.budget or 0) < wanted.projected_bytes
    assert_same(found, expected, 1e-9)
    later = model.plan(LARGE, torch.float64)
    assert (later.limited_by, later.phases) == ("", wanted.phases)
    torch.cuda.empty_cache()
    with others_leave(0), pytest.raises(PlanDoesNotFit, match="does not help: the memory of cuda:0 is"):
        model(image)


def test_without_a_budget_the_users_own_cap_is_planned_for() -> None:
    model = StreamingModel(make_net().double().to(GPU))
    image = torch.randn(LARGE, dtype=torch.float64, device=GPU)
    room = held_with(model, 0.6)
    before = torch.cuda.get_per_process_memory_fraction(GPU)
    gauge = cuda_ceiling(GPU).gauge
    torch.cuda.set_per_process_memory_fraction((room - gauge.overhead().nbytes) / gauge.total, GPU)
    try:
        update(model, image)
    finally:
        torch.cuda.set_per_process_memory_fraction(before, GPU)
    report = model.last_report
    assert report is not None
    assert report.num_retries == 0
    assert report.projected_bytes <= (report.budget or 0) <= room


def test_without_a_budget_refused_memory_leads_to_the_same_result(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    image = torch.randn(SHAPE, dtype=torch.float64, device=GPU)
    net = make_net().double().to(GPU)
    expected = update(copy.deepcopy(net), image)
    refuse(monkeypatch, 2 * cuda_ceiling(GPU).gauge.total, 3)
    model = StreamingModel(net)
    model.resident_tail = False
    found = update(model, image)
    report = model.last_report
    assert report is not None
    assert (report.budget, report.num_retries) == (None, 1)
    assert_same(found, expected, 1e-9)


def test_context_and_libraries_count(device_peak: DevicePeak) -> None:
    model = StreamingModel(make_net(), "3GB", tile=64, device=GPU)
    with device_peak.watched():
        update(model, torch.randn(SHAPE, device=GPU))
    report = model.last_report
    assert report is not None
    assert report.reading != "unknown"
    assert report.measured_bytes is not None
    assert report.measured_bytes > torch.cuda.max_memory_reserved(GPU) + 100 * 2**20
    assert report.measured_bytes <= report.projected_bytes
    assert report.samples


@pytest.mark.real
def test_resnet50_at_4000_pixels_under_11_gb(device_peak: DevicePeak) -> None:
    """Train-mode batch norm, forward and backward; plain PyTorch would need some 40 GB."""
    torch.manual_seed(0)
    model = StreamingModel(load_model("resnet50").train(), "11GB", device=GPU)
    image = torch.randn(1, 3, 4000, 4000)
    with device_peak.watched():
        loss = F.cross_entropy(model(image), torch.tensor([3], device=GPU))
        loss.backward()
    report = model.last_report
    assert report is not None
    assert torch.isfinite(loss)
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in model.parameters())
    assert device_peak.nbytes <= 11 * GB
    assert report.measured_bytes is not None
    assert report.measured_bytes <= report.projected_bytes <= 11 * GB
    assert report.num_retries == 0


def test_nvml_knows_the_device_that_pytorch_computes_on(device_peak: DevicePeak) -> None:
    gauge = cuda_ceiling(GPU).gauge
    torch.cuda.empty_cache()
    reserved = torch.cuda.memory_reserved(GPU)
    before = gauge.read()
    kept = torch.empty(GB, dtype=torch.uint8, device=GPU)
    after = gauge.read()
    assert before is not None
    assert after is not None
    # Part of it is in a segment that was there.
    taken = torch.cuda.memory_reserved(GPU) - reserved
    assert 0.9 * GB < taken <= after.nbytes - before.nbytes <= 1.01 * taken
    assert after.source is before.source
    assert abs(after.nbytes - device_peak.read()) < 0.2 * GB
    del kept


def test_the_cap_is_the_budget_less_overhead_and_margin() -> None:
    ceiling = cuda_ceiling(GPU)
    overhead = ceiling.gauge.overhead().nbytes
    with ceiling.limit(overhead + MARGIN_BYTES + GB):
        kept = torch.empty(9 * GB // 10, dtype=torch.uint8, device=GPU)
        with pytest.raises(torch.OutOfMemoryError):
            torch.empty(GB // 5, dtype=torch.uint8, device=GPU)
    del kept


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_the_device_of_the_model_is_the_one_that_is_capped(monkeypatch: pytest.MonkeyPatch) -> None:
    second = torch.device("cuda:1")
    seen: list[tuple[float, float]] = []

    def watched(evaluate: Evaluate) -> Tensor:
        seen.append(
            (torch.cuda.get_per_process_memory_fraction(0), torch.cuda.get_per_process_memory_fraction(1))
        )
        return evaluate()

    around_operators(monkeypatch, watched)
    before = torch.cuda.get_per_process_memory_fraction(0)
    update(StreamingModel(make_net(), "3GB", tile=64, device=second), torch.randn(SHAPE))
    assert {first for first, _ in seen} == {before}
    assert all(other < before for _, other in seen)


# --- results ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["resnet18", "efficientnet_b0", "convnextv2_atto"])
def test_streamed_is_plain_in_float64(name: str) -> None:
    torch.manual_seed(0)
    net = load_model(name).train().to(GPU)
    found = verify(net, (2, 3, 139, 127), tile=60)
    assert found.num_tiles > 1
    assert found.max_error < 1e-7, found.explain()


@pytest.mark.parametrize(
    "norm", [nn.BatchNorm2d(6, affine=False), nn.InstanceNorm2d(6), nn.GroupNorm(6, 6, affine=False)], ids=str
)
def test_norms_without_weights(norm: nn.Module) -> None:
    net = nn.Sequential(nn.Conv2d(3, 6, 3, bias=False), norm, nn.Conv2d(6, 2, 3))
    found = verify(net.to(GPU), (2, 3, 61, 53), tile=24)
    assert found.num_tiles > 1
    assert found.max_error < 1e-7, found.explain()


@pytest.mark.parametrize("tier", [Tier.HOST, Tier.DISK])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("overlaps", [False, True], ids=["at once", "overlapping"])
@pytest.mark.parametrize("tile", [32, (32, SHAPE[3])], ids=["squares", "bands"])
def test_stores_away_from_the_device(
    monkeypatch: pytest.MonkeyPatch,
    tier: Tier,
    memory_format: torch.memory_format,
    overlaps: bool,
    tile: int | tuple[int, int],
) -> None:
    shape = SHAPE if tile == 32 else (1, *SHAPE[1:])
    net = make_net().double().to(GPU, memory_format=memory_format)
    image = torch.randn(shape, dtype=torch.float64, device=GPU).to(memory_format=memory_format)
    expected = update(copy.deepcopy(net), image)
    away(monkeypatch, lambda name: tier, lambda part: overlaps)
    model = StreamingModel(net, "3GB", tile=tile)
    model.resident_tail = False
    # Again and again, since buffers that are reused too early show only now and then.
    for _ in range(5):
        net.zero_grad()
        net.load_state_dict(make_net().double().state_dict())
        assert_same(update(model, image), expected, 1e-10)
    assert {store.tier for store in model.plan(shape, torch.float64).stores.values()} == {tier}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(dtype: torch.dtype) -> None:
    net = make_net().to(GPU)
    image = torch.randn(SHAPE, device=GPU)
    with torch.autocast("cuda", dtype):
        expected = update(copy.deepcopy(net), image)
        found = update(StreamingModel(net, "3GB", tile=64), image)
    assert found["output"].dtype == expected["output"].dtype == dtype
    assert_same(found, expected, 5e-2)


@pytest.mark.real
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("casts", [False, True])
# Inductor advises to round float32 in products, and imports what is deprecated.
@pytest.mark.filterwarnings("ignore", "error:compile=True")
def test_compiled_parts(
    monkeypatch: pytest.MonkeyPatch, memory_format: torch.memory_format, casts: bool
) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    net = make_net().to(GPU, memory_format=memory_format)
    image = torch.randn(SHAPE, device=GPU).to(memory_format=memory_format)
    model, plain = StreamingModel(copy.deepcopy(net), "3GB", tile=(64, 131), compile=True), net
    model.resident_tail = False
    for _ in range(2):
        model.zero_grad()
        plain.zero_grad()
        with torch.autocast("cuda", torch.bfloat16, enabled=casts):
            assert_same(update(model, image), update(plain, image), 5e-2 if casts else 1e-3)
    assert model.last_report is not None
    assert model.last_report.num_compiled


@pytest.mark.real
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rates_are_those_of_a_card(dtype: torch.dtype) -> None:
    """Any card that there is, by wide margins: what is timed is its work and not that of asking for it."""
    found = measured_rates(GPU, dtype, "a card")
    # A product's operands are read from memory less often than it multiplies them.
    assert 2e12 < found.dense_flops < 5e15
    assert found.grouped_flops < found.dense_flops
    assert 2e11 < found.memory_bytes < 2e13
    assert 1e-6 < found.operator_seconds < 1e-3
    for rates in (found.read_bytes, found.write_bytes):
        assert 2e9 < rates[Tier.HOST] < rates[Tier.MEMORY]
    # The bus is as fast both ways.
    assert 0.4 < found.write_bytes[Tier.HOST] / found.read_bytes[Tier.HOST] < 2.5


def test_of_an_image_on_the_host_a_tile_is_pinned() -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1)).to(GPU)
    image = torch.randn(1, 3, 6000, 1000)
    model = StreamingModel(net, "3GB", tile=(100, 1000))
    model.resident_tail = False
    torch.cuda.memory.reset_peak_host_memory_stats()
    with torch.no_grad():
        model(image)
    # The next one's may be under way, each in a block of up to twice its size.
    most = torch.cuda.memory.host_memory_stats()["active_bytes.peak"]
    assert 0 < most < 8 * image.nbytes // 60


def test_an_image_on_the_host() -> None:
    net = make_net().double().to(GPU)
    image = torch.randn(SHAPE, dtype=torch.float64, requires_grad=True)
    on_device = image.detach().to(GPU).requires_grad_()
    expected = update(copy.deepcopy(net), on_device)
    assert_same(update(StreamingModel(net, "3GB", tile=64), image), expected, 1e-10)
    assert image.grad is not None
    assert on_device.grad is not None
    assert image.grad.device.type == "cpu"
    torch.testing.assert_close(image.grad, on_device.grad.cpu(), rtol=1e-9, atol=1e-12)


def test_dropout_is_the_same_for_every_tiling() -> None:
    net = nn.Sequential(make_net()[0], nn.Dropout(0.3), nn.Dropout2d(0.3), *make_net()[1:]).double().to(GPU)
    image = torch.randn(SHAPE, dtype=torch.float64, device=GPU)
    results = []
    for tile in (200, 48):
        torch.manual_seed(5)
        results.append(update(StreamingModel(copy.deepcopy(net), "3GB", tile=tile), image))
    assert_same(*results, 1e-10)


def test_inference_on_another_stream() -> None:
    net = make_net().double().eval().to(GPU)
    image = torch.randn(SHAPE, dtype=torch.float64, device=GPU)
    expected = net(image)
    stream = torch.cuda.Stream(GPU)
    stream.wait_stream(torch.cuda.current_stream(GPU))
    with torch.cuda.stream(stream), torch.no_grad():
        found = StreamingModel(net, "3GB", tile=64)(image)
    torch.cuda.current_stream(GPU).wait_stream(stream)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)


def test_rounding_leaves_the_cards_generator_as_it_is() -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.AdaptiveAvgPool2d(1)).cuda()
    state = torch.cuda.get_rng_state()
    found = rounding(net, (2, 3, 40, 36))
    assert max(found.values()) < 1e-6
    assert torch.equal(torch.cuda.get_rng_state(), state)
