"""A short run of the fuzzer, the same every time, and that it sees each kind of fault."""

from __future__ import annotations

import faulthandler
import os
import re
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from fuzz import campaign, worker
from fuzz.campaign import keep, make_seeds, run, table
from fuzz.seeds import SEEDS
from fuzz.targets import TARGETS, Attempts, Target
from fuzz.worker import Case, make_case

from streamcnn.errors import CorruptImage

INPUTS = 25
"""Of each target, in the fast tests."""


@pytest.mark.parametrize("target", SEEDS)
def test_every_input_is_accepted_or_refused(tmp_path: Path, target: str) -> None:
    tally = run([target], 0, tmp_path, inputs=INPUTS)[target]
    assert tally.faults == {}
    assert tally.num_inputs == INPUTS
    assert tally.counts["refused"] > 0


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("target", SEEDS)
def test_many_inputs_are_accepted_or_refused(tmp_path: Path, target: str) -> None:
    assert run([target], 1, tmp_path, inputs=500)[target].faults == {}


def test_the_same_numbers_make_the_same_input(tmp_path: Path) -> None:
    make_seeds(tmp_path / "seeds", ["npy", "table"])
    for target in ("npy", "table"):
        made = []
        for folder in (tmp_path / f"{target} a", tmp_path / f"{target} b"):
            folder.mkdir()
            done = make_case(Case(target, 3, 5), tmp_path / "seeds", folder)
            files = {path.name: path.read_bytes() for path in folder.iterdir()}
            made.append((done, files))
        assert made[0] == made[1]


Wrong = Callable[[Path], object]


def _looks_beside(folder: Path) -> None:
    (folder.parent / "canary" / "secret").read_text()


def _writes_beside(folder: Path) -> None:
    (folder.parent / "canary" / "more").write_text("")


def _lists_beside(folder: Path) -> None:
    os.listdir(folder.parent)


def _aborts(folder: Path) -> None:
    # It is meant to: a dump of where would be taken for a fault of the tests.
    faulthandler.disable()
    os.abort()


def _says_nothing(folder: Path) -> None:
    raise CorruptImage("")


FAULTS: list[tuple[str, Wrong, str]] = [
    ("fault", lambda folder: {}["key"], "KeyError: 'key'"),
    ("fault", lambda folder: bytearray(worker.MEMORY_BYTES + 2**24), "MemoryError"),
    ("fault", _says_nothing, "text of 14 characters"),
    ("escape", _looks_beside, "open '.*/canary/secret'"),
    ("escape", _writes_beside, "open '.*/canary/more'"),
    ("escape", _lists_beside, "os.listdir"),
    ("escape", lambda folder: os.system("true"), "os.system"),
    ("death", _aborts, "the process ended with -6"),
    ("hang", lambda folder: time.sleep(60), "no answer within 1 s"),
]


@pytest.mark.parametrize(("kind", "wrong", "text"), FAULTS, ids=lambda value: str(value)[:20])
def test_each_kind_of_fault_is_seen(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, wrong: Wrong, text: str
) -> None:
    calls: list[Path] = []

    def use(folder: Path, attempts: Attempts) -> None:
        calls.append(folder)
        with attempts.attempt():
            if len(calls) > 1:  # the valid file is opened first
                wrong(folder)

    monkeypatch.setitem(TARGETS, "npy", Target(use, TARGETS["npy"].files))
    monkeypatch.setattr(campaign, "SECONDS", 1.0)
    tallies = run(["npy"], 0, tmp_path, inputs=2)
    assert tallies["npy"].counts[kind] >= 1
    assert tallies["npy"].counts.total() == 2
    (line, *_) = keep(tallies, tmp_path, tmp_path / "found")
    assert re.search(text, line)
    (case, *_) = sorted((tmp_path / "found").iterdir())
    assert {path.name for path in case.iterdir()} == {"fault.json", "input"}
    assert kind in table(tallies)
