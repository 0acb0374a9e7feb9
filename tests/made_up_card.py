"""A made-up card with a budget, and the gauge that reads it."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from typing import Any

import torch
from fake_cuda import CONTEXT, FakeCuda
from fake_nvml import Device, FakeNvml, Process

from streamcnn.ceiling.cuda import MARGIN_BYTES
from streamcnn.ceiling.gauge import Gauge
from streamcnn.ceiling.nvml import Nvml

MB, GB = 10**6, 10**9
GPU = torch.device("cuda:0")
BUDGET = 2 * GB
CAP = BUDGET - CONTEXT - MARGIN_BYTES


def make_card(*, listed: bool = True, others: int = 0, **options: Any) -> tuple[FakeCuda, Gauge]:
    """A card with NVML that lists this process or not."""
    process = Process(os.getpid(), 0)
    card = Device("GPU-aaaa", processes=[process] if listed else [])
    fake = FakeCuda(card, process, others=others, **options)
    return fake, Gauge(GPU, Nvml.open(FakeNvml(card)), {}, cuda=fake)


def sampling_threads() -> list[str]:
    """The names of the running threads that read a card."""
    return [t.name for t in threading.enumerate() if t.name == "streamcnn-sampler"]


def wait_until(condition: Callable[[], bool]) -> None:
    until = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < until, "nothing happened within 10 seconds"
        time.sleep(0.001)
