"""What devices answer when a plan is made, and that nothing else knows it."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path

import pytest
import torch
from torch import nn

import streamcnn
from streamcnn import StreamingModel
from streamcnn.ceiling.kept_blocks import kept_blocks_available
from streamcnn.graph.costs import CallBytes, Cost, cost_of
from streamcnn.plan.hardware import NOMINAL
from streamcnn.plan.level_bytes import HeldBytes, Ints, LevelBytes
from streamcnn.plan.plan import Plan
from streamcnn.plan.storage import MemoryTerm, Tier
from streamcnn.planning.backends import Backend, CpuBackend, CudaBackend, Fragmentation
from streamcnn.planning.spec import Machine, OffloadTier
from streamcnn.runtime.machines import backend_of, cuda_card

aten = torch.ops.aten

SHAPE = (1, 3, 900, 800)
OF_A_CPU = re.compile(
    r"\bheap|_heap|glibc|C library|allocator waste|oneDNN|MKL|blocked|compiled|address space"
    r"|buffers of matrix products",
    re.I,
)
OF_ANY_LIBRARY = re.compile(rf"{OF_A_CPU.pattern}|cuDNN|cuBLAS|NVML|caching allocator", re.I)


def make_net() -> nn.Module:
    torch.manual_seed(0)
    layers = [nn.Conv2d(16 if i else 3, 16, 3, padding=1) for i in range(4)]
    body = (module for conv in layers for module in (conv, nn.BatchNorm2d(16), nn.ReLU()))
    return nn.Sequential(*body, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 3))


def plan_with(
    backend: Backend, budget: int | None, *, reserved: int = 0, shape: tuple[int, int, int, int] = SHAPE
) -> Plan:
    """The plan of a small network on a CPU's nominal rates."""
    machine = Machine(NOMINAL["cpu"], (OffloadTier(Tier.DISK),), reserved, backend)
    return StreamingModel(make_net(), budget).plan_for(machine, shape)


def terms_of(plan: Plan) -> dict[str, int]:
    return {term.name: term.nbytes for term in plan.terms}


# With room for all, and where maps have to be offloaded.
@pytest.mark.parametrize("budget", ["2GB", "1.1GB"])
def test_a_plan_for_a_card_has_no_terms_of_a_cpu(budget: str) -> None:
    net = make_net()
    machine = cuda_card(net, host_bytes=10**9, optimizer_copies=2)
    plan = StreamingModel(net, budget).plan_for(machine, SHAPE)
    assert plan.fits
    assert OF_A_CPU.search(plan.explain()) is None
    assert OF_A_CPU.search(plan.to_json()) is None
    assert plan.reuses_blocks is None
    terms = terms_of(plan)
    assert terms["rounding and fragmentation of the caching allocator"] > 0
    assert terms["reserved (context, libraries, weights, optimiser)"] == machine.reserved


def test_a_plan_for_a_cpu_says_whether_freed_blocks_are_kept() -> None:
    ample, tight = (plan_with(CpuBackend.on(2), budget) for budget in (2 * 10**9, 12 * 10**7))
    assert (ample.reuses_blocks, tight.reuses_blocks) == (True, False)
    assert json.loads(ample.to_json())["reuses_blocks"] is True
    assert terms_of(ample)["allocator waste"] > 0


def test_where_blocks_are_kept_the_plan_leaves_room_for_what_is_no_tensor() -> None:
    keeping = CpuBackend.on(2, keeps_blocks=True)
    plan = plan_with(keeping, 12 * 10**7)
    terms = terms_of(plan)
    beside = sum(nbytes for name, nbytes in terms.items() if name in keeping.beside_tensors)
    beside += terms["reserved for the run time"]
    assert plan.reuses_blocks is None
    assert plan.kept_bytes is not None
    assert max(plan.kept_bytes.values()) <= 12 * 10**7 - terms["reserved for the run time"]
    assert 12 * 10**7 - beside - terms["allocator waste"] in plan.kept_bytes.values()
    told = json.loads(plan.to_json())["kept_bytes"]
    assert told == {f"{kind} {level}": nbytes for (kind, level), nbytes in plan.kept_bytes.items()}
    assert {("forward", phase.level) for phase in plan.phases} < plan.kept_bytes.keys()
    assert plan_with(CpuBackend.on(2), 12 * 10**7).kept_bytes is None
    # Without a budget, what the plan takes and some for holes.
    ample = plan_with(keeping, None)
    assert ample.kept_bytes is not None
    assert max(ample.kept_bytes.values()) <= 1.25 * ample.projected_bytes
    # Memory is lost to whole pages alone, whatever is stored where.
    assert terms["allocator waste"] < 0.03 * plan.projected_bytes
    assert plan.projected_seconds <= plan_with(CpuBackend.on(2), 12 * 10**7).projected_seconds


def test_a_card_is_charged_no_less_than_a_cpu_without_libraries() -> None:
    """With the same preferences, so that it has the same plan."""
    bare = CpuBackend(kernel_bytes=0, code_bytes=0, matrix_bytes=0, fuses_attention=True)
    alike = CudaBackend(prefers_bands=False, overlaps=False, runs_ahead=False, fuses_norms=False)
    for budget in (None, 2 * 10**9, 15 * 10**7):
        host, card = plan_with(bare, budget), plan_with(alike, budget)
        assert card.projected_bytes == host.projected_bytes


def test_a_card_cuts_maps_into_bands_rather_than_squares() -> None:
    grids = []
    for backend in (CudaBackend(prefers_bands=False, overlaps=False), CudaBackend(overlaps=False)):
        plan = plan_with(backend, 3 * 10**8, shape=(1, 3, 7200, 800))
        assert plan.fits
        # The first two phases read the image, of which a map is computed again.
        grids.append([(len(phase.rows), len(phase.cols)) for phase in plan.phases[2:]])
    host, card = grids
    assert any(cols > 1 for _, cols in host)
    assert all(cols == 1 for _, cols in card)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Abacus(Backend):
    """A device that nobody has."""

    runtime_bytes: int = 1000
    reusable_bytes: int = 0
    keeping: Fragmentation = Fragmentation(fixed=11)  # noqa: RUF009
    returning: Fragmentation = Fragmentation(step_percent=50)  # noqa: RUF009
    fragmentation: str = "lost beads"
    has_choice: bool = False
    fuses_attention: bool = True
    prefers_bands: bool = False

    def workspace(self, cost: Cost, nbytes: CallBytes) -> int:
        return 0

    def step_terms(self, num_kernels: int, num_products: int) -> tuple[MemoryTerm, ...]:
        return (MemoryTerm("rods", 10**6 * num_kernels),)

    def kept(self, num_kernels: Ints, *, training: bool) -> HeldBytes:
        beads, strings = num_kernels.cumsum(), 10 * num_kernels.cumsum()
        held = LevelBytes.of(len(beads), ("beads", beads), ("strings", strings))
        return HeldBytes(held, held, held)


def test_planning_takes_any_backend() -> None:
    plan = plan_with(Abacus(), None)
    terms = terms_of(plan)
    assert terms["reserved for the run time"] == 1000
    assert terms["lost beads"] == 11
    assert terms["strings"] == 10 * terms["beads"] > 0
    assert terms["rods"] % 10**6 == 0
    assert OF_ANY_LIBRARY.search(plan.explain()) is None


def test_of_what_the_backend_is_told_by_the_device() -> None:
    assert isinstance(backend_of(torch.device("cuda")), CudaBackend)
    for device, keeps_blocks in (("cpu", kept_blocks_available()), ("mps", False)):
        expected = CpuBackend.on(torch.get_num_threads(), keeps_blocks=keeps_blocks)
        assert backend_of(torch.device(device)) == expected


@pytest.mark.parametrize("room", ["plan", "planning", "execution"])
def test_no_other_module_of_a_room_names_a_library(room: str) -> None:
    # What `compile=True` asks for is named after what it does.
    allowed = ("planning/backends/", "execution/compile")
    folder = Path(streamcnn.__file__).parent
    found = [
        f"{path.relative_to(folder)}: {line}"
        for path in sorted((folder / room).rglob("*.py"))
        for line in path.read_text().splitlines()
        if OF_ANY_LIBRARY.search(line) and not any(each in f"{path.as_posix()} {line}" for each in allowed)
    ]
    assert found == []


def test_products_in_half_precision_count_copies_where_the_processor_has_no_arithmetic_of_theirs() -> None:
    native, converting = (
        CpuBackend(kernel_bytes=0, code_bytes=0, matrix_bytes=0, converts_halves=each)
        for each in (False, True)
    )
    for target, itemsize, copied in ((aten.linear, 2, 2 * 111), (aten.linear, 4, 0), (aten.relu, 2, 0)):
        cost, nbytes = cost_of(target.default), CallBytes(100, 10, 1, itemsize)
        assert converting.workspace(cost, nbytes) == native.workspace(cost, nbytes) + copied
        both = (each.backward_workspace(cost, nbytes) for each in (converting, native))
        assert next(both) == next(both) + copied
