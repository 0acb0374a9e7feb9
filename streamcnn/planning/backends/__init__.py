"""Backends: what planning must know of a device's libraries and allocators, one class per device type."""

from streamcnn.planning.backends.base import Backend, Fragmentation
from streamcnn.planning.backends.cpu import CpuBackend
from streamcnn.planning.backends.cuda import CudaBackend

__all__ = ["Backend", "CpuBackend", "CudaBackend", "Fragmentation"]
