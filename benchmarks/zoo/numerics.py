"""A model streamed and plain in float64, as far as rounding lets one tell."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from typing import Any
from unittest.mock import patch

from torch import Tensor, nn

from benchmarks.zoo.states import Shape, calibrated, randomized
from streamcnn.verification import Verification, rounding, verify

TOLERANCE = 1e-9
"""Largest error of a streamed pass that is exact."""
ROUNDING = 100
"""How many times plain PyTorch's error against itself an error above the tolerance may be: two plain passes
sum in the same order, so that much of their rounding is alike."""


def compare(net: nn.Module, shape: Shape, *, train: bool) -> dict[str, Any]:
    """What `verify` finds of a copy of ``net`` with a state that shows errors, ready for a line of JSON.

    The tiles are four, each with a halo on two sides: more would take longer and show no more.

    Raises
    ------
    UnsupportedModel
        If the model cannot be captured.
    """
    ready = randomized(copy.deepcopy(net))
    ready = ready.train() if train else calibrated(ready, shape)
    # Some models compute a part in float32 whatever their type, and would be compared to its rounding.
    with patch.object(Tensor, "float", Tensor.double):
        found = verify(ready, shape, tile=-(-max(shape[2:]) // 2))
        noise: Mapping[str, float] = {}
        if found.max_error > TOLERANCE:
            noise = rounding(ready, shape)
    return {"mode": "train" if train else "eval", "shape": shape, **judged(found, noise)}


def judged(found: Verification, noise: Mapping[str, float]) -> dict[str, Any]:
    """The errors of a streamed pass, with those set apart that plain PyTorch has against itself."""
    blurred = {name for name, error in noise.items() if error * ROUNDING > TOLERANCE}
    clear = {name: error for name, error in found.errors.items() if name not in blurred}
    wrong = {name: error for name, error in clear.items() if not error <= TOLERANCE}
    wrong |= {
        name: found.errors[name]
        for name in blurred & found.errors.keys()
        if not found.errors[name] <= ROUNDING * noise[name]
    }
    return {
        "error": max(clear.values(), default=math.inf),
        "compared": len(found.errors),
        "blurred": len(blurred),
        "wrong": dict(sorted(wrong.items(), key=lambda item: -item[1])[:5]),
        "num_wrong": len(wrong),
        "tiles": found.num_tiles,
        "phases": found.num_phases,
        "residents": len(found.residents),
    }
