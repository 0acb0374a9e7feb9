"""A card's memory according to NVML, the driver's own interface; the only module that uses it.

NVML may be missing, forbidden, or blind to processes, as it is in many containers. A reading that is
zero, missing or impossible is *unknown* here, never a small number.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from enum import StrEnum
from typing import Any


class Source(StrEnum):
    """Where a reading comes from, as reports name it; the first that is known is taken."""

    OWN_PROCESS = "NVML, own process"
    ONLY_PROCESS = "NVML, only process on the device"
    DEVICE_LESS_IDLE = "NVML, device less idle baseline"
    ALLOCATOR = "allocator's peak and measured overhead"
    ALLOCATOR_BOUND = "allocator's peak and all else on the device"
    ALLOCATOR_ASSUMED = "allocator's peak and an assumed overhead"


@dataclass(frozen=True, slots=True)
class Reading:
    """Bytes that this process holds on a device."""

    nbytes: int
    source: Source


class Nvml:
    """A session with NVML.

    Parameters
    ----------
    api
        The module ``pynvml``, or an object with its interface.

    Notes
    -----
    The session is never closed: NVML counts sessions, and other libraries of the process have theirs.
    """

    def __init__(self, api: Any) -> None:
        self._api = api
        # In later packages, calls that the driver is too old for raise something else than an NVMLError.
        self._errors = (api.NVMLError, getattr(api, "NVMLLibraryMismatchError", api.NVMLError))
        api.nvmlInit()

    @classmethod
    def open(cls, api: Any = None) -> Nvml | None:
        """A session, or None where there is no NVML or it may not be used."""
        if api is None:
            try:
                import pynvml
            except ImportError:
                return None
            api = pynvml
        try:
            return cls(api)
        except api.NVMLError:
            return None

    # --- devices -------------------------------------------------------------------------------------

    def find(self, uuid: str, index: int, visible: str | None) -> Any | None:
        """The handle of the device that PyTorch calls ``cuda:index``, or None if NVML does not know it.

        Parameters
        ----------
        uuid
            UUID of the device as PyTorch spells it, with or without NVML's prefix. An index would not do:
            CUDA_VISIBLE_DEVICES renumbers devices.
        index
            PyTorch's number of the device.
        visible
            CUDA_VISIBLE_DEVICES. For a slice of a card (MIG), CUDA may give the UUID of the whole card; this
            variable has the slice's.
        """
        listed = [entry.strip() for entry in (visible or "").split(",")]
        entry = listed[index] if index < len(listed) else ""
        named = [entry] if entry.startswith("MIG-") else []
        bare = uuid.removeprefix("GPU-").removeprefix("MIG-")
        for name in (*named, f"MIG-{bare}", f"GPU-{bare}"):
            handle = self._ask(self._api.nvmlDeviceGetHandleByUUID, name)
            if handle is not None:
                return self._slice(handle, entry) if self._is_sliced(handle) else handle
        return None

    def _slice(self, card: Any, entry: str) -> Any | None:
        """The slice of ``card`` in use here: the one whose UUID begins with ``entry``, or the only one."""
        slices = list(self._slices(card))
        if entry.startswith("MIG-"):
            slices = [handle for handle in slices if str(self.uuid(handle)).startswith(entry)]
        return slices[0] if len(slices) == 1 else None

    def _is_sliced(self, handle: Any) -> bool:
        mode = self._ask(self._api.nvmlDeviceGetMigMode, handle)
        return mode is not None and mode[0] == self._api.NVML_DEVICE_MIG_ENABLE

    def _slices(self, card: Any) -> Iterator[Any]:
        for index in range(self._ask(self._api.nvmlDeviceGetMaxMigDeviceCount, card) or 0):
            handle = self._ask(self._api.nvmlDeviceGetMigDeviceHandleByIndex, card, index)
            if handle is not None:
                yield handle

    def uuid(self, handle: Any) -> str | None:
        """NVML's name of a device, with its prefix; None if unknown."""
        found: str | None = self._ask(self._api.nvmlDeviceGetUUID, handle)
        return found

    # --- bytes ---------------------------------------------------------------------------------------

    def used(self, handle: Any) -> int | None:
        """Bytes in use on the device, by all processes; None if unknown."""
        memory = self._ask(self._api.nvmlDeviceGetMemoryInfo, handle)
        return None if memory is None or not memory.used else int(memory.used)

    def used_everywhere(self) -> dict[str, int]:
        """By UUID, bytes in use on all cards and slices that report them; works without a CUDA context."""
        found = {}
        for handle in self._devices():
            uuid, used = self.uuid(handle), self.used(handle)
            if uuid is not None and used is not None:
                found[uuid] = used
        return found

    def _devices(self) -> Iterator[Any]:
        for index in range(self._ask(self._api.nvmlDeviceGetCount) or 0):
            card = self._ask(self._api.nvmlDeviceGetHandleByIndex, index)
            if card is not None:
                yield card
                yield from self._slices(card)

    def reading(self, handle: Any, *, idle: int | None, at_least: int) -> Reading | None:
        """Bytes that this process holds on the device, by the first source that knows; None if none does.

        Parameters
        ----------
        idle
            Bytes in use before this process took any; None if unknown.
        at_least
            Bytes that the process is known to hold. A smaller reading is another process's, which may have
            this one's number outside of a container.
        """
        for source, nbytes in self._readings(handle, idle):
            if nbytes is not None and nbytes > 0 and nbytes >= at_least:
                return Reading(nbytes, source)
        return None

    def _readings(self, handle: Any, idle: int | None) -> Iterator[tuple[Source, int | None]]:
        """What each source says in turn, asked only as far as the answers are needed."""
        listed = self._ask(self._api.nvmlDeviceGetComputeRunningProcesses, handle) or []
        sizes: dict[int, list[int | None]] = {}
        unknown: list[int | None] = [None]
        for process in listed:
            sizes.setdefault(process.pid, []).append(process.usedGpuMemory)
        yield Source.OWN_PROCESS, _sum(sizes.get(os.getpid(), unknown))
        yield Source.ONLY_PROCESS, _sum(next(iter(sizes.values())) if len(sizes) == 1 else unknown)
        used = None if idle is None else self.used(handle)
        yield Source.DEVICE_LESS_IDLE, None if used is None or idle is None else used - idle

    def _ask(self, call: Callable[..., Any], *arguments: Any) -> Any | None:
        """The answer, or None where NVML refuses it: not supported, not permitted, not found."""
        try:
            return call(*arguments)
        except self._errors:
            return None


def _sum(sizes: list[int | None]) -> int | None:
    """Bytes of a process's contexts together; None if one is unknown."""
    known = [size for size in sizes if size]
    return sum(known) if len(known) == len(sizes) else None
