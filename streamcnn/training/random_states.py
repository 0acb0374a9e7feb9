"""Everything random that a model or its data may draw from."""

from __future__ import annotations

import random
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from streamcnn.data.sampling import seed_of


def seed_all(seed: int) -> None:
    """Begin all of it anew."""
    torch.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed % 2**32)


def seed_for(*place: object) -> None:
    """Begin all of it anew in a way that a place in a run decides."""
    # PyTorch takes half of its bits.
    seed_all(seed_of(" ".join(map(str, place))) % 2**64)


def random_states(device: torch.device) -> dict[str, Any]:
    """All random states, as plain values and tensors."""
    name, words, *rest = np.random.get_state(legacy=True)
    return {
        "python": random.getstate(),
        "numpy": (name, words.tolist(), *rest),  # type: ignore[union-attr]
        "torch": torch.get_rng_state(),
        "device": torch.cuda.get_rng_state(device) if device.type == "cuda" else None,
    }


def set_random_states(states: Mapping[str, Any], device: torch.device) -> None:
    """Go on from such states."""
    random.setstate(states["python"])
    np.random.set_state(states["numpy"])
    torch.set_rng_state(states["torch"])
    if states["device"] is not None and device.type == "cuda":
        torch.cuda.set_rng_state(states["device"], device)
