"""The benchmark of a pass's time and memory: processes in turn, ratios, tables and figures."""

from __future__ import annotations

import json
from contextlib import closing
from pathlib import Path
from typing import Any
from unittest.mock import create_autospec

import pytest
import torch
from rich.console import Console
from typer.testing import CliRunner, Result

from benchmarks import record as records
from benchmarks.__main__ import app, main
from benchmarks.speed import results, rounds
from benchmarks.speed.cases import STANDARD, Case
from benchmarks.speed.kinds import DEFAULT_KINDS, KINDS, kinds_of
from benchmarks.speed.passes import Passes
from benchmarks.speed.results import YARDSTICKS, Row
from benchmarks.speed.rounds import measure
from benchmarks.speed.table import tables
from benchmarks.speed.task import Task
from benchmarks.speed.worker import Ended, Worker
from streamcnn.ceiling.gauge import Gauge, Overhead
from streamcnn.ceiling.nvml import Source

UNET = "benchmarks.networks:UNet"
SMALL = Case(UNET, 64, ("1GiB", "1MiB"))


def command(*arguments: object) -> Result:
    return CliRunner().invoke(app, ["speed", *map(str, arguments)])


def row(kind: str, seconds: list[float], resident: list[int], budget: str | None = None) -> Row:
    """A finished row with those passes."""
    passes: list[dict[str, Any]] = [
        {
            "seconds": s,
            "user_seconds": 2 * s,
            "kernel_seconds": 0.1,
            "minor_faults": 1000,
            "resident_bytes": b,
            "measured_bytes": None if budget is None else b - 1,
        }
        for s, b in zip(seconds, resident, strict=True)
    ]
    label = KINDS[kind].label if budget is None else f"{KINDS[kind].label}, {budget}"
    return Row(kind, label, budget, first_seconds=9.0, passes=passes)


def made_up(case: str = "net 64x64") -> results.Result:
    rows = (
        row("plain-kept", [4.0, 1.0, 2.0], [900, 1000, 950]),
        row("plain", [5.0, 4.0, 6.0], [800, 790, 780]),
        row("streamed", [3.0, 3.0, 30.0], [200, 190, 180], "1GiB"),
        row("streamed", [8.0, 7.0, 9.0], [100, 90, 80], "1MiB"),
        Row("checkpoint", "checkpoint per block", outcome="failed", reason="first\nno memory"),
    )
    return results.Result(case, "cpu", "a processor", rows)


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What the command records of a small network: kinds that finish, one that fails, one that is refused."""
    folder = tmp_path_factory.mktemp("results")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(records, "RESULTS", folder)
        kinds = "plain-kept,checkpoint,streamed"
        budgets = [word for budget in SMALL.budgets for word in ("--budget", budget)]
        done = command(UNET, "--size", 64, *budgets, "--kinds", kinds, "--repeats", 1, "--threads", 1)
    assert done.exit_code == 0, done.output
    line: dict[str, Any] = json.loads((folder / "speed.jsonl").read_text())
    return {**line, "printed": done.output}


class TestTheCommand:
    def test_each_kind_is_a_row(self, measured: dict[str, Any]) -> None:
        outcomes = {each["label"]: each["outcome"] for each in measured["rows"]}
        assert outcomes == {
            "plain, heap kept": "finished",
            "checkpoint per block": "failed",
            "streamcnn, 1GiB": "finished",
            "streamcnn, 1MiB": "refused",
        }

    def test_a_line_says_what_ran_where(self, measured: dict[str, Any]) -> None:
        assert measured["case"] == f"{UNET} 64x64"
        assert measured["threads"] == 1
        assert measured["device_kind"] == "cpu"
        assert {"date", "commit", "torch", "command", "device", "versions"} <= measured.keys()

    def test_a_pass_has_its_seconds_faults_and_bytes(self, measured: dict[str, Any]) -> None:
        for each in (measured["rows"][0], measured["rows"][2]):
            (found,) = each["passes"]
            assert found["seconds"] > 0
            assert each["first_seconds"] > 0
            assert {"user_seconds", "kernel_seconds", "minor_faults"} <= found.keys()
            # At the least the largest map and its gradient: 24 channels of 64 x 64 float32.
            assert found["resident_bytes"] > 2 * 24 * 64 * 64 * 4

    def test_a_streamed_row_has_its_plan(self, measured: dict[str, Any]) -> None:
        plain, _, streamed, _ = measured["rows"]
        assert plain["plan"] is None
        assert streamed["plan"]["budget_bytes"] == 2**30
        # So small that all of it is the resident tail.
        assert streamed["plan"]["tiles"] == streamed["plan"]["phases"] == 0
        assert streamed["plan"]["resident_operators"] > 0
        assert streamed["plan"]["projected_bytes"] >= streamed["passes"][0]["measured_bytes"] > 0
        assert streamed["passes"][0]["retries"] == 0

    def test_what_does_not_run_says_why(self, measured: dict[str, Any]) -> None:
        _, failed, _, refused = measured["rows"]
        assert "has no set_grad_checkpointing()" in failed["reason"]
        assert refused["reason"].startswith("PlanDoesNotFit: ")
        assert refused["passes"] == []
        printed = " ".join(measured["printed"].split())
        assert "checkpoint per block: benchmarks.networks:UNet has no set_grad_checkpointing()" in printed
        assert "streamcnn, 1MiB: PlanDoesNotFit" in printed

    def test_ratios_are_to_plain_pytorch(self, measured: dict[str, Any]) -> None:
        assert measured["ratios"]["plain, heap kept"]["seconds"] == 1
        plain, streamed = (measured["rows"][index]["passes"][0]["seconds"] for index in (0, 2))
        assert measured["ratios"]["streamcnn, 1GiB"]["seconds"] == pytest.approx(streamed / plain, abs=1e-3)

    @pytest.mark.parametrize(
        ("arguments", "text"),
        [
            ((), "name a model"),
            (("all", "--size", 64), "their own sizes"),
            (("resnet18", "--device", "tpu"), "no device tpu"),
            (("resnet18", "--kinds", "plain,fast"), "no kind fast"),
            (("resnet18", "--kinds", "streamed"), "streamed kinds need --budget"),
            (("resnet18", "--budget", "much"), "cannot read 'much'"),
        ],
    )
    def test_what_cannot_be_measured_is_refused(self, arguments: tuple[object, ...], text: str) -> None:
        done = command(*arguments)
        assert done.exit_code == 2
        assert text in " ".join(done.output.replace("│", " ").split())


class TestProcesses:
    def test_one_that_dies_is_told_with_its_signal(self) -> None:
        task = Task(Case("os:abort", 64, ()), KINDS["plain"], "cpu", 1)
        with closing(Worker(task)) as worker, pytest.raises(Ended, match="ended by SIGABRT") as caught:
            worker.ready()
        assert caught.value.outcome == "failed"

    def test_one_that_holds_more_than_its_allowance_gives_it_back(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(rounds, "available_bytes", lambda: 0)
        made, rests = Worker.make_pass, Worker.rest
        calls: list[str] = []
        monkeypatch.setattr(Worker, "make_pass", lambda self: (calls.append("pass"), made(self))[1])
        monkeypatch.setattr(Worker, "rest", lambda self: (calls.append("rest"), rests(self))[1])
        told: list[str] = []
        machine, (found,) = measure([Task(SMALL, KINDS["plain-kept"], "cpu", 1)], 1, told.append)
        assert found.rests
        assert machine["threads"] == 1
        # Once it is known to rest, a pass that does not count comes first.
        assert calls == ["pass", "rest", "pass", "pass", "rest", "pass", "pass", "rest"]
        assert len(found.passes) == 1
        assert told[-1].startswith("round 3 of 3, plain, heap kept: 0.")


class TestPasses:
    """In this process, what the process of a kind does."""

    def test_training_makes_gradients_and_rest_drops_them(self) -> None:
        passes = Passes(Task(SMALL, KINDS["plain-last"], "cpu", 1))
        passes.make()
        parameters = list(passes.net.parameters())
        assert passes.net.training
        assert passes.image.is_contiguous(memory_format=torch.channels_last)
        assert all(parameter.grad is not None for parameter in parameters)
        passes.rest()
        assert all(parameter.grad is None for parameter in parameters)

    def test_inference_is_a_forward_pass_in_evaluation_mode(self) -> None:
        case = Case(UNET, 64, (), inference=True, autocast=True)
        passes = Passes(Task(case, KINDS["plain"], "cpu", 1))
        passes.make()
        assert not passes.net.training
        assert all(parameter.grad is None for parameter in passes.net.parameters())

    def test_checkpoints_are_timms(self) -> None:
        passes = Passes(Task(Case("test_resnet", 64, ()), KINDS["checkpoint"], "cpu", 1))
        assert passes.net.grad_checkpointing

    def test_on_a_card_context_and_reserved_memory_are_counted(self, monkeypatch: pytest.MonkeyPatch) -> None:
        passes = Passes(Task(SMALL, KINDS["plain"], "cpu", 1))
        gauge = create_autospec(Gauge, instance=True)
        gauge.overhead.return_value = Overhead(500, Source.ALLOCATOR)
        gauge.max_reserved.return_value = 80
        peaks = iter([70, 60])
        monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
        monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: next(peaks))
        monkeypatch.setattr(passes, "_gauge", gauge)
        found = passes.make()
        assert found["measured_bytes"] == 580
        assert found["reading"] == "allocator's peak and measured overhead"
        # The larger of both directions.
        assert found["allocated_bytes"] == 70
        gauge.reset_peak.assert_called_once_with()
        passes.rest()
        gauge.empty_cache.assert_called_once_with()


class TestRatios:
    def test_medians_of_seconds_and_the_most_memory(self) -> None:
        found = made_up()
        kept, plain, large, small, failed = found.rows
        assert found.seconds(kept) == 2
        assert found.memory(kept) == 1000
        assert [found.seconds_ratio(each) for each in (kept, plain, large, small)] == [1, 2.5, 1.5, 4]
        assert [found.memory_ratio(each) for each in (kept, plain, large, small)] == [1.25, 1, 0.25, 0.125]
        assert failed not in found.finished

    def test_there_is_none_without_a_yardstick(self) -> None:
        found = results.Result("net", "cpu", "a processor", made_up().rows[2:])
        assert found.seconds_ratio(found.rows[0]) is None
        assert found.memory_ratio(found.rows[0]) is None

    def test_on_a_card_all_that_the_process_holds_there_is_compared(self) -> None:
        streamed = row("streamed", [1.0], [100], "1GiB")
        plain = row("plain-last", [2.0], [1])
        plain.passes[0]["measured_bytes"] = 396
        found = results.Result("net", "cuda", "a card", (plain, streamed))
        assert found.seconds_ratio(streamed) == 0.5
        assert found.memory_ratio(streamed) == 0.25

    def test_a_table_shows_them(self) -> None:
        console = Console(width=130, record=True)
        console.print(tables(made_up()))
        lines = [" ".join(line.split()) for line in console.export_text().splitlines()]
        assert "streamcnn, 1GiB 3.00 s 3 to 30 1.50 6 0.1 1.00 k 200 bytes 0.25 199 bytes" in lines
        assert "checkpoint per block failed" in lines
        assert "no memory" in lines


class TestTheFigure:
    def test_it_is_drawn_from_the_newest_records(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(records, "RESULTS", tmp_path)
        old = results.Result("net 64x64", "cpu", "a processor", made_up().rows[:1])
        for each in (old, made_up(), made_up("other 16x3x8x8 inference")):
            results.record(each, "test")
        assert results.newest() == [made_up(), made_up("other 16x3x8x8 inference")]
        done = command("--figure", "--out", tmp_path / "images")
        assert done.exit_code == 0, done.output
        written = sorted(path.name for path in (tmp_path / "images").iterdir())
        assert written == ["speed_net_64x64_cpu.png", "speed_other_16x3x8x8_inference_cpu.png"]
        assert all((tmp_path / "images" / name).stat().st_size > 10_000 for name in written)

    def test_only_of_the_model_that_is_named(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(records, "RESULTS", tmp_path)
        for name in ("net 64x64", "other 64x64"):
            results.record(made_up(name), "test")
        command("other", "--figure", "--out", tmp_path / "images")
        assert [path.name for path in (tmp_path / "images").iterdir()] == ["speed_other_64x64_cpu.png"]

    def test_nothing_recorded_draws_nothing(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(records, "RESULTS", tmp_path)
        assert command("--figure", "--out", tmp_path).exit_code == 0


class TestCases:
    def test_those_of_inference_have_no_checkpoints(self) -> None:
        case = Case("net", 8, ("1GB", "2GB"), inference=True, autocast=True)
        assert case.name == "net 8x8 bfloat16 inference"
        assert [kind.label for kind in kinds_of(case, DEFAULT_KINDS["cuda"])] == [
            "plain, channels_last",
            "plain, as it comes",
            "compiled",
            "streamcnn, channels_last, 1GB",
            "streamcnn, channels_last, 2GB",
            "streamcnn, compiled, 1GB",
            "streamcnn, compiled, 2GB",
        ]

    def test_the_standard_ones_can_be_told_apart(self) -> None:
        for device, cases in STANDARD.items():
            assert len({case.name for case in cases}) == len(cases)
            kinds = {kind.name for case in cases for kind in kinds_of(case, DEFAULT_KINDS[device])}
            assert {YARDSTICKS[device].seconds, YARDSTICKS[device].memory} <= kinds
        assert STANDARD["cpu"][-1].name == "resnet18 16x3x128x128"

    def test_a_process_is_told_all_but_other_budgets(self) -> None:
        task = Task(SMALL, kinds_of(SMALL, ["streamed"])[1], "cpu", 2)
        told = Task.from_json(task.to_json())
        assert (told.kind, told.device, told.threads) == (task.kind, "cpu", 2)
        assert (told.case.model, told.case.shape) == (UNET, (1, 3, 64, 64))


def test_a_model_that_is_none_starts_no_process() -> None:
    found = command("no_such_model", "--size", 64, "--budget", "1GiB", "--no-record")
    assert found.exit_code == 2
    assert "no timm model 'no_such_model'" in found.output
    assert "starting" not in found.output


def test_an_error_that_a_user_can_act_on_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [
        "run",
        "--budget",
        "1GB",
        "--scale",
        "tiny",
        "--digits",
        tmp_path / "gone",
        "--work",
        tmp_path,
    ]
    monkeypatch.setattr("sys.argv", ["benchmarks", *map(str, arguments)])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 1
    assert capsys.readouterr().err.startswith(f"benchmarks: error: no folder {tmp_path / 'gone'}: name one")
