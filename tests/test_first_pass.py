"""The first pass of a process, in whatever state it is: what is made ready once is made ready there."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = """
import copy, os, random, sys, traceback
import torch._dynamo
import torch
from torch import nn
from streamcnn import StreamingModel

STATES = {
    "inference_mode": torch.inference_mode,
    "no_grad": torch.no_grad,
    "another device": lambda: torch.device("meta"),
    "save_on_cpu": torch.autograd.graph.save_on_cpu,
    "no hooks": lambda: torch.autograd.graph.disable_saved_tensors_hooks("none"),
}

class Net(nn.Module):
    def __init__(self, draws):
        super().__init__()
        self.conv, self.norm, self.draws = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), draws

    def forward(self, x):
        if self.draws:
            random.random()
        return self.norm(self.conv(x)).square().mean((2, 3))

def run(state, draws):
    torch.manual_seed(0)
    net = Net(draws).double()
    plain, x = copy.deepcopy(net), torch.randn(1, 3, 40, 40, dtype=torch.float64)
    model = StreamingModel(net, "300 MB", tile=24)
    with state():
        first, expected = model(x), plain(x)
    torch.testing.assert_close(first, expected, rtol=1e-9, atol=1e-12)
    for each in (model, plain):
        each(x).square().sum().backward()
    gradients, expected = ([p.grad for p in each.parameters()] for each in (net, plain))
    torch.testing.assert_close(gradients, expected, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(net.state_dict(), plain.state_dict())

failed = []
for name, state in STATES.items():
    for draws in (False, True):
        child = os.fork()
        if not child:
            try:
                run(state, draws)
                os._exit(0)
            except BaseException:
                traceback.print_exc()
            finally:
                sys.stderr.flush()
                os._exit(1)
        if os.waitpid(child, 0)[1]:
            failed.append((name, draws))
sys.exit(f"failed: {failed}" if failed else 0)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="ceilings on the CPU need Linux")
def test_whatever_is_around_it() -> None:
    environment = {
        **os.environ,
        "PYTHONPATH": str(Path(__file__).parents[1]),
        "STREAMCNN_CALIBRATION": "off",
    }
    run = subprocess.run(
        [sys.executable, "-c", SCRIPT],
        capture_output=True,
        text=True,
        check=False,
        env=environment,
    )
    assert run.returncode == 0, run.stderr
