"""A run's folder: one process at a time, full disks, files that errors name, pictures that were replaced."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import platform
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hostile import FACTORY, make_run
from torch import nn

from streamcnn import StreamingModel, TensorSource
from streamcnn.data.reader import BatchReader
from streamcnn.errors import CannotWrite, CorruptImage, RunInUse, RunMismatch, StreamError, TrainingDiverged
from streamcnn.geometry.regions import Region
from streamcnn.support.signals import StoppedAtOnce, heeding
from streamcnn.training import load_run, make_trainer, read_log, write_report
from streamcnn.training.checkpoints import CheckpointFolder
from streamcnn.training.evaluation import score
from streamcnn.training.lock import HOLDER, LOCK, holding
from streamcnn.training.naming import open_batch
from streamcnn.training.runs import read_run

Run = Callable[..., tuple[int, str, str]]


def test_a_second_process_is_refused_and_told_of_the_first(tmp_path: Path) -> None:
    with holding(tmp_path), pytest.raises(RunInUse) as caught, holding(tmp_path):
        raise AssertionError
    assert str(caught.value) == (
        f"{tmp_path} is in use: process {os.getpid()} on {platform.node()} trains there; wait until it is "
        "over, stop it, or give another folder"
    )
    assert not (tmp_path / HOLDER).exists()


def hold(folder: Path) -> subprocess.Popen[bytes]:
    """A process that holds the folder until it is killed."""
    code = (
        "import sys; from pathlib import Path; from streamcnn.training.lock import holding\n"
        "with holding(Path(sys.argv[1])): print('held', flush=True); sys.stdin.read()"
    )
    command = [sys.executable, "-c", code, str(folder)]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert process.stdout is not None
    assert process.stdout.readline() == b"held\n"
    return process


def test_the_lock_of_a_process_that_was_killed_is_free(tmp_path: Path) -> None:
    with hold(tmp_path) as process:
        described = f"process {process.pid} on {platform.node()} trains there"
        with pytest.raises(RunInUse, match=described), holding(tmp_path):
            raise AssertionError
        process.kill()
    assert (tmp_path / HOLDER).exists()
    with holding(tmp_path):
        assert (tmp_path / HOLDER).read_text().startswith(f"{os.getpid()} ")


def test_the_free_lock_of_another_machine_is_taken_with_a_warning(tmp_path: Path) -> None:
    (tmp_path / HOLDER).write_text("7 elsewhere\x1b\n")
    with pytest.warns(UserWarning, match=r"process 7 on elsewhere\\x1b has not ended .* taken for dead"):
        with holding(tmp_path):
            assert (tmp_path / HOLDER).read_text() == f"{os.getpid()} {platform.node()}\n"


@pytest.mark.parametrize(
    ("number", "error", "text"),
    [
        (
            errno.ENOLCK,
            CannotWrite,
            "run.lock: No locks available: give a folder on a disk that has",
        ),
        (errno.EROFS, CannotWrite, "run.lock: Read-only file system: give a folder that you may write to"),
    ],
)
def test_a_folder_that_cannot_be_locked_is_one_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, error: type[Exception], text: str
) -> None:
    def flock(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", flock)
    with pytest.raises(error, match=text), holding(tmp_path / "run"):
        raise AssertionError
    assert not (tmp_path / "run" / HOLDER).exists()


def test_without_locks_of_the_disk_a_file_is_the_lock(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def flock(*_: object) -> None:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    monkeypatch.setattr(fcntl, "flock", flock)
    with pytest.warns(UserWarning, match="flock not supported"), holding(tmp_path):
        with pytest.raises(RunInUse, match=r"; if it is dead, remove run\.lock there$"), holding(tmp_path):
            raise AssertionError
    with pytest.warns(UserWarning, match="flock not supported"), holding(tmp_path / "new"):
        assert (tmp_path / "new" / LOCK).exists()
    assert sorted(os.listdir(tmp_path)) == []


def test_a_new_folder_goes_again_if_nothing_was_written(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), holding(tmp_path / "run"):
        raise ZeroDivisionError
    assert os.listdir(tmp_path) == []
    with holding(tmp_path / "run"):
        (tmp_path / "run" / "file").touch()
    assert sorted(os.listdir(tmp_path / "run")) == ["file", LOCK]


def test_a_file_in_a_folders_place_is_one_error(tmp_path: Path) -> None:
    (tmp_path / "run").touch()
    with pytest.raises(CannotWrite, match="run/checkpoints: Not a directory: give a folder"):
        CheckpointFolder(tmp_path / "run" / "checkpoints").save({}, 1)


@pytest.mark.parametrize("name", ["checkpoints", "checkpoints/BEST", "checkpoints/best.txt", "log.jsonl"])
def test_a_folder_or_a_file_in_the_other_ones_place_is_one_error(tmp_path: Path, name: str) -> None:
    folder = make_run(tmp_path)
    checkpoints = CheckpointFolder(folder / "checkpoints")
    best = checkpoints.best()
    assert best is not None
    place = folder / name.replace("BEST", best.name)
    if place.is_dir():
        place.rename(folder / "aside")
        place.touch()
    else:
        place.unlink()
        place.mkdir()
    read = (lambda: read_log(folder)) if name == "log.jsonl" else lambda: load_run(folder, trust=[FACTORY])
    with pytest.raises(StreamError, match=rf"{place.name}\S* (cannot be read|is no regular file)"):
        read()


@pytest.mark.parametrize("name", ["checkpoints", "log.jsonl"])
def test_a_run_does_not_go_on_with_the_other_kind_of_place(tmp_path: Path, name: str) -> None:
    folder = make_run(tmp_path)
    (folder / name).rename(folder / "aside")
    if name == "checkpoints":
        (folder / name).touch()
    else:
        (folder / name).mkdir()
    with pytest.raises(StreamError, match=rf"{name}.* (cannot be read|is no regular file|Is a directory)"):
        one_more_epoch(folder)
    assert not (folder / HOLDER).exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_a_run_of_a_gpu_is_used_on_a_machine_without_one(tmp_path: Path, run: Run) -> None:
    folder = make_run(tmp_path)
    values = json.loads((folder / "run.json").read_text())
    (folder / "run.json").write_text(json.dumps({**values, "device": "cuda"}))
    message = re.escape(
        "run.json: device='cuda': there is cpu here: give another device, such as --device cpu"
    )
    with pytest.raises(RunMismatch, match=message):
        load_run(folder, trust=[FACTORY])
    assert load_run(folder, trust=[FACTORY], device="cpu").config.device == "cpu"
    with pytest.raises(ValueError, match="device='cuda:3': there is cpu here"):
        load_run(folder, trust=[FACTORY], device="cuda:3")
    write_report(folder)
    command = ("evaluate", folder, f"--trust={FACTORY}", "--split=train")
    assert run(*command)[0] == 1
    assert run(*command, "--device=cpu")[0] == 0
    status, _, err = run(*command, "--device=tpu")
    assert (status, err) == (
        2,
        "streamcnn: error: device='tpu': allowed are cpu and cuda, or one GPU of several, such as cuda:1\n",
    )


def one_more_epoch(folder: Path) -> None:
    config = read_run(folder)
    make_trainer(replace(config, settings=replace(config.settings, epochs=2)), folder).run()


def test_a_run_that_may_not_be_written_to_may_be_read(tmp_path: Path, run: Run) -> None:
    if os.geteuid() == 0:
        pytest.skip("root may write to all folders; see the test of a read-only disk")
    folder = make_run(tmp_path)
    assert_read_only(folder, run, lambda: [path.chmod(0o555) for path in (folder, *folder.glob("c*"))])


def test_a_run_on_a_read_only_disk_may_be_read(tmp_path: Path, run: Run) -> None:
    folder = make_run(tmp_path)
    mounted = subprocess.run(["mount", "--bind", "-o", "ro", folder, folder], capture_output=True, text=True)
    if mounted.returncode:
        pytest.skip(f"a disk cannot be mounted here: {mounted.stderr.strip()}")
    try:
        assert_read_only(folder, run, lambda: None)
    finally:
        subprocess.run(["umount", folder], check=True)


def assert_read_only(folder: Path, run: Run, forbid: Callable[[], object]) -> None:
    forbid()
    assert run("evaluate", folder, "--split=val", f"--trust={FACTORY}")[0] == 0
    with pytest.raises(CannotWrite, match=r"run\.lock: .*: give a folder that you may write to, on a disk"):
        one_more_epoch(folder)


class Images:
    """Three images of one number each."""

    labels = (0, 1, 0)
    fingerprint = "three"

    def __init__(self, *shapes: tuple[int, int]) -> None:
        self.shapes = shapes or ((4, 4),) * 3

    def set_epoch(self, epoch: int) -> None:
        assert epoch == 0

    def prefetch(self, position: int) -> None:
        assert position < 3

    def __len__(self) -> int:
        return 3

    def __getitem__(self, position: int) -> tuple[TensorSource, int]:
        source = TensorSource(torch.full((1, *self.shapes[position]), float(position)))
        source.name = f"{position}.png"
        return source, self.labels[position]


def test_a_pixel_that_is_no_number_names_file_and_place() -> None:
    pixels = torch.zeros(1, 6, 5)
    pixels[0, 4, 3] = torch.nan
    bad, good = TensorSource(pixels), TensorSource(torch.zeros(1, 6, 5))
    bad.name = "/slides/b.tif"
    with pytest.raises(CorruptImage) as caught:
        BatchReader([good, bad], torch.device("cpu")).read(Region.whole((6, 5)))
    assert str(caught.value).startswith(
        "image 1 of the batch (/slides/b.tif) is nan for the model in channel 0 at row 4, column 3: "
    )


def test_images_of_different_shapes_are_named() -> None:
    sources, *_ = open_batch(Images((4, 4), (4, 5)), [0, 1], "update 1 of epoch 1")
    model = StreamingModel(nn.Conv2d(1, 2, 1))
    with pytest.raises(ValueError, match=r"image 1 of the batch is \(1, 4, 5\) torch.float32 \(1.png\)"):
        model(sources)


def test_an_answer_that_is_no_number_names_the_image() -> None:
    def classify(sources: list[TensorSource]) -> torch.Tensor:
        return torch.tensor([[torch.inf if source.name == "1.png" else 0.0, 1.0] for source in sources])

    with pytest.raises(TrainingDiverged, match=r"NaN or infinity for image 1 \(1.png\): see"):
        score(classify, Images(), batch_size=2)  # type: ignore[arg-type]


@pytest.fixture
def sigint() -> Iterator[None]:
    """SIGINT as in a terminal, whatever the process that runs the tests was given."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("sigint")
def test_a_second_signal_stops_at_once() -> None:
    seen: list[signal.Signals] = []

    def signalled_twice() -> None:
        with heeding(seen.append):
            os.kill(os.getpid(), signal.SIGINT)
            assert seen == [signal.SIGINT]
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(StoppedAtOnce, match="second signal, SIGINT") as caught:
        signalled_twice()
    assert caught.value.signal == signal.SIGINT
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


@pytest.mark.usefixtures("sigint")
def test_what_was_ignored_stays_ignored() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    seen: list[signal.Signals] = []
    with heeding(seen.append):
        os.kill(os.getpid(), signal.SIGINT)
    assert (seen, signal.getsignal(signal.SIGINT)) == ([], signal.SIG_IGN)
