"""Building the allocator on the user's machine, and machines where it cannot be built."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import textwrap
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from helpers import no_home

from streamcnn.ceiling import building
from streamcnn.ceiling.building import CannotBuild, built, loaded

UPDATE = """
import torch
from torch import nn
from streamcnn import StreamingModel
torch.manual_seed(0)
net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(1)).double()
model = StreamingModel(net, "200MiB", tile=100)
for _ in range(2):
    model(torch.rand(1, 3, 200, 200, dtype=torch.float64)).square().sum().backward()
print(net[0].weight.grad.norm().item(), net[1].running_mean.norm().item())
"""


def update(cache: Path, **variables: str) -> tuple[str, str]:
    """What two updates in a process of their own print, on either stream."""
    environment = {
        **os.environ,
        "PYTHONPATH": str(Path(__file__).parents[1]),
        "STREAMCNN_CALIBRATION": "off",
        "XDG_CACHE_HOME": str(cache),
        "STREAMCNN_KEEP_BLOCKS": "1",
        **variables,
    }
    run = subprocess.run(
        [sys.executable, "-c", UPDATE], capture_output=True, text=True, check=False, env=environment
    )
    assert run.returncode == 0, run.stderr
    return run.stdout, run.stderr


def compiler(folder: Path, script: str) -> Path:
    """A compiler that writes what it is called with beside itself, and does what the script says."""
    path = folder / "compiler"
    path.write_text(f'#!/bin/sh\necho "$@" >> {folder}/calls\n{textwrap.dedent(script)}')
    path.chmod(0o755)
    return path


WRITES_ITS_PROCESS_NUMBER = """
for last; do :; done
sleep 0.1
echo $$ > "$last"
"""


@pytest.fixture
def source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file to be built, with an empty cache."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    path = tmp_path / "source.cpp"
    path.write_text("// first")
    return path


@pytest.mark.skipif(sys.platform != "linux", reason="blocks are kept on Linux alone")
def test_without_a_compiler_results_are_the_same_and_one_warning_says_so(tmp_path: Path) -> None:
    without, warned = update(tmp_path / "empty", PATH="")
    silent, nothing = update(tmp_path / "empty", PATH="", STREAMCNN_KEEP_BLOCKS="0")
    # Built anew where there is a compiler.
    found, _ = update(tmp_path / "full")
    assert found == silent == without
    assert nothing == ""
    assert warned.count("UserWarning") == 1
    assert "is not used: no C++ compiler was found (g++, c++, clang++)" in warned
    assert "STREAMCNN_KEEP_BLOCKS=0 in the environment silences this" in warned


def test_what_is_built_is_kept_until_the_source_changes(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CXX", f"{compiler(tmp_path, WRITES_ITS_PROCESS_NUMBER)} --option")
    first, again = built(source), built(source)
    source.write_text("// second")
    assert first == again != built(source)
    calls = (tmp_path / "calls").read_text().splitlines()
    assert len(calls) == 2
    assert all(call.startswith("--option -O2 -std=c++20") and "-lc10" in call for call in calls)


def test_several_may_build_at_the_same_time(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CXX", str(compiler(tmp_path, WRITES_ITS_PROCESS_NUMBER)))
    with ThreadPoolExecutor(4) as threads:
        (library,) = set(threads.map(built, [source] * 4))
    assert library.read_text().strip().isdecimal()
    assert list(library.parent.iterdir()) == [library]


@pytest.mark.parametrize(
    ("script", "reason"),
    [
        (
            "echo 'source.cpp:3: error: no such thing' >&2; exit 1",
            "failed: source.cpp:3: error: no such thing",
        ),
        ("exit 3", "failed: exit status 3"),
        ("exit 0", "cannot be written to"),
    ],
    ids=["error", "silent", "nothing made"],
)
def test_a_compiler_that_fails_is_a_reason(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str, reason: str
) -> None:
    monkeypatch.setenv("CXX", str(compiler(tmp_path, script)))
    with pytest.raises(CannotBuild, match=reason):
        built(source)


def test_a_place_that_cannot_be_written_to_is_a_reason(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CXX", str(compiler(tmp_path, WRITES_ITS_PROCESS_NUMBER)))
    (tmp_path / "cache").write_text("a file")
    with pytest.raises(CannotBuild, match="cannot be written to"):
        built(source)


def test_a_compiler_that_hangs_is_not_waited_for(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CXX", str(compiler(tmp_path, "exec sleep 60")))
    monkeypatch.setattr(building, "_SECONDS", 0.2)
    with pytest.raises(CannotBuild, match="timed out"):
        built(source)


def test_a_compiler_that_is_not_there_is_a_reason(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler -O0")
    with pytest.raises(CannotBuild, match=r"no C\+\+ compiler was found \(no-such-compiler -O0\)"):
        built(source)


MAKES_A_LIBRARY = """
for last; do :; done
echo 'int answer() { return 42; }' | cc -x c -shared -fPIC -o "$last" -
"""


@pytest.mark.parametrize("obstacle", ["no folder", "no home", "no code"])
def test_where_the_cache_cannot_keep_it_a_process_builds_it_for_itself(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, obstacle: str
) -> None:
    monkeypatch.setenv("CXX", str(compiler(tmp_path, MAKES_A_LIBRARY)))
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    if obstacle == "no folder":
        (tmp_path / "cache").write_text("a file")
    elif obstacle == "no home":
        monkeypatch.delenv("XDG_CACHE_HOME")
        monkeypatch.setattr(Path, "home", no_home)
    else:
        built(source).write_text("what the system cannot load")
    assert loaded(source).answer() == 42
    assert not [*(tmp_path / "temporary").iterdir()]


def test_without_any_place_both_reasons_are_said(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CXX", str(compiler(tmp_path, MAKES_A_LIBRARY)))
    (tmp_path / "cache").write_text("a file")
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "cache"))
    with pytest.raises(CannotBuild, match=r"cannot be written to.*for this process alone"):
        loaded(source)
