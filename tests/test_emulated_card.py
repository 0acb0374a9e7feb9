"""The GPU that is emulated, and the tests marked ``gpu`` on it, in processes of their own."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import emulated_card
import pytest

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="needs a C++ compiler")

TESTS = Path(__file__).parent
FOR_LONG = "efficientnet or convnextv2 or resnet18 or in_flight"
"""Tests of `make test-card` that are left out here, since others on the CPU are like them."""


def run(*arguments: str | Path) -> str:
    """Run Python where the card is; its standard output."""
    paths = os.pathsep.join(map(str, (TESTS, TESTS.parent)))
    environment = {**os.environ, emulated_card.VARIABLE: "1", "PYTHONPATH": paths, "STREAMCNN_TRITON": "0"}
    found = subprocess.run(
        [sys.executable, *map(str, arguments)], env=environment, capture_output=True, text=True, timeout=900
    )
    assert found.returncode == 0, f"{found.stdout[-4000:]}\n{found.stderr[-4000:]}"
    return found.stdout


def test_tests_of_a_gpu() -> None:
    files = [TESTS / f"test_gpu{part}.py" for part in ("", "_code", "_kernels")]
    said = run("-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "gpu", "-k", f"not ({FOR_LONG})", *files)
    assert " passed" in said
    assert int(said.rpartition(" passed")[0].split()[-1]) > 50


CARD = """
import emulated_card
emulated_card.install()
import torch
from emulated_card import statistics

def on(stream):
    return torch.cuda.stream(stream)

there = torch.arange(4., device="cuda")
assert there.is_cuda and there.device == torch.device("cuda:0")

# A copy on another stream has not been made before something waits for it.
pinned, aside = torch.full((4,), 7., pin_memory=True), torch.cuda.Stream()
aside.wait_stream(torch.cuda.current_stream())
target = torch.zeros(4, device="cuda")
with on(aside):
    target.copy_(pinned, non_blocking=True)
print("before", target.tolist())
torch.cuda.current_stream().wait_stream(aside)
print("after", (target + 0).tolist())

# What the host reads before it has waited is not there.
host = torch.zeros(4, pin_memory=True)
host.copy_(there, non_blocking=True)
print("unread", host.isnan().all().item())
torch.cuda.synchronize()
print("read", host.tolist())

# A source that is let go of too early is lost.
source, host = torch.ones(4, device="cuda"), torch.zeros(4, pin_memory=True)
with on(aside):
    host.copy_(source, non_blocking=True)
del source
aside.synchronize()
print("lost", host.isnan().all().item())

# Memory is counted, and refused past the cap.
before = statistics().allocated
kept = torch.empty(2**20, device="cuda")
print("bytes", statistics().allocated - before)
torch.cuda.set_per_process_memory_fraction(statistics().reserved / emulated_card.TOTAL)
try:
    torch.empty(2**28, device="cuda")
except torch.OutOfMemoryError as error:
    print("refused", "out of memory" in str(error))

# Tensors on two devices do not meet.
try:
    there + torch.ones(4)
except RuntimeError as error:
    print("apart", "same device" in str(error))

# What makes the host wait is counted; the host's own work is not.
waits = statistics().num_waits
there.exp().sum()
print("waits", statistics().num_waits - waits)
there.sum().item()
print("waits", statistics().num_waits - waits)
"""


def test_it_is_as_late_and_as_strict_as_a_gpu(tmp_path: Path) -> None:
    program = tmp_path / "on_card.py"
    program.write_text(CARD)
    assert run(program).splitlines() == [
        "before [nan, nan, nan, nan]",
        "after [7.0, 7.0, 7.0, 7.0]",
        "unread True",
        "read [0.0, 1.0, 2.0, 3.0]",
        "lost True",
        "bytes 4194304",
        "refused True",
        "apart True",
        "waits 0",
        "waits 1",
    ]


STEP = """
import emulated_card
emulated_card.install()
import torch
from emulated_card import statistics
from gpu_cases import make_net, update
from streamcnn import StreamingModel

waits = []
for tile in (150, 64, 32):
    model = StreamingModel(make_net().cuda(), "4GB", tile=tile)
    model.resident_tail = False
    image = torch.randn(2, 3, 150, 131, device="cuda")
    update(model, image)
    before = statistics().num_waits
    model(image).square().sum().backward()
    waits.append(statistics().num_waits - before)
print(waits)
"""


def test_the_host_waits_as_often_however_small_tiles_are(tmp_path: Path) -> None:
    """At the end of each phase that reads the image, for whether its values are finite: two each way."""
    program = tmp_path / "step.py"
    program.write_text(STEP)
    assert run(program).strip() == "[4, 4, 4]"
