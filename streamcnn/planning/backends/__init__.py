"""Backends: what planning has to know of a device's libraries and allocators, one class a device."""

from streamcnn.planning.backends.base import Backend, Fragmentation
from streamcnn.planning.backends.cpu import CpuBackend
from streamcnn.planning.backends.cuda import CudaBackend

__all__ = ["Backend", "CpuBackend", "CudaBackend", "Fragmentation"]
