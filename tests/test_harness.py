"""The UltraMNIST harness: methods, what they train, rows under their ceiling, and tables."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from filelock import FileLock, Timeout
from torch import Tensor, nn
from typer.testing import CliRunner

from benchmarks import record as records
from benchmarks.__main__ import Deadline, OutOfTime, _ended, _in_a_process, app, end_with
from benchmarks.harness.classifiers import (
    LearnedResizer,
    PatchGD,
    TileVote,
    WholeImages,
    grid_size,
    make_net,
)
from benchmarks.harness.images import ShrunkImages, generated, read_whole, shrink, steps_to
from benchmarks.harness.legibility import legibility_ceiling
from benchmarks.harness.method import Kind, Method, load_methods
from benchmarks.harness.pyramid import FIELD, ScalePyramid, scale_pyramid
from benchmarks.harness.results import Key, done, read, record
from benchmarks.harness.row import (
    AGAIN,
    SAVED,
    Attempts,
    Costs,
    PatchGDTrainer,
    PiecesTrainer,
    Refused,
    _without_single,
)
from benchmarks.harness.scales import SCALES
from benchmarks.harness.table import markdown, measured, write_table
from streamcnn import StreamingModel, TensorSource, verify
from streamcnn.data.dataset import TileDataset
from streamcnn.data.tile_store import TileStore
from streamcnn.data.ultramnist import load_digits
from streamcnn.data.ultramnist.generate import Progress
from streamcnn.support.units import parse_bytes
from streamcnn.training import TrainSettings

ROOT = Path(__file__).parent.parent
TINY = SCALES["tiny"]
PUBLISHED = """
RN-256 8.9 8.9
RN-512 24.5 24.5
RN-1024 31.3 31.3
ENB0-256 20.4 18.6
ENB0-512 49.8 43.9
ENB0-1024 49.0 49.0
ENB3-256 30.3 26.7
ENB3-512 72.3 69.1
ENB3-1024 79.1 54.5
"""


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> TileStore:
    return generated(TINY, tmp_path_factory.mktemp("tiny") / "images", load_digits("uci"), workers=0)


def constant(value: float, size: int = 40) -> TensorSource:
    return TensorSource(torch.full((1, size, size), value))


# Methods


def test_the_papers_rows_are_there_with_their_figures_and_hyperparameters() -> None:
    methods = load_methods()
    for line in PUBLISHED.strip().splitlines():
        name, unrestricted, at_11 = line.split()
        assert methods[name].published["unrestricted"] == unrestricted
        assert methods[name].published["11 GB"] == at_11
        assert {known.budget for known in methods[name].hyperparameters} == {"11GB", "24GB"}
    best = methods["ENB3-512"].hyperparameters_for(24 * 10**9)
    assert (best.learning_rate, best.gamma, best.batch) == (8e-4, 0.98, 32)
    # Below the smallest budget of the paper there is nothing else to go by.
    assert methods["RN-1024"].hyperparameters_for(10**9).batch == 3
    assert methods["RN-1024"].hyperparameters_for(12 * 10**9).batch == 3
    assert {method.kind for method in methods.values()} == set(Kind)
    assert methods["random guess"].published["unrestricted"] == f"{100 / 28:.1f}"


def test_shrinking_rows_of_one_backbone_differ_in_the_resolution_alone() -> None:
    families: dict[str, set[str | None]] = {}
    for method in load_methods().values():
        families.setdefault(method.family, set()).add(method.model)
    assert all(len(models) == 1 for models in families.values())


def test_a_method_file_with_a_mistake_is_named(tmp_path: Path) -> None:
    path = tmp_path / "10-wrong.toml"
    for text, message in (
        ('name = "a"\nkind = "shrunk"\nfamily = "b"', "'shrunk' is not a valid Kind"),
        ('name = "a"\nkind = "shrink"\nfamily = "b"\nsize = 3', "size"),
        ('name = "a"\nfamily = "b"', "kind"),
        ('name = "a"\nkind = "shrink"\nfamily = "b"', "has no resolution and no model and no hyperp"),
        ('name = "a"\nkind = "tiles"\nfamily = "b"\nmodel = "c"', "has no tile and no hyperparameters"),
    ):
        path.write_text(f"[[method]]\n{text}\n")
        with pytest.raises(ValueError, match=f"10-wrong.toml: .*{message}"):
            load_methods(tmp_path)


# Images


def test_images_are_shrunk_by_area_and_small_ones_in_two_steps(store: TileStore, tmp_path: Path) -> None:
    assert steps_to(256, SCALES["paper"]) == (512, 256)
    assert steps_to(512, SCALES["paper"]) == (512,)
    assert steps_to(1024, SCALES["single"]) == (131,)
    pixels = torch.randint(256, (1, 64, 64), dtype=torch.uint8)
    blocks = pixels.float().unfold(1, 4, 4).unfold(2, 4, 4).mean((3, 4))
    assert torch.equal(shrink(pixels, (16,)).float(), blocks.round())
    images = ShrunkImages(store, "train", (32, 16), tmp_path, positions=(3, 1))
    whole, label = TileDataset(store, "train")[3]
    source, found_label = images[0]
    assert found_label == label
    expected = shrink(read_whole(whole), (32, 16))
    assert torch.equal(read_whole(source), expected)
    # Another instance finds the array that is there.
    again = ShrunkImages(store, "train", (32, 16), tmp_path)
    assert torch.equal(read_whole(again[3][0]), expected)
    assert images.fingerprint != ShrunkImages(store, "train", (16,), tmp_path, positions=(3, 1)).fingerprint


def test_what_is_legible_depends_on_the_smallest_digit() -> None:
    single = SCALES["single"]
    # Every digit has 14 pixels or more on a canvas of 512, and half of 14 is 7.
    assert legibility_ceiling(single, 512) == legibility_ceiling(single, 256) == 1.0
    shares = [legibility_ceiling(single, resolution) for resolution in (16, 33, 66, 131)]
    assert shares == sorted(shares)
    assert 0.6 < shares[-1] < 0.8


# Networks


def test_timm_heads_are_two_layers_with_a_relu_between() -> None:
    for model in ("resnet18", "mobilenetv3_small_050"):
        net = make_net(model, 28, 64, pretrained=False)
        head = list(net.children())[-3:]
        assert [type(layer) for layer in head] == [nn.Linear, nn.ReLU, nn.Linear]
        assert head[0].out_features == 100
        assert net.eval()(torch.zeros(2, 1, 64, 64)).shape == (2, 28)


@pytest.mark.parametrize(("size", "levels"), [(33, 1), (131, 2), (512, 4), (4000, 7)])
def test_a_pyramid_has_levels_that_look_at_half_of_the_image(size: int, levels: int) -> None:
    net = scale_pyramid(10, size)
    assert net.num_levels == levels
    assert FIELD * 2 ** (levels - 1) >= size / 2


def test_a_pyramids_feature_looks_at_so_many_pixels() -> None:
    net = ScalePyramid(3, num_levels=1).eval().double()
    image = torch.zeros(1, 1, 160, 160, dtype=torch.float64, requires_grad=True)
    for layer in net.trunk:
        if isinstance(layer, nn.Conv2d):
            nn.init.constant_(layer.weight, 1.0)
    features = net.trunk(image + 1.0)
    (gradient,) = torch.autograd.grad(features[0, 0, 10, 10], image)
    rows = gradient[0, 0].abs().sum(1).nonzero()
    assert int(rows.max() - rows.min()) + 1 == FIELD


def test_a_streamed_pyramid_is_exact() -> None:
    verification = verify(scale_pyramid(10, 200), (2, 1, 200, 200), tile=64)
    assert max(verification.errors.values()) < 1e-9
    assert verification.num_tiles > 4


def test_a_learned_resizer_adds_a_branch_to_bilinear_resizing() -> None:
    net = LearnedResizer(20).eval()
    image = torch.rand(2, 1, 50, 60)
    assert net(image).shape == (2, 1, 20, 20)
    nn.init.zeros_(net.after.weight)
    nn.init.zeros_(net.after.bias)
    assert torch.allclose(net(image), F.interpolate(image, (20, 20), mode="bilinear"), atol=1e-6)


class Means(nn.Module):
    """The mean of a piece in each of three outputs, for what only arranges pieces."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(3))

    def forward(self, image: Tensor) -> Tensor:
        return image.mean((1, 2, 3))[:, None] * self.weight


def test_pieces_cover_the_image_and_vote_by_their_mean() -> None:
    model = TileVote(Means(), tile=16, share=0.5).eval()
    source = TensorSource(torch.rand(1, 40, 33))
    seen = torch.zeros(40, 33)
    for piece in model.grid(source):
        seen[piece.rows.start : piece.rows.stop, piece.cols.start : piece.cols.stop] += 1
    assert (seen > 0).all()
    assert len(model.grid(source)) == 9
    other = TensorSource(torch.rand(1, 40, 33))
    found = model([source, other])
    for each, logits in zip((source, other), found, strict=True):
        means = [each.read(piece).mean() for piece in model.grid(each)]
        expected = (torch.stack(means).mean() - 0.5) / 0.5
        assert torch.allclose(logits, expected.expand(3), atol=1e-6)
    assert model.sample_size(9) == 4
    assert model.train()([source, other]).shape == (2, 3)


def test_patchgd_learns_through_the_sampled_patches_alone() -> None:
    torch.manual_seed(0)
    model = PatchGD(Means(), 10, 0.25, width=3, grid_size=grid_size(40, 10), num_classes=2)
    sources = [TensorSource(torch.rand(1, 40, 40)) for _ in range(2)]
    model.train()
    model.begin(sources)
    before = model._filled
    assert before is not None
    assert before.shape == (2, 16, 3)
    with torch.no_grad():
        model.net.weight.mul_(2)
    for step in range(1, model.num_inner_steps + 1):
        model.zero_grad()
        model(sources).sum().backward()
        assert model.net.weight.grad is not None
        # A quarter of 16 patches each time; what was put in stays for the next inner step.
        assert (model._filled != before).any(2).sum(1).tolist() == [4 * step, 4 * step]
    assert model.num_inner_steps == 4
    assert torch.allclose(model._filled, 2 * before)
    assert model.eval()(sources).shape == (2, 2)


def test_patchgd_adds_the_gradients_of_its_inner_steps(tmp_path: Path, store: TileStore) -> None:
    torch.manual_seed(0)
    model = PatchGD(Means(), 32, 1.0, width=3, grid_size=grid_size(64, 32), num_classes=10)
    images = TileDataset(store, "train")
    trainer = PatchGDTrainer(model, images, images, TrainSettings(epochs=1), tmp_path)
    trainer._begin()
    source, label = images[0]
    trainer.differentiate([source], torch.tensor([label]), 1.0)
    assert model.net.weight.grad is not None
    found = model.net.weight.grad.clone()
    # With all patches in the sample, there is one inner step, and it has the gradient of the whole.
    model.zero_grad()
    model.begin([source])
    F.cross_entropy(model([source]), torch.tensor([label])).backward()
    assert torch.allclose(found, model.net.weight.grad, atol=1e-6)


def test_gradients_of_pieces_that_overflow_are_left_out(store: TileStore, tmp_path: Path) -> None:
    images = TileDataset(store, "train")
    model = TileVote(Means(), tile=8, share=0.5).train()
    assert isinstance(model.net, Means)
    trainer = PiecesTrainer(model, images, images, TrainSettings(epochs=1), tmp_path / "run")
    trainer._begin()
    model.net.weight.register_hook(lambda gradient: gradient * torch.tensor([1.0, math.nan, math.inf]))
    trainer.differentiate([images[0][0]], torch.tensor([1]), 1.0)
    assert model.net.weight.grad is not None
    assert model.net.weight.grad[0] != 0
    assert model.net.weight.grad[1:].tolist() == [0.0, 0.0]


def test_batches_leave_no_image_alone() -> None:
    assert _without_single(8, 17) == 7
    assert _without_single(8, 16) == 8
    assert _without_single(2, 5) == 2


# Rows


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


@pytest.mark.skipif(sys.platform != "linux", reason="other systems do not tell a process")
def test_a_row_ends_with_the_command_that_started_it() -> None:
    row = (
        "import os, sys, time; from benchmarks.__main__ import end_with\n"
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
        return _ended(command, Once(ready) if sleep else Deadline(None))

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
        monkeypatch.setattr("benchmarks.__main__._SECONDS_TO_SAVE", 0.2)
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

        monkeypatch.setattr("benchmarks.__main__._ended", end)
        time_is_over = True
        with pytest.raises(OutOfTime):
            _in_a_process(key, tmp_path, tmp_path, Deadline(9))
        # Somebody else asked for it.
        monkeypatch.setattr(Deadline, "seconds_left", 9.0)
        time_is_over = False
        assert _in_a_process(key, tmp_path, tmp_path, Deadline(9))["outcome"] == "failed"

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

        monkeypatch.setattr("benchmarks.__main__._in_a_process", row)
        refused = {"outcome": "refused", "reason": "too large"}
        assert run(0) == []
        assert not (tmp_path / "tiny" / "images" / "complete.json").exists()
        assert run(99, refused, OutOfTime()) == ["RN-256"]
        assert run(99, refused) == ["RN-256", "RN-512"]


@pytest.mark.skipif(sys.platform != "linux", reason="the ceiling needs Linux")
def test_a_row_that_is_ended_by_a_signal_has_its_time_counted(tmp_path: Path, store: TileStore) -> None:
    """Of the training that its checkpoint has had, or it would be given that time again."""
    key = Key("tiny", 150 * 10**6, "STREAM-PYRAMID", 0, False, "cpu", "x")
    scale = tmp_path / "tiny"
    shutil.copytree(store.folder, scale / "images")
    code = f"""
        import os, signal
        from streamcnn.training import Trainer
        note = Trainer._note
        def noted(self, kind, values):
            note(self, kind, values)
            if kind == "update" and self.progress.update == 3:
                os.kill(os.getpid(), signal.SIGTERM)
        Trainer._note = noted
        from benchmarks.__main__ import row
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


class TestCosts:
    def at(self, monkeypatch: pytest.MonkeyPatch, seconds: float) -> None:
        monkeypatch.setattr("benchmarks.harness.row.time.perf_counter", lambda: seconds)

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
        Attempts(tmp_path)._note("batch 4")
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
        Attempts(tmp_path)._note("batch 4")
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
                Attempts(folder)._note(tried)
            return subprocess.CompletedProcess(command, code, words if code == 0 else "", words)

        monkeypatch.setattr("benchmarks.__main__._ended", process)
        found = _in_a_process(key, folder, folder, Deadline(None))
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
        Attempts(tmp_path)._note("batch 4")
        assert self.run(monkeypatch, tmp_path, [("", -signal.SIGSEGV, "")]) == failed
        on_a_card = dataclasses.replace(self.KEY, device="cuda")
        assert self.run(monkeypatch, tmp_path, [("batch 4", -signal.SIGSEGV, "")], on_a_card) == failed
        killed = self.run(monkeypatch, tmp_path, [("batch 4", -signal.SIGKILL, "")])
        assert killed == {"outcome": "failed", "reason": "exit status -9"}
        found = self.run(monkeypatch, tmp_path, [("batch 4", 1, "a\nKeyError: 'b'")])
        assert found["reason"] == "KeyError: 'b'"


# Tables


def results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(records, "RESULTS", tmp_path)
    budget = parse_bytes("512MB")
    assert budget is not None
    base = {
        "batch_size": 4,
        "resolution": 16,
        "epochs": 2.0,
        "selected": True,
        "digits": "uci",
        "training_peak_bytes": 10**8,
        "inference_peak_bytes": 10**7,
        "training_seconds": 3.0,
    }
    for seed, accuracy in ((0, 0.5), (1, 0.6)):
        key = Key("tiny", budget, "PYRAMID-1024", seed, False, "cpu", "aa")
        record(key, {"outcome": "finished", "reason": None, "test_accuracy": accuracy, **base}, "test")
    key = Key("tiny", budget, "STREAM-PYRAMID", 0, False, "cpu", "aa")
    streamed = {**base, "resolution": 64, "test_accuracy": 0.7}
    record(key, {"outcome": "finished", "reason": None, **streamed}, "test")
    record(
        Key("tiny", budget, "RN-256", 0, False, "cpu", "aa"),
        {"outcome": "refused", "reason": "too | much", "digits": "uci"},
        "test",
    )


def test_the_table_has_the_papers_figures_beside_ours(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    results(tmp_path, monkeypatch)
    text = markdown(TINY, measured(TINY))
    assert "| 488 MiB | PYRAMID-1024 | ScalePyramid | 16² | " in text
    assert "| 55.0 ± 7.1 | 2 | 4 | 2 | 3.00 s | 95.4 MiB | random |  |" in text
    assert (
        "| 488 MiB | RN-256 | ResNet-50 | 4² | 0 % | refused |  |  |  |  |  | random | refused: too / much |"
        in text
    )
    assert "| ours, 0.512 GB, cpu, random weights | note |" in text
    assert "| RN-256 | ResNet-50 | 256² | 8.9 | 8.9 | refused |  |" in text
    assert "| ENB3-512 | EfficientNet-B3 | 512² | 67.5 | 69.1 | - |  |" in text
    assert "Ours are of another, easier task" in text


def test_the_figures_are_drawn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    results(tmp_path, monkeypatch)
    written = write_table(TINY, tmp_path / "out")
    assert [path.name for path in written] == ["table.md", "resolution.png", "memory.png"]
    assert all(path.stat().st_size > 1000 for path in written)


def test_runs_of_different_settings_are_not_averaged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    results(tmp_path, monkeypatch)
    given = ("date", "commit", "torch", "command")
    line = {name: value for name, value in read("tiny")[0].items() if name not in given}
    names = ("budget", "method", "seed", "pretrained", "device_kind", "images")
    for change in ({"budget": 10**9}, {"pretrained": True}, {"device_kind": "cuda"}, {"images": "bb"}):
        changed = {**line, **change}
        budget, method, seed, pretrained, device, images = (changed[name] for name in names)
        record(Key("tiny", budget, method, seed, pretrained, device, images), changed, "test")
    found = [each for each in measured(TINY) if each.method.name == "PYRAMID-1024"]
    assert sorted(len(each.finished) for each in found) == [1, 1, 1, 1, 2]
    # A method of the same backbone at the same resolution is no obstacle to a figure.
    streamed = {**line, "method": "TILES-ENB0", "resolution": 64}
    for method in ("TILES-ENB0", "STREAM-ENB0"):
        record(Key("tiny", 10**9, method, 0, False, "cpu", "aa"), streamed, "test")
    assert len(write_table(TINY, tmp_path / "out")) == 3


def test_a_scale_without_results_has_a_table_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(records, "RESULTS", tmp_path)
    assert [path.name for path in write_table(TINY)] == ["table.md"]


def test_whole_images_are_normalised_and_stacked() -> None:
    found = WholeImages(Means())([constant(0.75), constant(0.25)])
    assert torch.allclose(found, torch.tensor([[0.5] * 3, [-0.5] * 3]))


def test_every_method_that_runs_can_be_made() -> None:
    """At the smallest scale, without the largest networks."""
    for method in load_methods().values():
        if method.runs and method.family not in ("EfficientNet-B7", "EfficientNet-B3", "ResNet-50"):
            assert isinstance(method, Method)
            assert method.model is not None
            assert method.hyperparameters
            net = make_net(method.model, 10, 64, pretrained=False)
            model = StreamingModel(net) if method.is_streamed else WholeImages(net)
            assert sum(p.numel() for p in model.parameters()) > 10**4


def test_results_are_lines_of_json(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    results(tmp_path, monkeypatch)
    lines = [json.loads(line) for line in (tmp_path / "ultramnist_tiny.jsonl").read_text().splitlines()]
    assert {"date", "commit", "device", "torch", "command"} <= lines[0].keys()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"--scale": "huge"}, "no scale huge: there are paper, single"),
        ({"--methods": "RN-256, RN-300"}, "no method RN-300: there are RN-256, "),
        ({"--seeds": "1,b"}, "cannot read seeds '1,b': allowed are whole numbers"),
        ({"--budget": "much"}, "--budget: "),
        ({"--device": "gpu"}, "no device gpu: there is cpu"),
    ],
)
def test_wrong_usage_is_told_before_anything_is_made(
    tmp_path: Path, changes: dict[str, str], message: str
) -> None:
    given = {"--scale": "tiny", "--budget": "150MB", "--work": str(tmp_path / "work"), **changes}
    found = CliRunner().invoke(app, ["run", *itertools.chain(*given.items())])
    assert found.exit_code == 2
    text = " ".join(found.output.replace("│", " ").split())
    assert message in text
    assert not (tmp_path / "work").exists()


def test_a_method_that_is_not_built_yet_says_so(tmp_path: Path) -> None:
    arguments = ("--scale=tiny", "--budget=150MB", f"--work={tmp_path}", "--digits=uci", "--workers=0")
    found = CliRunner().invoke(app, ["run", *arguments, "--methods=PARTITION-RN50"])
    assert found.exit_code == 0
    assert "PARTITION-RN50 is not run: tiles divided among processes: not built yet" in found.output


def test_the_list_of_methods_has_all_of_them() -> None:
    found = CliRunner().invoke(app, ["methods"], env={"COLUMNS": "200"})
    assert found.exit_code == 0
    assert all(name in found.output for name in load_methods())


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
        "from benchmarks.__main__ import Deadline, _ended\n"
        f"_ended({row!r}, Deadline(None))"
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
