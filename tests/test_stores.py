"""One contract for all stores, and what is particular to those in memory."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
from collections.abc import Callable
from functools import partial
from typing import Any
from unittest.mock import patch

import pytest
import torch
from copy_engines import LateCopies
from hypothesis import given, settings
from hypothesis import strategies as st
from store_cases import (
    CPU,
    HERE,
    NCHW,
    SPECS,
    assert_same,
    at,
    late,
    make_on_disk,
    make_on_host,
    make_on_used_disk,
    random_tile,
    region,
    regions_of,
)
from torch import Tensor

from streamcnn.geometry.regions import Region
from streamcnn.stores import (
    GpuTransfers,
    HostStore,
    MemoryStore,
    SpareFiles,
    SparePinned,
    SpillFolder,
    Store,
    StoreSpec,
    ZarrStore,
    memory,
    transfers_of,
)
from streamcnn.stores.transfers import few_pieces, pieces


def computed(store: Store, tile: Tensor) -> Tensor:
    """``tile`` where a pass has its tiles."""
    if isinstance(store, MemoryStore):
        return tile.to(store._device)
    assert isinstance(store, (HostStore, ZarrStore))
    return tile.to(store._transfers.compute_device)


CUDA = torch.device("cuda")
MakeStore = Callable[[StoreSpec], Store]


class KeepingStore(MemoryStore):
    """A store that may keep every tile that it is given, and on a device where it does."""

    def write(self, region: Region, tile: Tensor, *, may_keep: bool = True) -> None:
        with patch.object(memory, "_keeps_tiles", lambda device, zeroed: True):
            super().write(region, tile, may_keep=may_keep)

    def add(self, region: Region, tile: Tensor, *, may_keep: bool = True) -> None:
        with patch.object(memory, "_keeps_tiles", lambda device, zeroed: True):
            super().add(region, tile, may_keep=may_keep)


@pytest.fixture(
    params=[
        "memory",
        "unzeroed",
        "memory, tiles kept",
        "host",
        "host, overlapping",
        "host, not pinned",
        "disk",
        "used disk",
        "disk, overlapping",
        "used disk, overlapping",
        pytest.param("device", marks=pytest.mark.gpu),
        pytest.param("pinned", marks=pytest.mark.gpu),
        pytest.param("disk to device", marks=pytest.mark.gpu),
    ]
)
def make_store(request: pytest.FixtureRequest, spill: SpillFolder) -> MakeStore:
    makers: dict[str, MakeStore] = {
        "memory": lambda spec: MemoryStore(spec, CPU),
        "unzeroed": lambda spec: MemoryStore(spec, CPU, zeroed=False),
        "memory, tiles kept": lambda spec: KeepingStore(spec, CPU),
        "host": partial(make_on_host, late()),
        "host, overlapping": partial(make_on_host, late(overlaps=True)),
        "host, not pinned": partial(make_on_host, late(pins=False, overlaps=True)),
        "disk": partial(make_on_disk, spill, HERE),
        "used disk": partial(make_on_used_disk, spill, HERE),
        "disk, overlapping": partial(make_on_disk, spill, late(overlaps=True)),
        "used disk, overlapping": partial(make_on_used_disk, spill, late(overlaps=True)),
        "device": lambda spec: MemoryStore(spec, CUDA),
        "pinned": lambda spec: make_on_host(_gpu_transfers(), spec),
        "disk to device": lambda spec: make_on_disk(spill, _gpu_transfers(), spec),
    }
    return makers[request.param]


def _gpu_transfers() -> GpuTransfers:
    transfers = transfers_of(CUDA)
    assert isinstance(transfers, GpuTransfers)
    return transfers


@pytest.mark.parametrize("spec", SPECS, ids=str)
class TestContract:
    def test_never_written_reads_as_zero(self, make_store: MakeStore, spec: StoreSpec) -> None:
        store = make_store(spec)
        for inside in (region(10, 33, 5, 40), region(13, 61, 0, 47)):
            assert_same(store.read(inside), torch.zeros(spec.tile_shape(inside), dtype=spec.dtype))
            store.write(region(12, 13, 6, 7), computed(store, random_tile(spec, region(12, 13, 6, 7))))

    def test_tiles_cover_the_map(self, make_store: MakeStore, spec: StoreSpec) -> None:
        store, whole = make_store(spec), Region.whole(spec.size)
        expected = random_tile(spec, whole)
        for top in range(0, 61, 24):
            for left in range(0, 47, 20):
                tile = region(top, min(top + 24, 61), left, min(left + 20, 47))
                store.write(tile, computed(store, expected[at(spec, tile)]))
        assert_same(store.read(whole), expected)
        with_halo = region(23, 49, 19, 41)
        assert_same(store.read(with_halo), expected[at(spec, with_halo)])

    def test_write_replaces_and_add_accumulates(self, make_store: MakeStore, spec: StoreSpec) -> None:
        store, expected = make_store(spec), torch.zeros(spec.shape, dtype=spec.dtype)
        first, second = region(3, 50, 2, 31), region(20, 61, 15, 47)
        for seed, where in enumerate((first, second, first)):
            tile = random_tile(spec, where, seed)
            store.add(where, computed(store, tile))
            expected[at(spec, where)] += tile
        assert_same(store.read(Region.whole(spec.size)), expected)
        replacement = random_tile(spec, second, 7)
        store.write(second, computed(store, replacement))
        expected[at(spec, second)] = replacement
        assert_same(store.read(Region.whole(spec.size)), expected)

    def test_tiles_of_another_type_are_converted(self, make_store: MakeStore, spec: StoreSpec) -> None:
        store, where = make_store(spec), region(1, 30, 4, 46)
        tile = random_tile(dataclasses.replace(spec, dtype=torch.float64), where)
        store.write(where, computed(store, tile))
        store.add(where, computed(store, tile.half()))
        assert_same(store.read(where), tile.to(spec.dtype) + tile.half().to(spec.dtype))

    def test_tiles_may_have_any_strides_and_gradients(self, make_store: MakeStore, spec: StoreSpec) -> None:
        store, where = make_store(spec), region(0, 25, 22, 47)
        tile = random_tile(spec, where).transpose(1, 3).contiguous().transpose(1, 3)
        tile = computed(store, tile).requires_grad_()
        store.write(where, tile)
        store.add(where, tile)
        read = store.read(where)
        assert not read.requires_grad
        assert_same(read, tile.detach().cpu() * 2)

    def test_bytes_are_counted(self, make_store: MakeStore, spec: StoreSpec) -> None:
        store, where = make_store(spec), region(5, 12, 30, 41)
        nbytes = 2 * 3 * 7 * 11 * spec.dtype.itemsize
        store.write(where, computed(store, random_tile(spec, where)))
        store.add(where, computed(store, random_tile(spec, where)))
        store.read(where)
        assert (store.bytes_read, store.bytes_written) == (2 * nbytes, 2 * nbytes)

    def test_use_after_close_raises(self, make_store: MakeStore, spec: StoreSpec) -> None:
        store, where = make_store(spec), region(0, 2, 0, 2)
        store.write(where, random_tile(spec, where))
        store.close()
        store.close()
        with pytest.raises(ValueError, match="is closed"):
            store.read(where)
        for change in (store.write, store.add):
            with pytest.raises(ValueError, match="is closed"):
                change(where, random_tile(spec, where))

    def test_wrong_regions_and_tiles_are_refused(self, make_store: MakeStore, spec: StoreSpec) -> None:
        store, where = make_store(spec), region(0, 62, 0, 2)
        with pytest.raises(AssertionError, match="is not inside"):
            store.read(where)
        with pytest.raises(AssertionError, match="expected"):
            store.write(region(0, 4, 0, 2), random_tile(spec, region(0, 1, 0, 2)))


@st.composite
def histories(draw: st.DrawFn) -> tuple[StoreSpec, tuple[int, int], list[tuple[str, Region]]]:
    """A map, a tile hint and what is done to it."""
    spec = draw(st.sampled_from(SPECS))
    hint = (draw(st.integers(1, 70)), draw(st.integers(1, 200)))
    step = st.tuples(st.sampled_from(["write", "add", "read"]), regions_of(spec.size))
    return spec, hint, draw(st.lists(step, max_size=12))


def assert_like_dense(store: Store, steps: list[tuple[str, Region]]) -> None:
    """Run ``steps`` on the store and on a plain tensor."""
    spec = store.spec
    dense = torch.zeros(spec.shape, dtype=spec.dtype)
    for seed, (action, where) in enumerate(steps):
        index, tile = at(spec, where), random_tile(spec, where, seed)
        if action == "write":
            store.write(where, tile)
            dense[index] = tile
        elif action == "add":
            store.add(where, tile)
            dense[index] += tile
        else:
            assert_same(store.read(where), dense[index])
    assert_same(store.read(Region.whole(spec.size)), dense)


def full_of(value: int, make: Callable[..., Tensor] = torch.empty) -> Callable[..., Tensor]:
    """``torch.empty`` with something in it, as memory that was used before."""
    return lambda *sizes, **options: make(*sizes, **options).fill_(value)


EMPTY = [dataclasses.replace(NCHW, shape=shape) for shape in ((2, 0, 61, 47), (0, 3, 61, 47), (2, 3, 0, 47))]


@pytest.mark.parametrize("spec", EMPTY, ids=str)
def test_a_map_may_have_no_elements(make_store: MakeStore, spec: StoreSpec) -> None:
    store, whole = make_store(spec), Region.whole(spec.size)
    tile = computed(store, random_tile(spec, whole))
    assert store.read(whole).shape == tile.shape
    store.write(whole, tile)
    store.add(whole, tile)
    assert store.read(whole).shape == tile.shape


@settings(max_examples=60, deadline=None)
@given(histories())
def test_any_history_is_a_dense_tensors(history: tuple[Any, ...]) -> None:
    spec, hint, steps = history
    assert_like_dense(MemoryStore(spec, CPU), steps)
    with patch("torch.empty", full_of(7)):
        assert_like_dense(MemoryStore(spec, CPU, zeroed=False), steps)
    assert_like_dense(KeepingStore(spec, CPU), steps)
    for overlaps, pins in itertools.product((False, True), repeat=2):
        transfers = late(pins=pins, overlaps=overlaps)
        with contextlib.closing(make_on_host(transfers, spec)) as store:
            assert_like_dense(store, steps)
        with SpillFolder() as spill:
            assert_like_dense(ZarrStore(spec, spill.new_folder(), hint, transfers), steps)
    with SpillFolder() as spill:
        assert_like_dense(ZarrStore(spec, spill.new_folder(), hint, HERE), steps)
        spares = SpareFiles(spill.path)
        for used in (b"", b"\x42" * 100, b"\x42" * 2**20):
            path = spill.new_folder()
            path.write_bytes(used)
            spares.keep(path)
            with contextlib.closing(ZarrStore(spec, spill.new_folder(), hint, HERE, spares)) as store:
                assert_like_dense(store, steps)


class TestMemoryStore:
    def test_reading_where_it_lives_copies_nothing(self) -> None:
        store = MemoryStore(NCHW, CPU)
        store.write(region(0, 9, 0, 9), random_tile(NCHW, region(0, 9, 0, 9)))
        view, again = store.read(region(2, 5, 3, 7)), store.read(region(2, 5, 3, 7))
        assert view.data_ptr() == again.data_ptr()
        assert store.read(region(0, 1, 0, 1)).data_ptr() % 64 == 0

    @pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
    def test_a_map_is_laid_out_as_its_first_tile(
        self, memory_format: torch.memory_format, dtype: torch.dtype
    ) -> None:
        spec = dataclasses.replace(NCHW, dtype=dtype)
        inside, whole = region(5, 40, 7, 30), Region.whole(NCHW.size)
        tile = random_tile(spec, whole).to(memory_format=memory_format)[at(spec, inside)]
        for fill in (MemoryStore.write, MemoryStore.add):
            store = MemoryStore(spec, CPU)
            fill(store, inside, tile)
            assert store.read(whole).is_contiguous(memory_format=memory_format)
            assert_same(store.read(inside), tile)

    def test_a_tile_that_is_written_and_kept_is_not_changed(self) -> None:
        whole, inside = Region.whole(NCHW.size), region(1, 9, 2, 8)
        tile, other = random_tile(NCHW, whole), random_tile(NCHW, whole, 1)
        before = tile.clone()
        for change in (
            lambda store: store.add(whole, other),
            lambda store: store.add(inside, other[at(NCHW, inside)]),
            lambda store: store.write(inside, other[at(NCHW, inside)]),
        ):
            store = KeepingStore(NCHW, CPU)
            store.write(whole, tile)
            assert store.read(whole).data_ptr() == tile.data_ptr()
            change(store)
            assert_same(tile, before)

    def test_what_is_added_to_a_gradient_that_is_kept_takes_no_memory(self) -> None:
        whole, inside = Region.whole(NCHW.size), region(1, 9, 2, 8)
        tile = random_tile(NCHW, whole)
        place, expected = tile.data_ptr(), tile.clone()
        store = KeepingStore(NCHW, CPU)
        store.add(whole, tile)
        store.add(inside, random_tile(NCHW, inside))
        expected[at(NCHW, inside)] += random_tile(NCHW, inside)
        assert store.read(whole).data_ptr() == place
        assert_same(store.read(whole), expected)

    def test_a_tile_is_kept_only_if_it_may_be_and_is_the_whole_map(self) -> None:
        whole, inside = Region.whole(NCHW.size), region(0, 61, 0, 46)
        larger = random_tile(dataclasses.replace(NCHW, shape=(2, 4, 61, 47)), whole)
        cases: list[tuple[Region, Tensor, bool]] = [
            (whole, random_tile(NCHW, whole), False),
            (inside, random_tile(NCHW, inside), True),
            (whole, larger[:, :3], True),
            (whole, random_tile(NCHW, whole).double(), True),
            (whole, torch.zeros(()).expand(NCHW.shape), True),
        ]
        for where, tile, may_keep in cases:
            store = KeepingStore(NCHW, CPU)
            store.write(where, tile, may_keep=may_keep)
            assert store.read(where).untyped_storage().data_ptr() != tile.untyped_storage().data_ptr()
        store = MemoryStore(NCHW, CPU)
        tile = random_tile(NCHW, whole)
        store.write(whole, tile, may_keep=True)
        assert store.read(whole).data_ptr() != tile.data_ptr(), "host memory keeps a tile's place in the heap"


class TestStoresAwayFromTheDevice:
    @pytest.mark.parametrize("make", [make_on_host, lambda transfers, spec: None], ids=["host", "disk"])
    def test_a_tile_that_may_change_is_taken_as_it_was(
        self, spill: SpillFolder, make: Callable[[GpuTransfers, StoreSpec], Store | None]
    ) -> None:
        transfers, where = late(overlaps=True), region(3, 20, 0, 47)
        store = make(transfers, NCHW) or make_on_disk(spill, transfers, NCHW)
        tile = random_tile(NCHW, where)
        expected = tile.clone()
        store.write(where, tile)
        store.add(where, tile)
        tile.zero_()
        assert_same(store.read(where), 2 * expected)

    def test_memory_is_handed_on_when_no_copy_reads_it_any_more(self) -> None:
        transfers, spares, where = late(overlaps=True), SparePinned(), region(3, 20, 0, 47)
        first, second = HostStore(NCHW, transfers, spares), HostStore(NCHW, transfers, spares)
        expected = random_tile(NCHW, where)
        first.write(where, expected)
        incoming = first.reserve(where)
        incoming.fetch()
        first.close()
        place = spares._spare[0].memory.data_ptr()
        second.write(where, random_tile(NCHW, where, 1))
        assert second._block is not None
        assert second._block.memory.data_ptr() == place
        assert_same(second.read(where), random_tile(NCHW, where, 1))
        assert_same(incoming.tile(), expected)

    def test_a_tile_on_its_way_to_a_closed_store_does_not_come_to_another_map(self) -> None:
        transfers, spares, whole = late(pins=False, overlaps=True), SparePinned(), Region.whole(NCHW.size)
        first, second = HostStore(NCHW, transfers, spares), HostStore(NCHW, transfers, spares)
        first.write(whole, random_tile(NCHW, whole))
        first.close()
        transfers.overlaps = False
        second.write(whole, random_tile(NCHW, whole, 1))
        transfers.finish()
        assert_same(second.read(whole), random_tile(NCHW, whole, 1))

    def test_reading_waits_for_no_tile_of_another_region(self) -> None:
        transfers, spares = late(overlaps=True), SparePinned()
        store, rows = HostStore(NCHW, transfers, spares), [region(0, 9, 0, 47), region(9, 20, 0, 47)]
        for where in rows:
            store.write(where, random_tile(NCHW, where), may_keep=True)
        engine: Any = transfers.engine
        assert engine.num_settled == 0
        assert_same(store.read(rows[0]), random_tile(NCHW, rows[0]))
        assert (engine.num_settled, engine.num_open) == (1, 1)
        assert_same(store.read(rows[1]), random_tile(NCHW, rows[1]))
        assert (engine.num_settled, engine.num_open) == (2, 0)

    def test_a_band_of_rows_is_one_copy_and_an_awkward_region_goes_by_way_of_a_buffer(self) -> None:
        spec = dataclasses.replace(NCHW, shape=(1, 3, 200, 47))
        whole = random_tile(spec, Region.whole(spec.size)).to(memory_format=torch.channels_last)
        band, column = region(3, 190, 0, 47), region(3, 190, 5, 20)
        for where in (band, column):
            engine = LateCopies()
            store = make_on_host(GpuTransfers(engine), spec)
            store.write(Region.whole(spec.size), whole)
            engine.num_brought = 0
            assert_same(store.read(where), whole[at(spec, where)])
            assert engine.num_brought == 1
            if where == band:
                assert store._map is not None
                assert store._map.is_contiguous(memory_format=torch.channels_last)

    @pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
    def test_few_pieces_are_copied_as_they_lie(self, memory_format: torch.memory_format) -> None:
        view = torch.empty(2, 4, 200, 60).to(memory_format=memory_format)[:, :, 10:150]
        assert few_pieces(view)
        copies = pieces(torch.empty_like(view), view)
        assert len(copies) == (2 if memory_format is torch.channels_last else 8)
        assert not few_pieces(view[..., 5:])
        # As many of them, each large enough.
        assert few_pieces(torch.empty(1, 1, 70, 2**18)[..., : 2**16])

    def test_a_conjugate_is_taken_as_what_it_stands_for(self) -> None:
        spec = dataclasses.replace(NCHW, dtype=torch.complex64)
        transfers, whole = late(overlaps=True), Region.whole(spec.size)
        store = make_on_host(transfers, spec)
        tile = random_tile(spec, whole)
        store.write(whole, tile.conj())
        store.add(whole, tile.conj())
        assert_same(store.read(whole), (2 * tile.conj()).resolve_conj())
