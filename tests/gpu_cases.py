"""A net, an update of it, and a comparison of two updates, for tests on a CUDA device."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import emulated_card
import torch
from torch import Tensor, nn

GPU = torch.device("cuda:0")
SHAPE = (2, 3, 150, 131)


def make_net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.MaxPool2d(3, 2, 1),
        nn.Conv2d(4, 6, 3, stride=2),
        nn.BatchNorm2d(6, momentum=None),
        nn.SiLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(6, 3),
    )


HOLDER = """
import sys, torch
free, _ = torch.cuda.mem_get_info()
held = torch.empty(free - int(sys.argv[1]), dtype=torch.uint8, device="cuda")
print("held", flush=True)
sys.stdin.read()
"""


@contextmanager
def others_leave(nbytes: int) -> Iterator[None]:
    """Have another process leave ``nbytes`` of the card free."""
    if emulated_card.is_wanted():
        with emulated_card.held_by_others(torch.cuda.mem_get_info(GPU)[0] - nbytes):
            yield
        return
    program = [sys.executable, "-c", HOLDER, str(nbytes)]
    # At the end its input is closed.
    with subprocess.Popen(program, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == b"held\n"
        yield


def update(model: nn.Module, image: Tensor) -> dict[str, Tensor]:
    """All results of one forward and backward pass."""
    output = model(image)
    output.square().sum().backward()
    gradients = {f"gradient of {name}": p.grad for name, p in model.named_parameters() if p.grad is not None}
    buffers = {f"buffer {name}": buffer.clone() for name, buffer in model.named_buffers()}
    return {"output": output.detach(), **gradients, **buffers}


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float) -> None:
    """Assert that each value is within ``tolerance`` of the largest of its kind; some are rounding alone."""
    assert found.keys() == expected.keys()
    for kind in ("output", "gradient", "buffer"):
        names = [name for name in expected if name.startswith(kind)]
        largest = max(float(expected[name].double().abs().max()) for name in names)
        for name in names:
            distance = float((found[name].double() - expected[name].double()).abs().max())
            assert distance <= tolerance * largest, f"{name}: {distance:.2e} of {largest:.2e}"
