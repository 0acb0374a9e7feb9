"""Disks that are full: one error, nothing half written, and what was there before is as it was."""

from __future__ import annotations

import errno
import os
import re
import resource
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from training_runs import log_without_times

from streamcnn.data.convert import convert
from streamcnn.data.image_files import find_images
from streamcnn.data.tile_store import TileStore
from streamcnn.errors import CannotWrite, DatasetMismatch
from streamcnn.geometry.regions import Region
from streamcnn.stores import PlainTransfers, StoreSpec, ZarrStore
from streamcnn.support.disk import writing
from streamcnn.support.units import format_bytes
from streamcnn.training.checkpoint_file import load_checkpoint
from streamcnn.training.checkpoints import CheckpointFolder
from streamcnn.training.log import LOG, RunLog, read_log

Run = Callable[..., tuple[int, str, str]]

UPDATE = {"seconds": 1.0, "megapixels_per_second": 1.0, "measured_bytes": None, "projected_bytes": None}


@contextmanager
def files_of_at_most(nbytes: int) -> Iterator[None]:
    """Writing more than so many bytes into a file fails, for whoever it is."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (nbytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 2 MiB; only root can have one."""
    place = tmp_path / "disk"
    place.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(place)]
    try:
        made = subprocess.run(command, capture_output=True, text=True)
    except FileNotFoundError:
        pytest.skip("there is no mount here")
    if made.returncode:
        pytest.skip(f"a disk cannot be mounted here: {made.stderr.strip()}")
    yield place
    subprocess.run(["umount", str(place)], check=True)


def left(folder: Path) -> list[str]:
    return [str(path) for path in folder.rglob("*partial*")]


# --- checkpoints and logs --------------------------------------------------------------------------------


@pytest.mark.parametrize("nbytes", [400_000, 900_000, 999_999])
def test_a_checkpoint_without_room_leaves_the_one_before(tmp_path: Path, nbytes: int) -> None:
    checkpoints = CheckpointFolder(tmp_path)
    state = {"weight": torch.zeros(250_000)}
    first = checkpoints.save(state, 1)
    before = sorted(tmp_path.iterdir())
    with files_of_at_most(nbytes), pytest.raises(CannotWrite) as caught:
        checkpoints.save(state, 2)
    assert str(caught.value) == (
        f"cannot write {tmp_path}/save-000002-update-00000002.pt: it would be larger than a file may be "
        "(File too large): 977 KiB needed, raise the limit, as with `ulimit -f`. The checkpoint before it, "
        f"{first.name}, is as it was"
    )
    assert sorted(tmp_path.iterdir()) == before
    assert torch.equal(load_checkpoint(first)["weight"], state["weight"])


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_is_named_with_what_is_free(tmp_path: Path, number: int) -> None:
    text = (
        rf"the disk at /\S* is full \({os.strerror(number)}\): 2.00 KiB needed, \S+ .iB free; make room there"
    )
    with pytest.raises(CannotWrite, match=text) as caught, writing(tmp_path / "a", needed=2048):
        raise OSError(number, os.strerror(number))
    assert caught.value.errno == number


def test_a_checkpoint_on_a_full_disk_leaves_the_one_before(disk: Path) -> None:
    checkpoints = CheckpointFolder(disk)
    state = {"weight": torch.ones(300_000)}
    first = checkpoints.save(state, 1)
    before = sorted(disk.iterdir())
    with pytest.raises(CannotWrite) as caught:
        checkpoints.save(state, 2)
    found = re.fullmatch(
        rf"cannot write {disk}/save-000002-update-00000002\.pt: the disk at {disk} is full \(No space left "
        r"on device\): 1\.14 MiB needed, (\d+) KiB free; make room there and give the same command again\. "
        rf"The checkpoint before it, {first.name}, is as it was",
        str(caught.value),
    )
    assert found is not None, caught.value
    assert 700 < int(found[1]) < 900
    assert sorted(disk.iterdir()) == before
    assert torch.equal(load_checkpoint(first)["weight"], state["weight"])


def test_a_line_of_the_log_is_written_whole_or_not_at_all(tmp_path: Path) -> None:
    with RunLog(tmp_path) as log:
        log.write("update", {**UPDATE, "text": "a" * 30_000}, 1)
        with files_of_at_most(50_000), pytest.raises(CannotWrite, match=LOG):
            log.write("update", {**UPDATE, "text": "b" * 30_000}, 2)
        assert log.flush() == (tmp_path / LOG).stat().st_size
    assert [line["update"] for line in read_log(tmp_path)] == [1]


def test_a_log_on_a_full_disk_keeps_its_whole_lines(disk: Path) -> None:
    count = 0

    def fill(log: RunLog) -> None:
        nonlocal count
        while True:
            log.write("update", {**UPDATE, "text": "a" * 30_000}, count + 1)
            count += 1

    with RunLog(disk) as log, pytest.raises(CannotWrite, match=rf"{LOG}: the disk at {disk} is full"):
        fill(log)
    assert [line["update"] for line in read_log(disk)] == list(range(1, count + 1))
    assert count > 60


WIDE = """
from torch import nn

def wide():
    return nn.Sequential(
        nn.Conv2d(3, 200, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(200, 200), nn.Linear(200, 2)
    )
"""


def test_a_run_on_a_full_disk_goes_on_when_there_is_room(
    disk: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    images = disk.parent / "images"
    for split in ("train", "val"):
        for name, value in (("bright", 200), ("dark", 50)):
            (images / split / name).mkdir(parents=True)
            Image.fromarray(np.full((16, 12, 3), value, np.uint8)).save(images / split / name / "a.png")
    (disk.parent / "wide_factories.py").write_text(WIDE)
    monkeypatch.syspath_prepend(disk.parent)
    folder = disk / "run"

    def train(folder: Path) -> tuple[int, str, str]:
        options = ("--validation-split=val", "--epochs=4", "--save-every=1", "--batch=2", "--tile=16x12")
        return run("train", "wide_factories:wide", images, f"--out={folder}", *options)

    status, _, err = train(folder)
    assert status == 1
    assert re.fullmatch(
        rf"streamcnn: error: cannot write {folder}/checkpoints/save-\d+-update-\d+\.pt: the disk at {disk} "
        r"is full \(No space left on device\): 5\d\d KiB needed, \d+ KiB free; make room there and give the "
        r"same command again\. The checkpoint before it, save-\d+-update-\d+\.pt, is as it was\n",
        err,
    ), err
    assert (left(folder), (folder / "run.pid").exists()) == ([], False)
    assert CheckpointFolder(folder / "checkpoints").newest() is not None
    subprocess.run(["mount", "-o", "remount,size=20m", str(disk)], check=True)
    assert train(folder)[::2] == (0, "")
    assert train(disk.parent / "whole")[::2] == (0, "")
    assert log_without_times(folder) == log_without_times(disk.parent / "whole")


def test_a_report_on_a_full_disk_is_one_error(disk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from streamcnn.training import report

    monkeypatch.setattr(report, "read_run", lambda folder: _NoData())
    monkeypatch.setattr(report, "read_log", lambda folder: [])
    monkeypatch.setattr(report, "render_report", lambda *_: "é" * 2**20)
    (disk / report.REPORT).write_text("before")
    with pytest.raises(CannotWrite, match=r"report\.html: the disk .*: 2\.00 MiB needed, 2\.00 MiB free"):
        report.write_report(disk)
    assert (os.listdir(disk), (disk / report.REPORT).read_text()) == ([report.REPORT], "before")


class _NoData:
    def datasets(self) -> tuple[None, None]:
        return None, None


# --- images and maps -------------------------------------------------------------------------------------


def test_images_on_a_full_disk_stay_whole_and_are_gone_on_with(disk: Path) -> None:
    source = disk.parent / "images"
    source.mkdir()
    draw = np.random.default_rng(0)
    for name in "abc":
        Image.fromarray(draw.integers(0, 256, (600, 600, 3), np.uint8)).save(source / f"{name}.png")
    out = disk / "store"
    with pytest.raises(CannotWrite) as caught:
        list(convert(find_images([source]), out))
    assert re.fullmatch(
        rf"cannot write {out}/images/b: the disk at {disk} is full \(No space left on device\): up to 1\.37 "
        r"MiB needed, \S+ .iB free; make room there and give the same command again\. Finished images "
        r"are kept",
        str(caught.value),
    ), caught.value
    assert (left(disk), os.listdir(out / "images")) == ([], ["a"])
    with pytest.raises(DatasetMismatch, match="is not finished"):
        TileStore(out)
    subprocess.run(["mount", "-o", "remount,size=20m", str(disk)], check=True)
    assert [record.name for record in convert(find_images([source]), out)] == ["b", "c"]
    assert all(error is None for _, error in TileStore(out).verify())


def test_a_map_on_a_full_disk_names_the_disk(disk: Path) -> None:
    spec = StoreSpec((1, 4, 512, 512), torch.float32, (2, 3))
    whole = Region.whole((512, 512))
    store = ZarrStore(spec, disk / "map", (64, 64), PlainTransfers(torch.device("cpu")))
    with pytest.raises(
        CannotWrite, match=rf"cannot write {disk}/map: the disk at {disk} is full .*: 4\.00 MiB"
    ):
        store.write(whole, torch.rand(spec.shape))
    store.close()
    assert os.listdir(disk) == []


def test_output_that_finds_no_room_is_one_error() -> None:
    if not Path("/dev/full").exists():
        pytest.skip("there is no /dev/full here")
    command = [sys.executable, "-c", "from streamcnn.cli import main; main()", "--version"]
    with Path("/dev/full").open("wb") as full:
        found = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True)
    assert (found.returncode, found.stderr) == (
        1,
        "streamcnn: error: cannot write standard output: No space left on device: make room there, or write "
        "elsewhere\n",
    )


def test_sizes_in_errors_are_those_of_files(tmp_path: Path) -> None:
    with pytest.raises(CannotWrite, match=re.escape(f"up to {format_bytes(3 * 2**20)} needed")):
        with writing(tmp_path, needed=3 * 2**20, at_most=True):
            raise OSError(errno.EFBIG, os.strerror(errno.EFBIG))
