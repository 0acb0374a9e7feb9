"""What every test runs under: one thread, seeded, property tests the same on every run."""

from __future__ import annotations

import os

import hypothesis
import pytest
import torch

# Small tensors are slower on several threads, and tests may share the machine.
if "OMP_NUM_THREADS" not in os.environ:
    torch.set_num_threads(1)

hypothesis.settings.register_profile("steady", derandomize=True, deadline=None)
hypothesis.settings.load_profile("steady")


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)
