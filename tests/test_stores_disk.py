"""Maps on disk: what is particular to their store, its files and their folder."""

from __future__ import annotations

import dataclasses
import gc
import itertools
import json
import os
import resource
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
import zarr
from hypothesis import given
from hypothesis import strategies as st
from store_cases import (
    HERE,
    NCHW,
    SPECS,
    TILE_HINT,
    assert_same,
    late,
    make_on_disk,
    random_tile,
    region,
    regions_of,
)

from streamcnn.errors import CannotWrite
from streamcnn.geometry.regions import Interval, Region
from streamcnn.stores import SpillFolder, StoreSpec, ZarrStore
from streamcnn.stores.strips import BLOCK_NBYTES, Strips


class TestZarrStore:
    @pytest.mark.parametrize("overlaps", [False, True])
    def test_on_a_gpu_tiles_come_in_the_layout_in_which_they_went(
        self, spill: SpillFolder, overlaps: bool
    ) -> None:
        """A card's kernels for channels that lie beside each other are many times as fast."""
        where, part = region(3, 30, 2, 31), region(5, 28, 7, 30)
        for order in (torch.channels_last, torch.contiguous_format):
            store = make_on_disk(spill, late(overlaps=overlaps), NCHW)
            tile = random_tile(NCHW, where).contiguous(memory_format=order)
            store.write(where, tile)
            store.add(where, tile)
            found = store.read(part)
            assert_same(found, (2 * tile)[:, :, 2:-2, 5:-1])
            assert found.is_contiguous(memory_format=order)

    @pytest.mark.parametrize("spec", SPECS, ids=str)
    def test_zarr_reads_the_folder(self, spill: SpillFolder, spec: StoreSpec) -> None:
        folder = spill.new_folder()
        store = ZarrStore(spec, folder, TILE_HINT, HERE)
        where = region(7, 55, 13, 47)
        store.write(where, random_tile(spec, where))
        array = torch.from_numpy(zarr.open_array(folder, mode="r")[...])
        whole = Region.whole(spec.size)
        assert_same(array.view(spec.dtype) if spec.dtype == torch.bfloat16 else array, store.read(whole))

    def test_what_was_never_written_takes_no_room(self, spill: SpillFolder) -> None:
        spec = dataclasses.replace(NCHW, shape=(1, 8, 4000, 1000))
        store = ZarrStore(spec, spill.new_folder(), (4000, 1000), HERE)
        where = region(1000, 1001, 0, 1000)
        store.write(where, random_tile(spec, where))
        assert_same(store.read(region(990, 1000, 0, 1000)), torch.zeros(1, 8, 10, 1000))
        file = spill.path / "map-000000" / "c.0.0.0.0"
        assert file.stat().st_size > spec.nbytes
        assert file.stat().st_blocks * 512 < 2**20

    def test_close_leaves_no_files(self, spill: SpillFolder) -> None:
        store = make_on_disk(spill, HERE, NCHW)
        store.write(region(0, 61, 0, 47), random_tile(NCHW, region(0, 61, 0, 47)))
        store.close()
        assert list(spill.path.iterdir()) == []

    def test_garbage_leaves_no_files(self, spill: SpillFolder) -> None:
        store = make_on_disk(spill, HERE, NCHW)
        store.write(region(0, 9, 0, 9), random_tile(NCHW, region(0, 9, 0, 9)))
        del store
        gc.collect()
        assert list(spill.path.iterdir()) == []

    def test_a_folder_in_use_is_refused(self, tmp_path: Path) -> None:
        (tmp_path / "mine").write_text("keep")
        with pytest.raises(FileExistsError):
            ZarrStore(NCHW, tmp_path, TILE_HINT, HERE)
        gc.collect()
        assert (tmp_path / "mine").read_text() == "keep"

    def test_a_folder_that_cannot_be_made_is_one_error(self, tmp_path: Path) -> None:
        with pytest.raises(CannotWrite, match="File name too long"):
            ZarrStore(NCHW, tmp_path / ("x" * 300), TILE_HINT, HERE)

    def test_a_type_zarr_lacks_is_refused(self, spill: SpillFolder) -> None:
        with pytest.raises(
            ValueError, match=r"complex32 cannot be kept on disk; possible are torch\.float64"
        ):
            make_on_disk(spill, HERE, dataclasses.replace(NCHW, dtype=torch.complex32))

    def test_a_shortened_file_is_an_error(self, spill: SpillFolder) -> None:
        store, where = make_on_disk(spill, HERE, NCHW), region(0, 20, 0, 10)
        store.write(where, random_tile(NCHW, where))
        os.truncate(spill.path / "map-000000" / "c.0.0.0.0", 100)
        with pytest.raises(OSError, match="bytes early"):
            store.read(where)

    def test_a_refused_write_propagates_and_can_be_repeated(self, spill: SpillFolder) -> None:
        store, where = make_on_disk(spill, HERE, NCHW), region(0, 20, 0, 10)
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
        try:
            with pytest.raises(OSError, match="too large"):
                store.add(where, random_tile(NCHW, where))
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        store.add(where, random_tile(NCHW, where))
        assert_same(store.read(where), random_tile(NCHW, where))

    def test_reader_and_writer_may_share_strips(self, spill: SpillFolder) -> None:
        store, mine, other = make_on_disk(spill, HERE, NCHW), region(0, 61, 0, 23), region(0, 61, 23, 47)
        expected = random_tile(NCHW, mine)
        store.write(mine, expected)

        def write_beside() -> None:
            for seed in range(40):
                store.write(other, random_tile(NCHW, other, seed))

        writer = threading.Thread(target=write_beside)
        writer.start()
        while writer.is_alive():
            assert_same(store.read(mine), expected)
        writer.join()
        assert_same(store.read(other), random_tile(NCHW, other, 39))


class TestStrips:
    @pytest.mark.parametrize(
        ("shape", "axes", "tile", "strip"),
        [
            ((1, 64, 4000, 4000), (2, 3), (256, 256), (1, 64, 4000, 32)),
            ((1, 4000, 4000, 64), (1, 2), (256, 256), (1, 4000, 32, 64)),
            ((2, 16, 4000, 4000), (2, 3), (1024, 1024), (2, 16, 4000, 64)),
            ((1, 64, 4000, 4000), (2, 3), (16, 4000), (1, 64, 4000, 4000)),
            ((4, 2048, 125, 125), (2, 3), (16, 125), (4, 2048, 125, 32)),
            ((1, 3, 7, 5), (2, 3), (256, 256), (1, 3, 7, 5)),
        ],
    )
    def test_strips_suit_maps_and_tiles(
        self, shape: tuple[int, ...], axes: tuple[int, int], tile: tuple[int, int], strip: tuple[int, ...]
    ) -> None:
        assert Strips.suited(StoreSpec(shape, torch.float32, axes), tile).shape == strip

    @given(
        shape=st.tuples(*[st.integers(1, 3000)] * 4),
        tile=st.tuples(st.integers(1, 2000), st.integers(1, 2000)),
        data=st.data(),
    )
    def test_blocks_cover_a_region_once_and_are_small(
        self, shape: tuple[int, ...], tile: tuple[int, int], data: st.DataObject
    ) -> None:
        # A block may have a single position, so that a larger region may have millions of them.
        self.assert_covered(shape, tile, data.draw(regions_of(shape[2:], most=60)))

    @pytest.mark.parametrize(
        ("shape", "tile"),
        [
            ((1, 64, 3000, 2999), (256, 300)),
            ((3, 5, 2999, 3000), (2000, 1)),
            ((1, 1, 3000, 3000), (2000, 2000)),
            ((7, 2900, 1, 3000), (1, 2000)),
            ((3000, 1, 2998, 9), (11, 1999)),
        ],
    )
    def test_blocks_cover_a_large_map_once_and_are_small(
        self, shape: tuple[int, ...], tile: tuple[int, int]
    ) -> None:
        height, width = shape[2:]
        self.assert_covered(shape, tile, Region(Interval(0, height), Interval(0, width)))
        self.assert_covered(shape, tile, Region(Interval(height // 3, height), Interval(width // 3, width)))

    def assert_covered(self, shape: tuple[int, ...], tile: tuple[int, int], inside: Region) -> None:
        strips = Strips.suited(StoreSpec(shape, torch.float64, (2, 3)), tile)
        rows, cols = (Interval(start, start + 1) for start in (shape[2] - 1, shape[3] - 1))
        blocks = list(strips.blocks(inside))
        assert sum(block.part.rows.size * block.part.cols.size for block in blocks) == (
            inside.rows.size * inside.cols.size
        )
        assert all(inside.contains(block.part) and block.covered.contains(block.part) for block in blocks)
        ends = sorted((block.offset, block.offset + strips.block_nbytes(block)) for block in blocks)
        assert all(stop <= start for (_, stop), (start, _) in itertools.pairwise(ends))
        # One position of all channels is never divided.
        largest = max(BLOCK_NBYTES, shape[0] * shape[1] * 8)
        assert all(strips.block_nbytes(block) <= largest for block in blocks)
        (last,) = strips.blocks(Region(rows, cols))
        assert last.offset + strips.row_nbytes == strips.count * strips.nbytes


class TestSpillFolder:
    def test_removes_only_what_it_made(self, tmp_path: Path) -> None:
        (tmp_path / "mine").write_text("keep")
        spill = SpillFolder(tmp_path)
        stores = [make_on_disk(spill, HERE, NCHW) for _ in range(2)]
        spill.close()
        spill.close()
        stores[0].close()
        assert [path.name for path in tmp_path.iterdir()] == ["mine"]
        with pytest.raises(ValueError, match="is closed"):
            spill.new_folder()

    def test_garbage_leaves_no_files(self, tmp_path: Path) -> None:
        spill = SpillFolder(tmp_path)
        spill.new_folder().mkdir()
        del spill
        gc.collect()
        assert list(tmp_path.iterdir()) == []

    def test_a_forked_childs_end_removes_nothing(self, spill: SpillFolder) -> None:
        child = os.fork()
        if child == 0:
            spill.close()
            os._exit(0)
        os.waitpid(child, 0)
        assert spill.path.exists()

    @pytest.mark.parametrize("end", ["", "raise SystemExit(3)", "raise RuntimeError('stop')"])
    def test_the_interpreters_end_leaves_no_files(self, tmp_path: Path, end: str) -> None:
        script = f"""
import json
from streamcnn.stores import SpillFolder
spill = SpillFolder({str(tmp_path)!r})
spill.new_folder().mkdir()
print(json.dumps(spill.path.exists()), flush=True)
{end}
"""
        run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
        assert json.loads(run.stdout) is True
        assert list(tmp_path.iterdir()) == []
