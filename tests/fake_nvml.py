"""A stand-in for the part of ``pynvml`` that streamcnn uses, for cards that a test makes up.

``tests/test_ceiling_nvml.py`` compares names, constants, fields and errors with the real package's.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

NVML_DEVICE_MIG_DISABLE = 0
NVML_DEVICE_MIG_ENABLE = 1

NVML_ERROR_INVALID_ARGUMENT = 2
NVML_ERROR_NOT_SUPPORTED = 3
NVML_ERROR_NO_PERMISSION = 4
NVML_ERROR_NOT_FOUND = 6
NVML_ERROR_DRIVER_NOT_LOADED = 9
NVML_ERROR_LIBRARY_NOT_FOUND = 12
NVML_ERROR_GPU_IS_LOST = 15


class NVMLError(Exception):
    """As in ``pynvml``: made from a code, it is an instance of the code's own class."""

    value: int


class NVMLError_InvalidArgument(NVMLError):
    value = NVML_ERROR_INVALID_ARGUMENT


class NVMLError_NotSupported(NVMLError):
    value = NVML_ERROR_NOT_SUPPORTED


class NVMLError_NoPermission(NVMLError):
    value = NVML_ERROR_NO_PERMISSION


class NVMLError_NotFound(NVMLError):
    value = NVML_ERROR_NOT_FOUND


class NVMLError_DriverNotLoaded(NVMLError):
    value = NVML_ERROR_DRIVER_NOT_LOADED


class NVMLError_LibraryNotFound(NVMLError):
    value = NVML_ERROR_LIBRARY_NOT_FOUND


class NVMLError_GpuIsLost(NVMLError):
    value = NVML_ERROR_GPU_IS_LOST


class NVMLLibraryMismatchError(Exception):
    """Not an NVMLError in ``pynvml`` either."""


@dataclass
class Memory:
    """As ``c_nvmlMemory_t``: bytes."""

    total: int
    free: int
    used: int


@dataclass
class Process:
    """As ``c_nvmlProcessInfo_v2_t``, once pynvml has turned "not available" into None."""

    pid: int
    usedGpuMemory: int | None
    gpuInstanceId: int = 0xFFFFFFFF
    computeInstanceId: int = 0xFFFFFFFF


@dataclass
class Device:
    """A card or a slice of one; a test may change it at any time."""

    uuid: str
    total: int = 80 * 10**9
    used: int = 0
    processes: list[Process] = field(default_factory=list)
    slices: list[Device] | None = None
    """The slices of a card in MIG mode; None for a card that cannot be sliced, and for a slice."""
    max_slices: int = 7


class FakeNvml:
    """Stands for the module ``pynvml``.

    Parameters
    ----------
    devices
        The cards, in NVML's order.
    fails
        By function name the error that it raises.
    """

    NVML_DEVICE_MIG_DISABLE = NVML_DEVICE_MIG_DISABLE
    NVML_DEVICE_MIG_ENABLE = NVML_DEVICE_MIG_ENABLE
    NVMLError = NVMLError
    NVMLError_InvalidArgument = NVMLError_InvalidArgument
    NVMLError_NotSupported = NVMLError_NotSupported
    NVMLError_NoPermission = NVMLError_NoPermission
    NVMLError_NotFound = NVMLError_NotFound
    NVMLError_DriverNotLoaded = NVMLError_DriverNotLoaded
    NVMLError_LibraryNotFound = NVMLError_LibraryNotFound
    NVMLError_GpuIsLost = NVMLError_GpuIsLost
    NVMLLibraryMismatchError = NVMLLibraryMismatchError

    def __init__(self, *devices: Device, fails: dict[str, Exception] | None = None) -> None:
        self.devices = list(devices)
        self.fails = fails or {}
        self.calls: list[str] = []
        self.initialised = False

    def _enter(self, name: str) -> None:
        self.calls.append(name)
        if name in self.fails:
            raise self.fails[name]
        assert self.initialised or name == "nvmlInit", f"{name} before nvmlInit"

    def nvmlInit(self) -> None:
        self._enter("nvmlInit")
        self.initialised = True

    def nvmlDeviceGetCount(self) -> int:
        self._enter("nvmlDeviceGetCount")
        return len(self.devices)

    def nvmlDeviceGetHandleByIndex(self, index: int) -> Device:
        self._enter("nvmlDeviceGetHandleByIndex")
        return _item(self.devices, index, NVMLError_InvalidArgument)

    def nvmlDeviceGetHandleByUUID(self, uuid: str) -> Device:
        self._enter("nvmlDeviceGetHandleByUUID")
        everything = [each for card in self.devices for each in (card, *(card.slices or ()))]
        return _item([each for each in everything if each.uuid == uuid], 0, NVMLError_NotFound)

    def nvmlDeviceGetUUID(self, handle: Device) -> str:
        self._enter("nvmlDeviceGetUUID")
        return handle.uuid

    def nvmlDeviceGetMigMode(self, device: Device) -> list[int]:
        self._enter("nvmlDeviceGetMigMode")
        if device.slices is None:
            raise NVMLError_NotSupported
        return [NVML_DEVICE_MIG_ENABLE if device.slices else NVML_DEVICE_MIG_DISABLE] * 2

    def nvmlDeviceGetMaxMigDeviceCount(self, device: Device) -> int:
        self._enter("nvmlDeviceGetMaxMigDeviceCount")
        if device.slices is None:
            raise NVMLError_NotSupported
        return device.max_slices

    def nvmlDeviceGetMigDeviceHandleByIndex(self, device: Device, index: int) -> Device:
        self._enter("nvmlDeviceGetMigDeviceHandleByIndex")
        return _item(device.slices or [], index, NVMLError_NotFound)

    def nvmlDeviceGetMemoryInfo(self, handle: Device, version: Any = None) -> Memory:
        self._enter("nvmlDeviceGetMemoryInfo")
        return Memory(handle.total, handle.total - handle.used, handle.used)

    def nvmlDeviceGetComputeRunningProcesses(self, handle: Device) -> list[Process]:
        self._enter("nvmlDeviceGetComputeRunningProcesses")
        return list(handle.processes)


def _item(items: list[Device], index: int, error: Callable[[], Exception]) -> Device:
    if index >= len(items):
        raise error()
    return items[index]
