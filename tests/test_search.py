"""The planner's search against all there is to choose from, on networks small enough for that."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch
from helpers import traced
from torch import nn

from streamcnn.graph.program import Program
from streamcnn.plan.hardware import NOMINAL, HardwareProfile
from streamcnn.plan.plan import PassPart
from streamcnn.plan.reading import NO_READING, BatchCost, ReadingCost
from streamcnn.plan.storage import Tier
from streamcnn.plan.stored_bytes import StoredBytes
from streamcnn.planning import candidates, memory_model
from streamcnn.planning.backends import Backend, CpuBackend
from streamcnn.planning.candidates import TilingCandidates
from streamcnn.planning.cost_model import MapTraffic, Tiers
from streamcnn.planning.global_bytes import GlobalBytes
from streamcnn.planning.memory_model import PeakPoint, peak_points
from streamcnn.planning.overlapping import MovedTiles, overlapped
from streamcnn.planning.search import Search, Solution
from streamcnn.planning.spec import OffloadTier
from streamcnn.planning.staging import Staging, divide, drop, gathered, is_differentiated, recompute

SHAPE = (1, 3, 250, 230)
MIB = 2**20
CPU = NOMINAL["cpu"]
BACKEND = CpuBackend.on(1)
OVERLAPPING = replace(BACKEND, overlaps=True)
SLOW_DISK = replace(
    CPU,
    source="a slow disk",
    read_bytes={**CPU.read_bytes, Tier.DISK: 2e7},
    write_bytes={**CPU.write_bytes, Tier.DISK: 1e7},
)
FAST_DISK = replace(
    SLOW_DISK,
    source="a fast disk",
    read_bytes={**CPU.read_bytes, Tier.DISK: 1e12},
    write_bytes={**CPU.write_bytes, Tier.DISK: 1e12},
)


def normalised(*widths: int, train: bool = True) -> nn.Module:
    """Convolutions with batch norm, the last one pooled."""
    layers: list[nn.Module] = []
    for before, after in itertools.pairwise((3, *widths)):
        layers += [nn.Conv2d(before, after, 3, padding=1), nn.BatchNorm2d(after), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1)).train(train)


class Skips(nn.Module):
    """A map that two phases read, one far from the other."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Conv2d(3, 12, 3, padding=1), nn.BatchNorm2d(12), nn.ReLU())
        self.second = nn.Sequential(nn.Conv2d(12, 12, 1), nn.BatchNorm2d(12), nn.ReLU())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Means of a gated sum, (N, 12)."""
        x = self.first(x)
        return (x + self.second(x)).mean((2, 3))


NETS: dict[str, Callable[[], nn.Module]] = {
    "two convolutions": lambda: normalised(12, 8),
    "three convolutions": lambda: normalised(10, 12, 6),
    "a skip": Skips,
    "wide convolutions": lambda: normalised(16, 16, 4),
}
SMALL = [name for name in NETS if name != "wide convolutions"]
"""Small enough for all there is to choose from to be tried."""


@cache
def traced_net(name: str) -> tuple[Program, frozenset[str]]:
    return traced(NETS[name](), SHAPE)


def searching(
    name: str,
    budget: int | None,
    hardware: HardwareProfile,
    backend: Backend = BACKEND,
    *,
    room: int | None = None,
) -> Search:
    program, wanted = traced_net(name)
    tilings = TilingCandidates(program, wanted, hardware, None, backend)
    return Search(tilings, budget, (OffloadTier(Tier.DISK, room),))


def on_disk(found: Solution) -> int:
    """Bytes that are on disk at one time."""
    return StoredBytes(found.stores, found.staging.levels, Tier.DISK).most


def stagings(search: Search) -> Iterator[Staging]:
    """Every choice of stored maps, and of those that are dropped between the passes."""
    program = search.program
    full = divide(program)
    free = full.stored - gathered(program)
    for recomputed in subsets(free):
        staging = full
        for name in sorted(recomputed):
            staging = recompute(program, staging, name)
        for dropped in subsets(staging.stored):
            yield drop(
                program,
                staging,
                dropped,
                lambda stage: is_differentiated(stage, search.tilings.differentiated),
            )


def subsets(names: Iterable[str]) -> list[tuple[str, ...]]:
    """All subsets, sorted."""
    ordered = sorted(names)
    return [each for count in range(len(ordered) + 1) for each in itertools.combinations(ordered, count)]


def projections(search: Search, staging: Staging) -> Iterator[tuple[int, float]]:
    """Bytes and seconds of every choice of stores, tiles and allocator for a staging.

    Where the device moves tiles beside others, both with and without that.
    """
    hardware, backend = search.tilings.hardware, search.tilings.backend
    # What nothing hides: the device's own memory is read and written, and somebody asks for that.
    never_hidden = replace(
        hardware,
        read_bytes={Tier.DISK: hardware.read_bytes[Tier.MEMORY]},
        write_bytes={Tier.DISK: hardware.write_bytes[Tier.MEMORY]},
        transfer_seconds={Tier.DISK: max(hardware.transfer_seconds.values())},
    )
    global_bytes = GlobalBytes(search.program, staging, search.tilings.differentiated, backend)
    again = staging.rematerialised
    ways = [search.tilings.of(stage) for stage in (*staging.stages, *(each.stage for each in again))]
    table = search.table(staging)
    names = sorted(staging.stored)
    dropped = {name for each in again for name in each.stage.stored}
    everywhere: list[Tiers] = [
        (Tier.MEMORY, Tier.MEMORY),
        (Tier.DISK, Tier.MEMORY),
        (Tier.DISK, Tier.DISK),
    ]
    for chosen_tiers in itertools.product(everywhere, repeat=len(names)):
        tiers = dict(zip(names, chosen_tiers, strict=True))
        if any(tiers[name][0] is Tier.DISK for name in dropped):
            continue
        stores = table.stores(tiers)
        stored = StoredBytes(stores, staging.levels)
        timed = []
        for row, tilings in zip(table.rows, ways, strict=True):
            timed.append([])
            for tiling in tilings:
                moves = [*row.outputs.items(), *tiling.moved.items()]
                near = sum(seconds_in(Tier.MEMORY, each, tiers[n], hardware) for n, each in moves)
                away = sum(seconds_in(Tier.DISK, each, tiers[n], hardware) for n, each in moves)
                asked = sum(seconds_in(Tier.DISK, each, tiers[n], never_hidden) for n, each in moves)
                timed[-1].append((tiling, near, away, asked))
        for chosen in itertools.product(*timed):
            is_offloaded = any(tier is Tier.DISK for tier, _ in chosen_tiers)
            tiled = [tiling.tiled for tiling, *_ in chosen]
            first = tiled[: len(staging.stages)]
            again_tiled = [
                (each.before, stage) for each, stage in zip(again, tiled[len(first) :], strict=True)
            ]
            for reuses_blocks, overlaps in itertools.product(
                (False,) if is_offloaded else (True, False),
                (True, False) if backend.overlaps and is_offloaded else (False,),
            ):
                points = peak_points(
                    first,
                    global_bytes,
                    stored,
                    rematerialised=again_tiled,
                    moving=MovedTiles(first, again_tiled, stores).beside if overlaps else {},
                    reuses_blocks=reuses_blocks,
                )
                nbytes = max(point.nbytes for point in points)
                seconds = 0.0
                for tiling, beside, aside, never in chosen:
                    fresh = 0 if reuses_blocks else tiling.time.fresh_seconds
                    computing = tiling.time.seconds + fresh + beside
                    hides = overlaps and tiling.tiled.num_tiles > 1
                    seconds += max(computing + never, aside) if hides else computing + aside
                yield nbytes, seconds


def seconds_in(tier: Tier, moved: MapTraffic, tiers: Tiers, hardware: HardwareProfile) -> float:
    """Time in the stores of one tier."""
    both = zip((moved.values, moved.gradient), tiers, strict=True)
    return sum(traffic.seconds(hardware, tier) for traffic, each in both if each is tier)


def found_by(search: Search) -> Solution:
    return search.improved(search.best([divide(search.program)]))


DECODED = BatchCost((ReadingCost((SHAPE[2], SHAPE[3]), held=10**6, opening=3 * 10**7, pixel=12),))
"""Images that are decoded whole, which takes more than anything after it."""


@pytest.mark.parametrize("budget", [None, 10**9, 8 * 10**7, 10**6])
@pytest.mark.parametrize("reading", [NO_READING, DECODED], ids=["in memory", "decoded"])
@pytest.mark.parametrize("backend", [BACKEND, OVERLAPPING], ids=["at once", "overlapping"])
@pytest.mark.parametrize("name", NETS)
def test_the_search_weighs_what_the_terms_of_the_worst_point_add_up_to(
    name: str, reading: BatchCost, budget: int | None, backend: Backend
) -> None:
    program, wanted = traced_net(name)
    tilings = TilingCandidates(program, wanted, CPU, None, backend, reading=reading)
    search = Search(tilings, budget, (OffloadTier(Tier.DISK),))
    found = found_by(search)

    def points_with(moving: Mapping[PassPart, int]) -> list[PeakPoint]:
        return peak_points(
            found.tiled,
            search.global_bytes(found.staging),
            StoredBytes(found.stores, found.staging.levels),
            rematerialised=found.rematerialised,
            moving=moving,
            reuses_blocks=found.reuses_blocks,
        )

    moved = MovedTiles(found.tiled, found.rematerialised, found.stores).beside if found.overlaps else {}
    points = points_with(moved)
    if found.fits:
        assert overlapped(points_with({}), moved, backend, budget) == moved.keys()
    assert max(point.nbytes for point in points) == found.nbytes
    assert (points[0].name == "the first read") == bool(reading.opening)


@pytest.mark.parametrize("backend", [BACKEND, OVERLAPPING], ids=["at once", "overlapping"])
@pytest.mark.parametrize("hardware", [CPU, SLOW_DISK], ids=["nominal", "slow disk"])
@pytest.mark.parametrize("name", SMALL)
def test_the_search_comes_within_5_percent_of_the_best(
    monkeypatch: pytest.MonkeyPatch, name: str, hardware: HardwareProfile, backend: Backend
) -> None:
    # There are as many choices as there are ways to combine all stages' tiles.
    if name == "three convolutions":
        monkeypatch.setattr(candidates, "TILE_EDGES", (64,))
        monkeypatch.setattr(candidates, "FEW_BANDS", ())
    # Choices that have a stage's tiles in common have its steps in common.
    monkeypatch.setattr(memory_model, "steps", cache(memory_model.steps))
    everything = searching(name, None, hardware, backend)
    all_of_them = [each for staging in stagings(everything) for each in projections(everything, staging)]
    smallest, largest = min(n for n, _ in all_of_them), max(n for n, _ in all_of_them)
    gaps = []
    for share in (0.02, 0.1, 0.25, 0.5, 0.8):
        budget = int(smallest + share * (largest - smallest))
        best = min(seconds for nbytes, seconds in all_of_them if nbytes <= budget)
        found = found_by(searching(name, budget, hardware, backend))
        assert found.fits
        gaps.append(found.seconds / best)
    assert max(gaps) <= 1.05, gaps
    assert min(gaps) >= 1 - 1e-9, gaps


@pytest.mark.parametrize("backend", [BACKEND, OVERLAPPING], ids=["at once", "overlapping"])
@pytest.mark.parametrize("name", NETS)
def test_without_a_ceiling_it_finds_what_it_finds_below_a_high_one(name: str, backend: Backend) -> None:
    def choice(budget: int | None) -> tuple[Any, ...]:
        found = found_by(searching(name, budget, CPU, backend))
        tiles = [tiling.tiled.num_tiles for tiling in found.tilings]
        return found.policies, found.reuses_blocks, found.overlaps, found.seconds, found.nbytes, tiles

    assert choice(None) == choice(2**60)


def test_a_map_is_computed_again_where_the_disk_is_slow() -> None:
    name = "a skip"
    smallest = found_by(searching(name, MIB, SLOW_DISK)).nbytes
    # A phase that computes maps again compiles more code.
    slow = found_by(searching(name, smallest + 8 * MIB, SLOW_DISK))
    fast = found_by(searching(name, smallest + 8 * MIB, FAST_DISK))
    assert slow.fits
    assert fast.fits
    assert len(slow.stores) < len(fast.stores)


def test_maps_on_disk_are_moved_at_the_rate_of_ram_as_long_as_it_takes_them() -> None:
    name = "a skip"
    program, wanted = traced_net(name)
    hardware = replace(CPU, write_bytes={**CPU.write_bytes, Tier.DISK: 2e8}, buffered_write_bytes=1e9)
    tilings = TilingCandidates(program, wanted, hardware, None, BACKEND)
    smallest = found_by(searching(name, MIB, hardware)).nbytes
    budget = smallest + MIB

    def found_with(buffered: int) -> Solution:
        return found_by(Search(tilings, budget, (OffloadTier(Tier.DISK, buffered=buffered),)))

    never, always = found_with(0), found_with(2**40)
    fast = replace(hardware, write_bytes={**CPU.write_bytes, Tier.DISK: 1e9})
    assert always.seconds == found_by(searching(name, budget, fast)).seconds
    assert never.seconds == found_by(searching(name, budget, hardware)).seconds
    on_disk = sum((s.tier, s.gradient_tier).count(Tier.DISK) * s.nbytes for s in always.stores.values())
    assert found_with(on_disk).seconds == always.seconds < never.seconds
    # Beyond it, what is more waits for the disk.
    seconds = [found_with(on_disk * share // 8).seconds for share in range(9)]
    assert seconds == sorted(seconds, reverse=True)
    assert len(set(seconds)) > 2


@pytest.mark.parametrize("name", SMALL)
def test_the_smallest_budget_named_is_enough_and_one_byte_less_is_not(name: str) -> None:
    refused = found_by(searching(name, MIB, CPU))
    assert not refused.fits
    assert found_by(searching(name, refused.nbytes, CPU)).fits
    assert not found_by(searching(name, refused.nbytes - 1, CPU)).fits


# timm asks for a deprecated annotation when it is imported.
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_budget_named_as_enough_is_enough_where_kernels_of_many_shapes_are_kept() -> None:
    timm = pytest.importorskip("timm")
    program, wanted = traced(timm.create_model("resnet18"), (1, 3, 4000, 4000))
    tilings = TilingCandidates(program, wanted, CPU, None, BACKEND)

    def found_with(budget: int) -> Solution:
        return found_by(Search(tilings, budget, (OffloadTier(Tier.DISK),)))

    refused = [found_with(budget * MIB) for budget in (20, 100)]
    assert not any(each.fits for each in refused)
    assert len({each.nbytes for each in refused}) == 1
    assert found_with(refused[0].nbytes).fits


@pytest.mark.parametrize("name", NETS)
def test_what_finds_no_room_on_disk_is_computed_again(name: str) -> None:
    budget = found_by(searching(name, MIB, FAST_DISK)).nbytes + 8 * MIB
    anywhere = found_by(searching(name, budget, FAST_DISK))
    needed = on_disk(anywhere)
    assert needed
    rooms = [needed * part // 8 for part in range(8, -1, -1)]
    found = [found_by(searching(name, budget, FAST_DISK, room=room)) for room in rooms]
    assert found[0].policies == anywhere.policies
    assert all(each.fits for each in found)
    for room, each in zip(rooms, found, strict=True):
        assert (each.excess == 0) == (on_disk(each) <= room)
        # From half of it on, tiles that compute all between two maps may take more than the budget.
        assert each.excess == 0 or room < needed // 2
    for more, less in itertools.pairwise(each.seconds for each in found if not each.excess):
        assert more <= 1.05 * less


@pytest.mark.parametrize("name", SMALL)
def test_more_memory_is_never_slower(name: str) -> None:
    smallest = found_by(searching(name, MIB, CPU)).nbytes
    seconds = [found_by(searching(name, smallest * factor // 10, CPU)).seconds for factor in range(10, 60, 8)]
    for less, more in itertools.pairwise(seconds):
        assert more <= 1.05 * less


# timm asks for a deprecated annotation when it is imported.
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_pairs_of_maps_find_faster_plans(monkeypatch: pytest.MonkeyPatch) -> None:
    timm = pytest.importorskip("timm")
    program, wanted = traced(timm.create_model("mobilenetv3_large_100"), (1, 3, 1000, 1000))
    tilings = TilingCandidates(program, wanted, CPU, None, BACKEND)

    def seconds() -> list[float]:
        searches = [Search(tilings, budget * MIB, (OffloadTier(Tier.DISK),)) for budget in (150, 180, 200)]
        return [found_by(search).seconds for search in searches]

    in_pairs = seconds()
    monkeypatch.setattr(Search, "_moved_in_pairs", lambda self, found: found)
    gains = [1 - after / before for before, after in zip(seconds(), in_pairs, strict=True)]
    assert min(gains) >= 0
    assert max(gains) > 0.001, gains
