"""Copies of tiles between host memory and the compute device, by way of pinned buffers on a GPU.

A GPU's copy engine moves pinned memory at full speed and beside other work. Only buffers of a tile's size
are pinned: PyTorch rounds a pinned allocation up to a power of two bytes, keeps it for reuse, and copies a
view with gaps through unpinned memory anyway, so nothing is gained by pinning a whole map.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from streamcnn.geometry.windows import dense, layout


def host_buffer(
    shape: Sequence[int],
    dtype: torch.dtype,
    compute_device: torch.device,
    memory_format: torch.memory_format = torch.contiguous_format,
) -> Tensor:
    """An uninitialised tensor in host memory, pinned if tiles go to a GPU."""
    pinned = compute_device.type == "cuda"
    return torch.empty(tuple(shape), dtype=dtype, pin_memory=pinned, memory_format=memory_format)


def to_compute(view: Tensor, compute_device: torch.device) -> Tensor:
    """``view``, which lies in host memory, on the compute device in its layout; itself if that is the host.

    The copy is enqueued on the current stream. The memory behind ``view`` may change as soon as this
    returns, and PyTorch's host allocator does not reuse the buffer before the copy is done.
    """
    if compute_device.type == "cpu":
        return view
    buffer = host_buffer(view.shape, view.dtype, compute_device, layout(view))
    buffer.copy_(view)
    return buffer.to(compute_device, non_blocking=True)


def to_host(tile: Tensor, dtype: torch.dtype) -> Tensor:
    """``tile`` in host memory and ``dtype``, in its layout; waits for the work on a GPU that gives it."""
    if tile.device.type == "cpu":
        return tile.to(dtype)
    # A copy with gaps on either side goes through unpinned memory.
    tile = dense(tile)
    buffer = host_buffer(tile.shape, tile.dtype, tile.device, layout(tile))
    # Not non_blocking: the host reads the buffer next.
    buffer.copy_(tile)
    return buffer.to(dtype)
