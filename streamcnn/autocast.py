"""Autocast as it was when a pass began, for its recomputation later."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


def autocast_state(device: torch.device) -> torch.dtype | None:
    """The ambient autocast dtype for ``device``, or ``None`` if autocast is off."""
    return torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else None


@contextmanager
def autocast(device: torch.device, dtype: torch.dtype | None, *, cache: bool = True) -> Iterator[None]:
    """Autocast as it was when the pass began, whatever it is now.

    Without the cache where tiles are differentiated one by one: a cached cast would keep the graph of
    the tile that made it.
    """
    with torch.autocast(device.type, dtype=dtype, enabled=dtype is not None, cache_enabled=cache):
        yield
