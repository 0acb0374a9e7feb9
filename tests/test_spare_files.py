"""Files that maps on disk hand on: what is taken, what it costs the disk, and when they go."""

from __future__ import annotations

import copy
import gc
import os
import pickle
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from streamcnn import StreamingModel
from streamcnn.errors import CannotWrite
from streamcnn.stores import SpareFiles, ZarrStore


@pytest.fixture
def spares(tmp_path: Path) -> SpareFiles:
    return SpareFiles(tmp_path)


def keep(spares: SpareFiles, folder: Path, *sizes: int) -> None:
    """Have files of so many bytes used at once, and then be spare."""
    paths = {folder / f"used-{place}": nbytes for place, nbytes in enumerate(sizes)}
    for path, nbytes in paths.items():
        spares.take(path, nbytes)
        path.write_bytes(b"\x42" * nbytes)
    for path in paths:
        spares.keep(path)


def files(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file()]


class TestSpareFiles:
    def test_without_any_nothing_is_taken(self, spares: SpareFiles, tmp_path: Path) -> None:
        assert not spares.take(tmp_path / "new", 10)
        assert files(tmp_path) == []

    @pytest.mark.parametrize(
        ("wanted", "size", "left"),
        [(10, 10, 50), (11, 11, 40), (30, 30, 30), (31, 30, 29), (50, 30, 10), (60, 30, 0)],
    )
    def test_the_smallest_that_is_large_enough_or_else_the_largest(
        self, spares: SpareFiles, tmp_path: Path, wanted: int, size: int, left: int
    ) -> None:
        keep(spares, tmp_path, 20, 10, 30)
        assert spares.take(tmp_path / "new", wanted)
        assert (tmp_path / "new").stat().st_size == size
        assert spares.nbytes == left

    @given(st.lists(st.tuples(st.booleans(), st.integers(0, 9)), max_size=30))
    def test_the_disk_never_holds_more_than_files_in_use_did(self, steps: list[tuple[bool, int]]) -> None:
        """``steps`` begin a file of so many bytes, or end the one at that place."""
        with tempfile.TemporaryDirectory() as name:
            folder, used, most = Path(name), list[Path](), 0
            spares = SpareFiles(folder)
            for number, (begins, value) in enumerate(steps):
                if begins:
                    path = folder / str(number)
                    spares.take(path, value)
                    path.touch()
                    os.truncate(path, value)
                    used.append(path)
                elif used:
                    spares.keep(used.pop(value % len(used)))
                in_use = sum(path.stat().st_size for path in used)
                most = max(most, in_use)
                assert in_use + spares.nbytes <= most
                assert sum(path.stat().st_size for path in files(folder)) == in_use + spares.nbytes

    def test_files_that_somebody_else_removed_are_forgotten(self, spares: SpareFiles, tmp_path: Path) -> None:
        keep(spares, tmp_path, 20, 10)
        for folder in tmp_path.iterdir():
            shutil.rmtree(folder)
        assert spares.nbytes == 0
        assert not spares.take(tmp_path / "new", 10)
        (tmp_path / "new").write_bytes(b"\x42" * 10)
        spares.keep(tmp_path / "new")
        assert spares.nbytes == 10
        assert spares.take(tmp_path / "newer", 10)

    def test_they_go_when_closed_or_collected(self, tmp_path: Path) -> None:
        spares = SpareFiles(tmp_path)
        keep(spares, tmp_path, 10)
        spares.close()
        assert list(tmp_path.iterdir()) == []
        keep(spares, tmp_path, 10)
        del spares
        gc.collect()
        assert list(tmp_path.iterdir()) == []

    @pytest.mark.parametrize("copied", [copy.deepcopy, lambda spares: pickle.loads(pickle.dumps(spares))])
    def test_a_copy_has_none(
        self, spares: SpareFiles, tmp_path: Path, copied: Callable[[SpareFiles], SpareFiles]
    ) -> None:
        keep(spares, tmp_path, 10)
        assert not copied(spares).take(tmp_path / "new", 10)
        assert spares.nbytes == 10

    def test_a_forked_child_takes_none(self, spares: SpareFiles, tmp_path: Path) -> None:
        keep(spares, tmp_path, 10)
        child = os.fork()
        if child == 0:
            nbytes, taken = spares.nbytes, spares.take(tmp_path / "new", 10)
            spares.close()
            os._exit(nbytes + taken)
        assert os.waitpid(child, 0)[1] == 0
        assert spares.take(tmp_path / "new", 10)


@pytest.mark.usefixtures("on_disk")
class TestPasses:
    def make_model(self, spill: Path) -> StreamingModel:
        net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 2, 3), nn.BatchNorm2d(2))
        model = StreamingModel(net, tile=16, spill=spill)
        model.resident_tail = False
        return model

    def update(self, model: StreamingModel) -> None:
        model(torch.ones(1, 1, 40, 40)).sum().backward()

    def test_later_passes_take_earlier_ones_files(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        model = self.make_model(tmp_path)
        self.update(model)
        found = []
        make = ZarrStore.__init__

        def spy(store: ZarrStore, *args: object) -> None:
            make(store, *args)  # type: ignore[arg-type]
            found.append(store._is_new)

        monkeypatch.setattr(ZarrStore, "__init__", spy)
        self.update(model)
        assert len(found) == 6
        # One large file of the pass before stands where there are two small ones now.
        assert sum(found) == 1

    def test_release_leaves_no_files(self, tmp_path: Path) -> None:
        model = self.make_model(tmp_path)
        self.update(model)
        assert files(tmp_path)
        model.release()
        assert list(tmp_path.iterdir()) == []
        self.update(model)

    def test_a_collected_model_leaves_no_files(self, tmp_path: Path) -> None:
        model = self.make_model(tmp_path)
        self.update(model)
        del model
        gc.collect()
        assert list(tmp_path.iterdir()) == []

    def test_another_folder_gets_files_of_its_own(self, tmp_path: Path) -> None:
        model = self.make_model(tmp_path)
        self.update(model)
        (tmp_path / "other").mkdir()
        model.spill = tmp_path / "other"
        self.update(model)
        assert [path.name for path in tmp_path.iterdir()] == ["other"]

    def test_a_full_disk_is_left_as_it_was(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        model = self.make_model(tmp_path)
        self.update(model)

        def full(*args: object) -> None:
            raise CannotWrite("the disk is full")

        monkeypatch.setattr(ZarrStore, "_save", full)
        with pytest.raises(CannotWrite):
            self.update(model)
        assert list(tmp_path.iterdir()) == []
