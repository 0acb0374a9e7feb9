"""The command that examines models of other libraries, and the processes that it does so in."""

from __future__ import annotations

import json
import time
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from benchmarks import record as records
from benchmarks.__main__ import app
from benchmarks.harness.processes import Deadline
from benchmarks.zoo import command as zoo
from benchmarks.zoo import results
from benchmarks.zoo.examination import Examination
from benchmarks.zoo.families import Family, families
from benchmarks.zoo.results import Row

# timm asks for a deprecated annotation when it is imported.
pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")

# --- the command -------------------------------------------------------------------------------------


class Made:
    """What stands in for a family's process."""

    is_over = True

    def __init__(self, family: Family, limit: float) -> None:
        self.family = family
        self.closed = 0
        made.append(self)

    def found(self) -> dict[str, Any]:
        return {"variant": "x", "excluded": "why"}

    def close(self) -> None:
        self.closed += 1


made: list[Made] = []


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where results go, and no process is started: a family's is faked."""
    monkeypatch.setattr(records, "RESULTS", tmp_path)
    monkeypatch.setattr(zoo, "PAGE", tmp_path / "page.md")
    monkeypatch.setattr(zoo, "Examination", Made)
    monkeypatch.setattr(zoo, "_INTERVAL", 0)
    return tmp_path


def command(*arguments: object) -> Result:
    return CliRunner().invoke(app, ["zoo", *map(str, arguments)])


def recorded(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "zoo.jsonl").read_text().splitlines()]


def test_the_command_goes_on_where_it_was(folder: Path) -> None:
    assert "1/1 torchvision/alexnet: excluded why" in command("--only", "torchvision/alex").output
    found = command("--only", "torchvision/", "--jobs", 2)
    assert found.exit_code == 0
    names = [line["family"] for line in recorded(folder)]
    assert len(names) == len(set(names)) == len(families("torchvision/"))
    (line, *_) = recorded(folder)
    assert {"date", "commit", "device", "torch", "command", "versions"} <= line.keys()
    assert "timm" in line["versions"]


def test_fresh_examines_again_and_the_last_record_counts(folder: Path) -> None:
    for options in ((), (), ("--fresh",)):
        command("--only", "torchvision/alex", *options)
    assert len(recorded(folder)) == 2
    assert len(results.newest()) == 1


def test_out_of_time_is_said_and_nothing_is_recorded(folder: Path) -> None:
    assert "goes on with 20 models" in command("--only", "torchvision/", "--seconds", 0).output
    assert not (folder / "zoo.jsonl").exists()


@pytest.mark.parametrize("ending", [None, KeyboardInterrupt])
def test_processes_are_ended_with_the_command(
    folder: Path, monkeypatch: pytest.MonkeyPatch, ending: type[BaseException] | None
) -> None:
    def sleep(seconds: float) -> None:
        monkeypatch.setattr(Deadline, "seconds_left", 0)
        if ending is not None:
            raise ending

    monkeypatch.setattr(Made, "is_over", False)
    monkeypatch.setattr(zoo.time, "sleep", sleep)
    made.clear()
    found = command("--only", "torchvision/", "--jobs", 2)
    assert [each.closed for each in made] == [1, 1]
    assert ("goes on with 20 models" in found.output) is (ending is None)
    assert not (folder / "zoo.jsonl").exists()


def test_table_writes_the_page_and_examines_nothing(folder: Path) -> None:
    command("--only", "torchvision/alex")
    assert command("--table").exit_code == 0
    assert "| torchvision x | why |" in (folder / "page.md").read_text()
    assert len(recorded(folder)) == 1
    assert f"Still to be examined: {len(families()) - 1} models." in (folder / "page.md").read_text()


# --- processes ---------------------------------------------------------------------------------------


def examined(family: Family, limit: float) -> dict[str, Any]:
    with closing(Examination(family, limit)) as examination:
        while not examination.is_over:
            time.sleep(0.1)
        return examination.found()


def test_a_process_that_ends_is_a_row() -> None:
    found = examined(Family("timm", "no such module"), 600)
    assert found["ended"].startswith("exit status 1: ")
    assert Row(Family("timm", "no such module"), found).verdict == results.UNFINISHED


def test_a_process_that_takes_too_long_is_a_row() -> None:
    found = examined(Family("timm", "resnet"), 0.01)
    assert found["ended"] == "out of time after 0.01 s"
    assert Row(Family("timm", "resnet"), found).reason == "out of time after 0.01 s"


@pytest.mark.slow
def test_a_real_process_tells_all_of_a_family() -> None:
    found = examined(Family("torchvision", "squeezenet"), 600)
    assert Row(Family("torchvision", "squeezenet"), found).verdict == results.EXACT
    assert found["plan"]["shape"] == [1, 3, 4000, 4000]
    assert found["plan"]["fits"]
    assert found["device"].endswith(", 1 threads")
