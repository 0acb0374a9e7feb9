"""Start of zarr's threads before memory is limited.

Zarr reads and decodes chunks on an event loop's thread and a thread pool, which it starts at first use. A
limit on memory would count the stack of each thread, 8 MiB, and might refuse it.
"""

from __future__ import annotations

import asyncio
import os
import time

from zarr.core.sync import sync

from streamcnn.data.sources.files import PerProcess

_WAIT = 0.002
"""Seconds that each task sleeps, so that no thread is free for the next one."""


def start_zarr_threads() -> None:
    """Start all of zarr's threads, once in every process."""
    _started.get()


def _start() -> bool:
    # As many as Python's default pools have; zarr's setting, if any, is smaller.
    sync(_occupy(min(32, (os.cpu_count() or 1) + 4)))
    return True


async def _occupy(num_threads: int) -> None:
    await asyncio.gather(*(asyncio.to_thread(time.sleep, _WAIT) for _ in range(num_threads)))


_started = PerProcess(_start)
