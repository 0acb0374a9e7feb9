"""Spill folders of processes that were killed go when the next one starts; all others stay."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from streamcnn import StreamingModel
from streamcnn.runtime import pass_stores
from streamcnn.stores import SpillFolder, owners, remove_abandoned
from streamcnn.stores.owners import Owner

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="owners are told by Linux's /proc")

SCRIPT = """
import os, sys, time
from streamcnn.stores import SpillFolder
spill = SpillFolder(sys.argv[1])
spill.new_folder().mkdir()
(spill.path / "map").write_bytes(b"x" * 1000)
print(spill.path.name, flush=True)
{end}
"""


def start(parent: Path, end: str) -> tuple[subprocess.Popen[str], str]:
    """A process that spills, and its folder's name."""
    process = subprocess.Popen(
        [sys.executable, "-c", SCRIPT.format(end=end), str(parent)],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])},
    )
    assert process.stdout is not None
    with process.stdout as output:
        return process, output.readline().strip()


def names(parent: Path) -> set[str]:
    return {path.name for path in parent.iterdir()}


@pytest.mark.parametrize("end", ["os._exit(3)", "os.kill(os.getpid(), 9)"])
def test_the_next_start_removes_what_a_killed_process_left(tmp_path: Path, end: str) -> None:
    process, name = start(tmp_path, end)
    assert process.wait() != 0
    assert names(tmp_path) == {name}
    with SpillFolder(tmp_path) as spill:
        assert names(tmp_path) == {spill.path.name}


def test_a_zombies_folder_goes_and_a_living_processs_stays(tmp_path: Path) -> None:
    living, kept = start(tmp_path, "time.sleep(60)")
    dead, left = start(tmp_path, "time.sleep(60)")
    try:
        assert names(tmp_path) == {kept, left}
        dead.kill()
        # Ended, and still waited for by nobody.
        os.waitid(os.P_PID, dead.pid, os.WEXITED | os.WNOWAIT)
        remove_abandoned(tmp_path)
        assert names(tmp_path) == {kept}
    finally:
        for process in (living, dead):
            process.kill()
            process.wait()
    remove_abandoned(tmp_path)
    assert names(tmp_path) == set()


def test_a_number_that_is_another_processs_by_now_is_a_dead_owner(tmp_path: Path) -> None:
    present = Owner.present()
    assert present is not None
    again = tmp_path / f"streamcnn-{present.place}-{present.number}-{present.start - 1}-{'0' * 16}"
    mine = tmp_path / f"streamcnn-{present.place}-{present.number}-{present.start}-{'0' * 16}"
    for folder in (again, mine):
        folder.mkdir()
    remove_abandoned(tmp_path)
    assert names(tmp_path) == {mine.name}


def test_nothing_else_is_touched(tmp_path: Path) -> None:
    present = Owner.present()
    assert present is not None
    dead = f"{present.place}-{present.number}-{present.start - 1}"
    others = {
        "streamcnn-abcd1234",
        "streamcnn-profile-x",
        # Of another machine, another start of this one or another container.
        f"streamcnn-{'f' * 16}-{present.number}-{present.start - 1}-{'0' * 16}",
        f"streamcnn-{dead}-{'0' * 16}.zarr",
        f"mine-streamcnn-{dead}-{'0' * 16}",
    }
    for name in others:
        (tmp_path / name).mkdir()
    file, link = f"streamcnn-{dead}-{'1' * 16}", f"streamcnn-{dead}-{'2' * 16}"
    (tmp_path / file).write_text("keep")
    (tmp_path / link).symlink_to(tmp_path / "streamcnn-abcd1234")
    remove_abandoned(tmp_path)
    assert names(tmp_path) == {*others, file, link}


def test_another_users_folder_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    process, name = start(tmp_path, "os._exit(0)")
    process.wait()
    monkeypatch.setattr(os, "geteuid", lambda: os.getuid() + 1)
    remove_abandoned(tmp_path)
    assert names(tmp_path) == {name}


def test_what_cannot_be_removed_is_warned_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    process, name = start(tmp_path, "os._exit(0)")
    process.wait()

    def refuse(folder: Path) -> None:
        raise PermissionError(13, "Permission denied", str(folder))

    monkeypatch.setattr("shutil.rmtree", refuse)
    with pytest.warns(RuntimeWarning, match=f"{name} of a process that was killed cannot be removed"):
        remove_abandoned(tmp_path)


def test_without_proc_no_owner_is_known_and_nothing_goes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    process, name = start(tmp_path, "os._exit(0)")
    process.wait()
    monkeypatch.setattr(owners, "PROC", tmp_path / "missing")
    with SpillFolder(tmp_path) as spill:
        assert names(tmp_path) == {name, spill.path.name}
        assert Owner.of(spill.path.name) is None
    assert names(tmp_path) == {name}


@pytest.mark.usefixtures("on_disk")
def test_dead_folders_take_no_room_from_a_plan(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    process, name = start(tmp_path, "os._exit(0)")
    process.wait()
    # A disk that has room once the folder is gone.
    monkeypatch.setattr(pass_stores, "free_bytes", lambda spill: 0 if (tmp_path / name).exists() else 2**40)
    net = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.Conv2d(2, 2, 3))
    model = StreamingModel(net, tile=16, spill=tmp_path)
    model.resident_tail = False
    model(torch.ones(1, 1, 40, 40)).sum().backward()
    model.release()
    assert names(tmp_path) == set()
