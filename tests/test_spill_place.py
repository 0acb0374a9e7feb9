"""Where maps are spilled to: a disk, and not a folder that lies in memory itself."""

from __future__ import annotations

import os
import tempfile
import warnings
from pathlib import Path

import pytest
import torch
from torch import nn

from streamcnn import StreamingModel
from streamcnn.plan.storage import Tier
from streamcnn.stores import SpillFolder, free_bytes, spill, spill_place
from streamcnn.support.disk import lies_in_memory

SHAPE = (1, 3, 300, 300)
IN_MEMORY = Path("/dev/shm")

needs_memory = pytest.mark.skipif(
    not IN_MEMORY.is_dir() or not lies_in_memory(IN_MEMORY), reason="no file system in memory"
)


def make_net() -> nn.Module:
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.Conv2d(16, 16, 3), nn.BatchNorm2d(16)]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1))


def spilling(folder: Path | None) -> StreamingModel:
    """A model whose budget has no room for its maps."""
    model = StreamingModel(make_net(), "64MiB", spill=folder)
    model.budget = model.plan(SHAPE).projected_bytes * 2 // 3
    assert model.plan(SHAPE).bytes_on(Tier.DISK)
    return model


@pytest.fixture
def usual(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """The system's temporary folder, as the environment does not name it."""
    for name in ("TMPDIR", "TEMP", "TMP"):
        monkeypatch.delenv(name, raising=False)
    folder = tmp_path / "usual"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    return folder


@pytest.fixture
def other(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """The system's other temporary folder."""
    folder = tmp_path / "other"
    folder.mkdir()
    monkeypatch.setattr(spill, "_ON_DISK", folder)
    return folder


def pretend(monkeypatch: pytest.MonkeyPatch, *folders: Path) -> None:
    """Have these folders lie in memory, and no others."""
    monkeypatch.setattr(spill, "lies_in_memory", lambda folder: folder in folders)


def test_a_folder_on_disk_is_used_as_it_is(
    monkeypatch: pytest.MonkeyPatch, usual: Path, other: Path, tmp_path: Path
) -> None:
    pretend(monkeypatch)
    assert spill_place(None) == usual
    assert spill_place(tmp_path) == tmp_path


def test_where_the_usual_one_lies_in_memory_it_is_the_other(
    monkeypatch: pytest.MonkeyPatch, usual: Path, other: Path
) -> None:
    pretend(monkeypatch, usual)
    with SpillFolder() as folder:
        assert folder.path.parent == other
    assert spill_place(usual) == usual
    assert free_bytes(None) > 0


@pytest.mark.parametrize("obstacle", ["named", "in memory too", "missing", "a file"])
def test_the_usual_one_stays_where_the_other_is_no_better(
    monkeypatch: pytest.MonkeyPatch, usual: Path, other: Path, obstacle: str
) -> None:
    pretend(monkeypatch, usual, *([other] if obstacle == "in memory too" else []))
    if obstacle == "named":
        monkeypatch.setenv("TMPDIR", str(usual))
    elif obstacle in ("missing", "a file"):
        other.rmdir()
    if obstacle == "a file":
        other.write_text("")
    assert spill_place(None) == usual


def test_a_file_system_is_told_by_its_device(tmp_path: Path) -> None:
    device = tmp_path.stat().st_dev
    number = f"{os.major(device)}:{os.minor(device)}"
    mounts = tmp_path / "mountinfo"
    for kind, fields, expected in (
        ("tmpfs", "shared:5", True),
        ("ramfs", "", True),
        ("tmpfs", "shared:5 master:1", True),
        ("ext4", "", False),
        ("fuse.tmpfs", "", False),
    ):
        mounts.write_text(
            "20 1 0:999999 / / rw - overlay overlay rw\n"
            f"21 20 {number} / /some\\040where rw,nosuid {fields} - {kind} none rw\n"
        )
        assert lies_in_memory(tmp_path, mounts) is expected
    mounts.write_text("20 1 0:999999 / / rw - tmpfs none rw\nno such line\n")
    assert not lies_in_memory(tmp_path, mounts)
    assert not lies_in_memory(tmp_path, tmp_path / "missing")
    assert not lies_in_memory(tmp_path / "missing", mounts)


@needs_memory
def test_a_named_folder_in_memory_is_used_and_told_of_once() -> None:
    with tempfile.TemporaryDirectory(dir=IN_MEMORY) as folder:
        model = spilling(Path(folder))
        with pytest.warns(
            UserWarning, match=f"spilled to {folder}, which lies in memory itself: up to .* there"
        ):
            model(torch.rand(SHAPE)).sum().backward()
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            model(torch.rand(SHAPE)).sum().backward()
        model.release()


def test_nothing_is_told_of_a_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if lies_in_memory(tmp_path):
        pytest.skip("temporary folders lie in memory")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        spilling(tmp_path)(torch.rand(SHAPE)).sum().backward()
