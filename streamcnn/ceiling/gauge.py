"""Measure what this process holds on one CUDA device, and cap PyTorch's allocator there."""

from __future__ import annotations

import os
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch

from streamcnn.ceiling.caps import LowestCap
from streamcnn.ceiling.nvml import Nvml, Reading, Source

ASSUMED_OVERHEAD = 2**30
"""Bytes outside the allocator if neither NVML nor CUDA tells: more than context, cuDNN and cuBLAS take."""


@dataclass(frozen=True, slots=True)
class Overhead:
    """Bytes on the device outside PyTorch's allocator: CUDA's context and loaded libraries."""

    nbytes: int
    source: Source
    """The name of a reading that adds this to the allocator's peak."""


class Gauge:
    """Reads and caps one CUDA device's memory.

    Parameters
    ----------
    device
        A CUDA device with an index.
    nvml
        A session with NVML; None where there is none.
    idle
        By a device's UUID in NVML: bytes in use before this process had a CUDA context, as far as known.
    cuda
        The module ``torch.cuda``, or a stand-in.
    """

    def __init__(
        self, device: torch.device, nvml: Nvml | None, idle: dict[str, int], *, cuda: Any = torch.cuda
    ) -> None:
        self.device = device
        self._cuda = cuda
        self._nvml = nvml
        self._handle: Any = None
        self._idle: int | None = None
        self._fractions = LowestCap[float](
            lambda: cuda.get_per_process_memory_fraction(device),
            lambda fraction: cuda.set_per_process_memory_fraction(fraction, device),
        )
        if nvml is not None:
            uuid = str(cuda.get_device_properties(device).uuid)
            self._handle = nvml.find(uuid, device.index, os.environ.get("CUDA_VISIBLE_DEVICES"))
            if self._handle is not None:
                self._idle = idle.get(nvml.uuid(self._handle) or "")

    # --- reading -------------------------------------------------------------------------------------

    def read(self) -> Reading | None:
        """Bytes that the process holds on the device according to NVML; None if unknown."""
        if self._nvml is None or self._handle is None:
            return None
        return self._nvml.reading(self._handle, idle=self._idle, at_least=self.reserved())

    def overhead(self) -> Overhead:
        """Bytes that the process holds outside PyTorch's allocator, at present.

        Where NVML does not know this process, everything in use on the device counts as its own: too much if
        others use the device too, and never too little.
        """
        reserved = self.reserved()
        reading = self.read()
        if reading is not None:
            return Overhead(reading.nbytes - reserved, Source.ALLOCATOR)
        free, total = self._cuda.mem_get_info(self.device)
        if total - free > reserved:
            return Overhead(total - free - reserved, Source.ALLOCATOR_BOUND)
        # A context takes memory: a device that shows none does not report it.
        return Overhead(ASSUMED_OVERHEAD, Source.ALLOCATOR_ASSUMED)

    def within_reach(self) -> int:
        """Bytes that the process may come to hold: what it holds already and what is free on the device.

        The allocator's part is no more than the user's own cap on it.
        """
        free, total = self._cuda.mem_get_info(self.device)
        allowed = int(self._fractions.own * self.total)
        return min(int(total), self.overhead().nbytes + min(allowed, self.reserved() + int(free)))

    def reserved(self) -> int:
        """Bytes that PyTorch's allocator holds, handed out or cached."""
        return self._statistic("reserved_bytes", "current")

    def allocated(self) -> int:
        """Bytes of live tensors."""
        return self._statistic("allocated_bytes", "current")

    def max_reserved(self) -> int:
        """The most bytes that the allocator held since the last reset."""
        return self._statistic("reserved_bytes", "peak")

    def reset_peak(self) -> None:
        """Reset the allocator's peaks to what it holds now, for everybody who reads them."""
        self._cuda.reset_peak_memory_stats(self.device)

    def _statistic(self, name: str, which: str) -> int:
        """One of the allocator's statistics; 0 before it has handed anything out.

        ``torch.cuda.memory_reserved`` and the like first sort all of them under flat names, which takes half
        a millisecond, and these are read after every tile.
        """
        found = self._cuda.memory_stats_as_nested_dict(self.device)
        return int(found[name]["all"][which]) if found else 0

    # --- capping -------------------------------------------------------------------------------------

    def cap(self, owner: object, nbytes: int) -> None:
        """Let the allocator hold ``nbytes`` at most, until ``uncap`` is called for the same owner.

        Caps may overlap, on several threads too: the lowest is in force, the user's own included, and the
        user's own comes back after the last.
        """
        if self.reserved() > nbytes:
            self.empty_cache()
        self._fractions.put(owner, min(1.0, max(0, nbytes) / self.total))

    def uncap(self, owner: object) -> None:
        """Remove an owner's cap. Doing so again does nothing."""
        self._fractions.drop(owner)

    @cached_property
    def total(self) -> int:
        """Bytes of which the allocator takes its fraction: the larger of CUDA's two figures, to be safe."""
        return max(
            int(self._cuda.get_device_properties(self.device).total_memory),
            int(self._cuda.mem_get_info(self.device)[1]),
        )

    def empty_cache(self) -> None:
        """Return the allocator's cached memory to the device."""
        self._cuda.empty_cache()
