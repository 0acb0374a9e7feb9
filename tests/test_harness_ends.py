"""The UltraMNIST harness: how the process of a row ends, and when."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock, Timeout
from typer.testing import CliRunner

from benchmarks import record as records
from benchmarks.__main__ import app
from benchmarks.harness.images import generated
from benchmarks.harness.processes import Deadline, OutOfTime, end_with, run_row_in_process, run_to_end
from benchmarks.harness.results import Key, read
from benchmarks.harness.row import SAVED
from benchmarks.harness.scales import SCALES
from streamcnn.data.ultramnist import load_digits
from streamcnn.data.ultramnist.generate import Progress

ROOT = Path(__file__).parent.parent
TINY = SCALES["tiny"]


@pytest.mark.skipif(sys.platform != "linux", reason="other systems do not tell a process")
def test_a_row_ends_with_the_command_that_started_it() -> None:
    row = (
        "import os, sys, time; from benchmarks.harness.processes import end_with\n"
        "end_with(int(sys.argv[1])); print('begun', flush=True); time.sleep(99); print('outlived')"
    )
    command = f"import os, subprocess, sys; subprocess.run([sys.executable, '-c', {row!r}, str(os.getpid())])"
    with subprocess.Popen([sys.executable, "-c", command], cwd=ROOT, stdout=subprocess.PIPE) as parent:
        assert parent.stdout is not None
        assert parent.stdout.readline() == b"begun\n"
        parent.kill()
        # The row's end of the pipe closes when it is gone.
        assert parent.stdout.read() == b""


@pytest.mark.skipif(sys.platform != "linux", reason="other systems do not tell a process")
def test_a_row_whose_command_is_gone_does_not_begin() -> None:
    with pytest.raises(SystemExit, match="is gone"):
        end_with(os.getppid() + 1)


class Once(Deadline):
    """Time is over when a file is there."""

    def __init__(self, path: Path) -> None:
        super().__init__(0)
        self._path = path

    @property
    def seconds_left(self) -> float:
        while not self._path.exists():
            time.sleep(0.01)
        return 0.0


class TestTheEndOfTime:
    def ended(self, tmp_path: Path, on_sigterm: str, sleep: int = 99) -> subprocess.CompletedProcess[str]:
        """What comes of a process for which time is over when it heeds the signal."""
        code = f"""
            import pathlib, signal, sys, time
            def save(*_):
                print("saved", flush=True)
                sys.exit(int(sys.argv[2]))
            signal.signal(signal.SIGTERM, {on_sigterm})
            pathlib.Path(sys.argv[1]).touch()
            time.sleep({sleep})
            """
        ready, status = tmp_path / "ready", "0" if "save" in on_sigterm else "1"
        command = [sys.executable, "-c", textwrap.dedent(code), str(ready), status]
        return run_to_end(command, Once(ready) if sleep else Deadline(None))

    def test_a_row_that_is_done_before_is_left_alone(self, tmp_path: Path) -> None:
        assert self.ended(tmp_path, "save", sleep=0).stdout == ""

    def test_a_row_is_asked_to_save(self, tmp_path: Path) -> None:
        done = self.ended(tmp_path, "save")
        assert (done.returncode, done.stdout) == (0, "saved\n")

    def test_a_row_that_has_nothing_to_save_is_ended(self, tmp_path: Path) -> None:
        with pytest.raises(OutOfTime):
            self.ended(tmp_path, "signal.SIG_DFL")

    def test_a_row_that_fails_then_has_failed(self, tmp_path: Path) -> None:
        assert self.ended(tmp_path, "lambda *_: sys.exit(3)").returncode == 3

    def test_a_row_that_does_not_end_is_killed(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("benchmarks.harness.processes.SECONDS_TO_SAVE", 0.2)
        started = time.monotonic()
        with pytest.raises(OutOfTime):
            self.ended(tmp_path, "signal.SIG_IGN")
        assert time.monotonic() - started < 60

    def test_a_row_that_has_saved_goes_on(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        key = Key("tiny", 10**8, "RN-256", 0, False, "cpu", "x")
        saved = json.dumps({"outcome": SAVED, "reason": "ended by SIGTERM"})

        def end(command: list[str], deadline: Deadline) -> subprocess.CompletedProcess[str]:
            monkeypatch.setattr(Deadline, "seconds_left", 0.0 if time_is_over else 9.0)
            return subprocess.CompletedProcess(command, 0, saved, "")

        monkeypatch.setattr("benchmarks.harness.processes.run_to_end", end)
        time_is_over = True
        with pytest.raises(OutOfTime):
            run_row_in_process(key, tmp_path, tmp_path, Deadline(9))
        # Somebody else asked for it.
        monkeypatch.setattr(Deadline, "seconds_left", 9.0)
        time_is_over = False
        assert run_row_in_process(key, tmp_path, tmp_path, Deadline(9))["outcome"] == "failed"

    def test_images_that_are_made_by_then_are_kept(self, tmp_path: Path) -> None:
        scale = dataclasses.replace(TINY, num_train=30, num_test=2)
        digits, folder = load_digits("uci"), tmp_path / "images"

        def stop(progress: Progress) -> None:
            seen.append(progress.done)
            if progress.done >= 3:
                raise OutOfTime

        seen: list[int] = []
        with pytest.raises(OutOfTime):
            generated(scale, folder, digits, on_image=stop)
        assert seen == [0, 1, 2, 3]
        seen.clear()
        generated(scale, folder, digits, workers=0, on_image=lambda progress: seen.append(progress.done))
        assert seen[0] >= 3
        assert seen[-1] == 32

    def test_they_are_not_waited_for_longer(self, tmp_path: Path) -> None:
        with FileLock(tmp_path / "images.lock"), pytest.raises(Timeout):
            generated(TINY, tmp_path / "images", load_digits("uci"), timeout=0)

    def test_nothing_goes_on_that_begins_anew(self) -> None:
        result = CliRunner().invoke(app, ["run", "--budget=1GB", "--again", "--seconds=9"])
        assert result.exit_code == 2

    def test_the_same_command_goes_on(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(records, "RESULTS", tmp_path / "results")
        images = ("--digits=uci", "--workers=0", f"--work={tmp_path}")
        options = ("--scale=tiny", *images, "--device=cpu", "--budget=1GB")
        ends: list[dict[str, Any] | OutOfTime] = []

        def row(*_: object) -> dict[str, Any]:
            end = ends.pop(0)
            if isinstance(end, OutOfTime):
                raise end
            return end

        def run(seconds: int, *outcomes: dict[str, Any] | OutOfTime) -> list[str]:
            ends[:] = outcomes
            command = ["run", *options, f"--seconds={seconds}", "--methods=RN-256,RN-512"]
            result = CliRunner().invoke(app, command)
            assert (result.exit_code, ends) == (0, []), result.output
            assert result.output.endswith("the same command goes on\n") == (len(read("tiny")) < 2)
            return [line["method"] for line in read("tiny")]

        monkeypatch.setattr("benchmarks.__main__.run_row_in_process", row)
        refused = {"outcome": "refused", "reason": "too large"}
        assert run(0) == []
        assert not (tmp_path / "tiny" / "images" / "complete.json").exists()
        assert run(99, refused, OutOfTime()) == ["RN-256"]
        assert run(99, refused) == ["RN-256", "RN-512"]


ROW = """
import pathlib, signal, sys, time
place = pathlib.Path(sys.argv[1])

def save(number, _):
    time.sleep(0.3)
    with place.open("a") as file:
        file.write(signal.Signals(number).name)
    raise SystemExit

for number in (signal.SIGINT, signal.SIGTERM):
    signal.signal(number, save)
place.touch()
time.sleep(99)
"""


def test_a_row_saves_at_the_ctrl_c_of_a_terminal(tmp_path: Path) -> None:
    row = [sys.executable, "-c", ROW, str(tmp_path / "row")]
    code = (
        "import signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "from benchmarks.harness.processes import Deadline, run_to_end\n"
        f"run_to_end({row!r}, Deadline(None))"
    )
    command = [sys.executable, "-c", code]
    with subprocess.Popen(command, start_new_session=True, stderr=subprocess.PIPE, text=True) as process:
        while not (tmp_path / "row").exists():
            assert process.poll() is None
            time.sleep(0.01)
        # As a terminal does: to all processes of the group.
        os.killpg(process.pid, signal.SIGINT)
        _, err = process.communicate(timeout=60)
    assert (process.returncode, err.splitlines()[-1]) == (-signal.SIGINT, "KeyboardInterrupt")
    assert (tmp_path / "row").read_text() == "SIGTERM"
