"""A stand-in for the part of ``torch.cuda`` that the ceiling uses, for a card that a test makes up.

``tests/test_ceiling_cuda_process.py`` compares its signatures with the real module's.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from fake_nvml import Device, Process

CONTEXT = 500 * 2**20
"""Bytes that the context takes."""


class FakeCuda:
    """One card with PyTorch's allocator; reserved memory shows in NVML's numbers.

    Parameters
    ----------
    device
        The card as NVML sees it, or None.
    process
        This process in NVML's list, or None where it is not listed.
    overhead
        Bytes outside the allocator.
    others
        Bytes in use by other processes.
    """

    def __init__(
        self,
        device: Device | None = None,
        process: Process | None = None,
        *,
        overhead: int = CONTEXT,
        others: int = 0,
        total: int = 80 * 10**9,
        uuid: str = "aaaa",
    ) -> None:
        self.device = device
        self.process = process
        self.overhead = overhead
        self.others = others
        self.total = total
        self.uuid = uuid
        self.live = self.cached = self.peak = 0
        self.fraction = 1.0
        self.fractions: list[float] = []
        self.num_emptied = 0
        self.initialised = True
        self._show()

    def _show(self) -> None:
        held = self.overhead + self.live + self.cached
        if self.device is not None:
            self.device.used = held + self.others
        if self.process is not None:
            self.process.usedGpuMemory = held

    def allocate(self, nbytes: int) -> None:
        """Allocate a tensor by PyTorch's allocator."""
        fresh = max(0, nbytes - self.cached)
        allowed = min(self.fraction * self.total, self.total - self.overhead - self.others)
        if self.live + self.cached + fresh > allowed:
            raise torch.OutOfMemoryError(f"CUDA out of memory. Tried to allocate {nbytes} bytes")
        self.cached -= min(self.cached, nbytes)
        self.live += nbytes
        self.peak = max(self.peak, self.live + self.cached)
        self._show()

    def free(self, nbytes: int) -> None:
        """Free a tensor, whose memory stays cached."""
        self.live -= nbytes
        self.cached += nbytes
        self._show()

    def grow(self, nbytes: int) -> None:
        """Take memory past the allocator, as a kernel that is loaded does."""
        self.overhead += nbytes
        self._show()

    # --- torch.cuda's -------------------------------------------------------------------------------

    def is_initialized(self) -> bool:
        return self.initialised

    def get_device_properties(self, device: Any = None) -> SimpleNamespace:
        return SimpleNamespace(uuid=self.uuid, total_memory=self.total)

    def mem_get_info(self, device: Any = None) -> tuple[int, int]:
        return self.total - self.overhead - self.others - self.live - self.cached, self.total

    def memory_stats_as_nested_dict(self, device: Any = None) -> dict[str, Any]:
        return {
            "allocated_bytes": {"all": {"current": self.live}},
            "reserved_bytes": {"all": {"current": self.live + self.cached, "peak": self.peak}},
        }

    def reset_peak_memory_stats(self, device: Any = None) -> None:
        self.peak = self.live + self.cached

    def get_per_process_memory_fraction(self, device: Any = None) -> float:
        return self.fraction

    def set_per_process_memory_fraction(self, fraction: float, device: Any = None) -> None:
        assert isinstance(fraction, float)
        assert 0 <= fraction <= 1
        self.fraction = fraction
        self.fractions.append(fraction)

    def empty_cache(self) -> None:
        self.num_emptied += 1
        self.cached = 0
        self._show()
