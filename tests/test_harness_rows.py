"""The UltraMNIST harness: rows under their ceiling, and what they cost."""

from __future__ import annotations

import dataclasses
import json
import shutil
import signal
import subprocess
import sys
import textwrap
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from torch import nn
from typer.testing import CliRunner

from benchmarks import record as records
from benchmarks.__main__ import app
from benchmarks.harness.attempts import Attempts, Refused
from benchmarks.harness.batch_search import Fit, without_single
from benchmarks.harness.classifiers import WholeImages
from benchmarks.harness.costs import Costs
from benchmarks.harness.method import Hyperparameters, TrainedMethod
from benchmarks.harness.processes import Deadline, run_row_in_process
from benchmarks.harness.results import Key, done, read, record
from benchmarks.harness.row import AGAIN, SAVED, run
from benchmarks.harness.scales import SCALES
from benchmarks.harness.task import Task
from streamcnn.data.tile_store import TileStore

ROOT = Path(__file__).parent.parent


def test_batches_leave_no_image_alone() -> None:
    for batch, num_images, expected in ((8, 17, 7), (8, 16, 8), (2, 5, 2)):
        assert without_single(Fit(batch, True), num_images) == Fit(expected, True)


def run_harness(*arguments: str) -> str:
    """The harness in this process; its rows have theirs."""
    finished = CliRunner().invoke(app, arguments)
    assert finished.exit_code == 0, finished.output
    return finished.stdout


@pytest.mark.skipif(sys.platform != "linux", reason="the ceiling needs Linux")
def test_rows_finish_within_their_budget_or_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = ("run", "--scale=tiny", "--digits=uci", f"--work={tmp_path}", "--device=cpu")
    # Refused by arithmetic: libraries that are refused memory in an operator crash now and then.
    methods = "--methods=STREAM-PYRAMID,PYRAMID-1024,unconstrained,STREAM-RN50"
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(records, "RESULTS", tmp_path / "results")
    out = run_harness(*arguments, "--budget=150MB", methods)
    assert "STREAM-RN50, seed 0: refused: " in out
    found = {line["method"]: line for line in read("tiny")}
    assert found["STREAM-RN50"]["outcome"] == "refused"
    for name in ("STREAM-PYRAMID", "PYRAMID-1024", "unconstrained"):
        assert found[name]["outcome"] == "finished"
        assert 0 <= found[name]["test_accuracy"] <= 1
        assert max(found[name]["training_peak_bytes"], found[name]["inference_peak_bytes"]) <= 150 * 10**6
        assert found[name]["batch_size"] == 4
    assert found["PYRAMID-1024"]["resolution"] == 16
    # What is done is left out; a failed row is not.
    out = run_harness(*arguments, "--budget=150MB", methods)
    assert "seed 0" not in out
    key = Key("tiny", 150 * 10**6, "STREAM-RN50", 0, False, "cpu", found["STREAM-RN50"]["images"])
    assert done(key)
    record(key, {"outcome": "failed", "reason": "KeyError"}, "test")
    assert not done(key)


@pytest.mark.skipif(sys.platform != "linux", reason="the ceiling needs Linux")
def test_a_row_that_is_ended_by_a_signal_has_its_time_counted(tmp_path: Path, tiny_images: TileStore) -> None:
    """Of the training that its checkpoint has had, or it would be given that time again."""
    key = Key("tiny", 150 * 10**6, "STREAM-PYRAMID", 0, False, "cpu", "x")
    scale = tmp_path / "tiny"
    shutil.copytree(tiny_images.folder, scale / "images")
    # However slow the machine is: time is not to end it first.
    code = f"""
        import dataclasses, os, signal
        from benchmarks.__main__ import row
        from benchmarks.harness.costs import Costs
        from benchmarks.harness.scales import SCALES
        SCALES["tiny"] = dataclasses.replace(SCALES["tiny"], seconds=600)
        note, ended = Costs.note, []
        def noted(costs, limit, trainer):
            note(costs, limit, trainer)
            if trainer.progress.update == 3 and not ended:
                ended.append(True)
                os.kill(os.getpid(), signal.SIGTERM)
        Costs.note = noted
        row({json.dumps(key.to_dict())!r}, {scale!r}, {tmp_path / "row"!r}, os.getppid())
        """
    code = "from pathlib import PosixPath\n" + textwrap.dedent(code)
    command = [sys.executable, "-c", code]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert json.loads(ended.stdout.splitlines()[-1])["outcome"] == SAVED
    [path] = (tmp_path / "row").glob("stage-*/costs.json")
    known = json.loads(path.read_text())
    assert known["updates"] == 3
    assert known["saved_seconds"] == known["seconds"] > 0


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Thumbnails(TrainedMethod):
    """A kind of method that is nowhere but here."""

    kind = "thumbnails"

    def make_model(self, task: Task, size: int) -> nn.Module:
        """A linear classifier of sixteen means."""
        net = nn.Sequential(nn.AvgPool2d(size // 4), nn.Flatten(), nn.Linear(16, 10))
        return WholeImages(net).to(task.device)


@pytest.mark.skipif(sys.platform != "linux", reason="the ceiling needs Linux")
def test_a_new_kind_of_method_is_one_class(tmp_path: Path, tiny_images: TileStore) -> None:
    known = Hyperparameters(budget="1GB", learning_rate=0.01)
    method = Thumbnails(name="THUMBNAILS", family="linear", model="means", hyperparameters=(known,))
    task = Task(
        scale=SCALES["tiny"],
        budget=10**9,
        seed=0,
        pretrained=False,
        device="cpu",
        store=tiny_images,
        shrunk=tmp_path / "shrunk",
        folder=tmp_path / "row",
    )
    # The search for a batch is followed by a start without the holes that it leaves.
    searched, trained = run(method, task), run(method, task)
    assert (searched["outcome"], trained["outcome"]) == (AGAIN, "finished")
    assert (trained["batch_size"], trained["num_parameters"]) == (4, 170)


class TestCosts:
    def at(self, monkeypatch: pytest.MonkeyPatch, seconds: float) -> None:
        monkeypatch.setattr("benchmarks.harness.costs.time.perf_counter", lambda: seconds)

    def trainer(self, update: int) -> Any:
        progress = SimpleNamespace(update=update, epoch=2, num_images=update)
        return SimpleNamespace(progress=progress, images=range(100))

    def test_they_are_those_of_all_processes(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.at(monkeypatch, 100.0)
        first = Costs(tmp_path)
        self.at(monkeypatch, 103.0)
        first.note(SimpleNamespace(peak_bytes=70), self.trainer(5))
        self.at(monkeypatch, 500.0)
        second = Costs(tmp_path)
        assert (second.seconds, second.peak, second.updates, second.epochs) == (3.0, 70, 5, 2.05)
        self.at(monkeypatch, 502.0)
        second.note(SimpleNamespace(peak_bytes=None), self.trainer(9))
        assert (second.seconds, second.peak, second.updates, second.epochs) == (5.0, 70, 9, 2.09)
        assert [path.name for path in tmp_path.iterdir()] == ["costs.json"]

    def test_time_that_was_lost_is_given_again(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        folder, limit = tmp_path / "checkpoints", SimpleNamespace(peak_bytes=1)
        folder.mkdir()
        self.at(monkeypatch, 0.0)
        costs = Costs(tmp_path)
        for second in range(1, 8):
            self.at(monkeypatch, second)
            if second == 4:
                (folder / "save-000001-update-00000003.pt").touch()
            costs.note(limit, self.trainer(second))
        again = Costs(tmp_path)
        assert (again.seconds, again.trained_seconds) == (7.0, 4.0)
        self.at(monkeypatch, 9.0)
        again.note(limit, self.trainer(5))
        assert (again.seconds, again.trained_seconds) == (9.0, 6.0)


class TestARowThatALibraryEnds:
    def test_what_it_tried_counts_as_refused(self, tmp_path: Path) -> None:
        assert not Attempts(tmp_path).refuse_last("SIGSEGV")
        Attempts(tmp_path).begin("batch 4")
        assert Attempts(tmp_path).refuse_last("SIGSEGV")
        assert not Attempts(tmp_path).refuse_last("SIGSEGV")
        again = Attempts(tmp_path)
        with pytest.raises(Refused, match="SIGSEGV"), again.trying("batch 4"):
            raise AssertionError
        with pytest.raises(Refused, match="no room"), again.trying("batch 3"):
            raise Refused("no room")
        assert not Attempts(tmp_path).refuse_last("SIGSEGV")
        for name in ("batch 4", "batch 3"):
            with pytest.raises(Refused), Attempts(tmp_path).trying(name):
                raise AssertionError
        with Attempts(tmp_path).trying("batch 2"):
            pass

    def test_what_was_interrupted_is_tried_again(self, tmp_path: Path) -> None:
        Attempts(tmp_path).begin("batch 4")
        Attempts(tmp_path).forget_last()
        assert not Attempts(tmp_path).refuse_last("SIGSEGV")
        with Attempts(tmp_path).trying("batch 4"):
            pass

    KEY = Key("tiny", 10**8, "RN-256", 0, False, "cpu", "x")

    def run(
        self, monkeypatch: pytest.MonkeyPatch, folder: Path, ends: list[tuple[str, int, str]], key: Key = KEY
    ) -> dict[str, Any]:
        """What comes of a row whose processes try something and end like that."""
        left = list(ends)

        def process(command: list[str], _: Deadline) -> subprocess.CompletedProcess[str]:
            tried, code, words = left.pop(0)
            if tried:
                Attempts(folder).begin(tried)
            return subprocess.CompletedProcess(command, code, words if code == 0 else "", words)

        monkeypatch.setattr("benchmarks.harness.processes.run_to_end", process)
        found = run_row_in_process(key, folder, folder, Deadline(None))
        assert not left
        return found

    def test_it_goes_on_in_another_process(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        ends = [
            ("batch 4", -signal.SIGSEGV, ""),
            ("batch 3", -signal.SIGABRT, "x\nstd::bad_alloc"),
            ("", 0, json.dumps({"outcome": AGAIN})),
            ("", 0, json.dumps({"outcome": "finished"})),
        ]
        assert self.run(monkeypatch, tmp_path, ends) == {"outcome": "finished"}
        for name, reason in (("batch 4", "SIGSEGV, exit status -11"), ("batch 3", "SIGABRT, std::bad_alloc")):
            with pytest.raises(Refused, match=reason), Attempts(tmp_path).trying(name):
                raise AssertionError

    def test_other_ends_are_failures(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        failed = {"outcome": "failed", "reason": "exit status -11"}
        # Nothing is tried that may be refused, even if something was when an earlier command was killed.
        Attempts(tmp_path).begin("batch 4")
        assert self.run(monkeypatch, tmp_path, [("", -signal.SIGSEGV, "")]) == failed
        on_a_card = dataclasses.replace(self.KEY, device="cuda")
        assert self.run(monkeypatch, tmp_path, [("batch 4", -signal.SIGSEGV, "")], on_a_card) == failed
        killed = self.run(monkeypatch, tmp_path, [("batch 4", -signal.SIGKILL, "")])
        assert killed == {"outcome": "failed", "reason": "exit status -9"}
        found = self.run(monkeypatch, tmp_path, [("batch 4", 1, "a\nKeyError: 'b'")])
        assert found["reason"] == "KeyError: 'b'"
