"""Kept blocks in whole processes: ``kept_blocks_cases.py``, and how processes end."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from streaming_cases import TOLERANCE

from streamcnn.ceiling import kept_blocks

MIB = 2**20
MB = 10**6

pytestmark = pytest.mark.skipif(
    not kept_blocks.kept_blocks_available(), reason="there is no compiler, or blocks are not to be kept"
)


def run_python(*arguments: str | Path, **variables: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[1]), **variables},
    )


@pytest.fixture(scope="module")
def results() -> Any:
    """What each of ``kept_blocks_cases.py`` returned."""
    run = run_python(Path(__file__).with_name("kept_blocks_cases.py"))
    assert run.returncode == 0, run.stderr
    print(run.stderr)
    return json.loads(run.stdout)


def test_where_the_kernel_refuses_memory_free_blocks_go_back_first(results: Any) -> None:
    result = results["refused_mappings"]
    before, after = result["free"]
    assert before == 16 * MIB
    fits, too_large = result["errors"]
    # 16 MiB free in pieces of one, and one that the limit leaves.
    assert fits is None
    assert too_large[0]
    assert "can't allocate memory: you tried to allocate 67108864 bytes; 16777216 are in use" in too_large[1]
    assert after == 0
    assert result["later"] is None


def test_what_onednn_takes_in_a_pass_may_be_freed_after_it(results: Any) -> None:
    result = results["onednn_outlives_its_pass"]
    assert result["taken"] >= 64 * 64 * 81 * 4
    assert result["equal"] == [True, True]
    assert result["left"] == 0


def test_forked_children_are_in_no_pass_and_may_begin_their_own(results: Any) -> None:
    result = results["forked_children"]
    assert result["children"] == [True] * 30
    assert result["parent"] == [True, 5, MIB]


def test_a_dataloaders_workers_are_in_no_pass(results: Any) -> None:
    assert results["workers"] == [list(range(8))]


def test_a_streamed_update_is_exact_and_keeps_what_it_may_until_it_is_released(results: Any) -> None:
    result = results["streamed"]
    assert max(result["errors"]) <= TOLERANCE
    first, second, released, again, collected = result["kept"]
    assert 0 < min(first, second, again)
    assert max(first, second, again) <= result["kept_bytes"] < 100 * MIB
    assert (released, collected) == (0, 0)
    # Library code that runs for the first time is resident, and no part of the limit.
    assert result["measured"] <= 100 * MIB + 10 * MB
    assert result["after"] is False


def test_from_the_second_update_on_pages_are_there(results: Any) -> None:
    result = results["page_faults"]
    # 280,000 where the C library gives blocks back, 30,000 in the first update.
    assert all(each < 20_000 for each in result["faults"][1:])
    assert result["retries"] == [0, 0, 0]
    assert all(each <= 256 * MIB for each in result["measured"])


def test_a_pass_with_another_plan_keeps_no_more_than_that_is_to_take(results: Any) -> None:
    (large, _), (small, may_keep) = results["another_plan"]
    assert small <= may_keep < large


def test_overlapping_passes_on_two_threads_have_a_ceiling_each(results: Any) -> None:
    found, is_restored = results["two_threads"]
    assert found == {"40": [True, True], "200": [True, True]}
    assert is_restored


ENDING = """
import atexit, threading, torch
from streamcnn.ceiling.kept_blocks import KeptBlocks, kept_blocks_available
assert kept_blocks_available()
blocks = KeptBlocks()
blocks.enter()
alive = torch.ones(2**20)
held = threading.Event()

def hold():
    mine = KeptBlocks()
    mine.enter()
    tensor = torch.ones(2**20)
    held.set()
    threading.Event().wait()

threading.Thread(target=hold, daemon=True).start()
held.wait()

atexit.register(lambda: print(int(torch.ones(2**18).sum())))
{end}
"""


@pytest.mark.parametrize("end", ["", "raise SystemExit(0)", "alive.loop = alive", "blocks.leave()"])
def test_a_process_may_end_with_tensors_alive_and_in_a_pass(end: str) -> None:
    run = run_python("-c", ENDING.format(end=end))
    assert (run.returncode, run.stderr) == (0, "")
    assert run.stdout == f"{2**18}\n"
