"""The random states of Python, NumPy and PyTorch, on which a model and its data may draw."""

from __future__ import annotations

import random
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from streamcnn.data.sampling import seed_of


def seed_all(seed: int) -> None:
    """Seed all random generators."""
    torch.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed % 2**32)


def seed_for(*place: object) -> None:
    """Seed all random generators by a place in a run, such as an epoch and a batch."""
    # PyTorch takes half of its bits.
    seed_all(seed_of(" ".join(map(str, place))) % 2**64)


def random_states(device: torch.device) -> dict[str, Any]:
    """The states of all generators, as plain values and tensors."""
    name, words, *rest = np.random.get_state(legacy=True)
    return {
        "python": random.getstate(),
        "numpy": (name, words.tolist(), *rest),  # type: ignore[union-attr]
        "torch": torch.get_rng_state(),
        "device": torch.cuda.get_rng_state(device) if device.type == "cuda" else None,
    }


def set_random_states(states: Mapping[str, Any], device: torch.device) -> None:
    """Restore the states that :func:`random_states` returned."""
    random.setstate(states["python"])
    np.random.set_state(states["numpy"])
    torch.set_rng_state(states["torch"])
    if states["device"] is not None and device.type == "cuda":
        torch.cuda.set_rng_state(states["device"], device)
