"""The UltraMNIST harness: results, tables and figures."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import record as records
from benchmarks.harness.results import Key, read, record
from benchmarks.harness.scales import SCALES
from benchmarks.harness.table import markdown, measured, write_table
from streamcnn.errors import CannotWrite
from streamcnn.support.units import parse_bytes

TINY = SCALES["tiny"]


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


def test_results_are_lines_of_json(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    results(tmp_path, monkeypatch)
    lines = [json.loads(line) for line in (tmp_path / "ultramnist_tiny.jsonl").read_text().splitlines()]
    assert {"date", "commit", "device", "torch", "command"} <= lines[0].keys()


def test_a_table_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(CannotWrite, match=r"cannot write .*file: .*: give a folder that you may write to"):
        write_table(SCALES["tiny"], tmp_path / "file")
