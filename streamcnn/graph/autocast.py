"""Autocast: its state when a pass began, for recomputation, and the state that blocks of a model set."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch

_NOTHING = nullcontext()


@dataclass(frozen=True, slots=True)
class Casts:
    """Autocast as set by a block of the user's forward pass, whatever its state around the pass."""

    device_type: str
    dtype: torch.dtype | None
    """The dtype that values are cast to; ``None`` for no casts."""


def autocast_state(device: torch.device) -> torch.dtype | None:
    """The ambient autocast dtype for ``device``, or ``None`` if autocast is off."""
    return torch.get_autocast_dtype(device.type) if _is_enabled(device) else None


def _is_enabled(device: torch.device) -> bool:
    # PyTorch raises for types without autocast, such as "meta".
    return torch.amp.is_autocast_available(device.type) and torch.is_autocast_enabled(device.type)


def autocast(
    device: torch.device, dtype: torch.dtype | None, *, cache: bool = True
) -> AbstractContextManager[Any]:
    """Set autocast for the block to its state when the pass began, whatever it is now.

    Use no cache where tiles are differentiated one by one, as a cached cast would keep its tile's graph.
    """
    if dtype is None and not torch.is_autocast_enabled(device.type):
        # This is entered several times for each tile.
        return _NOTHING
    return torch.autocast(device.type, dtype=dtype, enabled=dtype is not None, cache_enabled=cache)


def as_recorded(*, grad: bool, casts: Casts | None) -> AbstractContextManager[Any]:
    """Enter the modes of the blocks around an operator in the forward pass: no gradients, its own casts."""
    if casts is None:
        return _NOTHING if grad else torch.no_grad()
    return _blocks(grad, casts)


@contextmanager
def _blocks(grad: bool, casts: Casts) -> Iterator[None]:
    device = torch.device(casts.device_type)
    with nullcontext() if grad else torch.no_grad(), autocast(device, casts.dtype, cache=False):
        yield
