"""Autocast as it was when a pass began, for its recomputation later, and as blocks of a model set it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch

_NOTHING = nullcontext()


@dataclass(frozen=True, slots=True)
class Casts:
    """Autocast as a block of the user's forward pass sets it, whatever it is around the pass."""

    device_type: str
    dtype: torch.dtype | None
    """What is cast to; ``None`` for no casts."""


def autocast_state(device: torch.device) -> torch.dtype | None:
    """The ambient autocast dtype for ``device``, or ``None`` if autocast is off."""
    return torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else None


def autocast(
    device: torch.device, dtype: torch.dtype | None, *, cache: bool = True
) -> AbstractContextManager[Any]:
    """Autocast as it was when the pass began, whatever it is now.

    Without the cache where tiles are differentiated one by one: a cached cast would keep the graph of
    the tile that made it.
    """
    if dtype is None and not torch.is_autocast_enabled(device.type):
        # Entered several times a tile.
        return _NOTHING
    return torch.autocast(device.type, dtype=dtype, enabled=dtype is not None, cache_enabled=cache)


def as_recorded(*, grad: bool, casts: Casts | None) -> AbstractContextManager[Any]:
    """What an operator's own block of the forward pass sets: no gradient, casts of its own."""
    if grad and casts is None:
        return _NOTHING
    return _blocks(grad, casts)


@contextmanager
def _blocks(grad: bool, casts: Casts | None) -> Iterator[None]:
    with ExitStack() as blocks:
        if not grad:
            blocks.enter_context(torch.no_grad())
        if casts is not None:
            blocks.enter_context(autocast(torch.device(casts.device_type), casts.dtype, cache=False))
        yield
