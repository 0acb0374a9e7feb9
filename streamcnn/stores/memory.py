"""A map kept whole in memory: on the compute device, or in host RAM beside it."""

from __future__ import annotations

import math
import mmap
from threading import Lock

import torch
from torch import Tensor

from streamcnn.geometry.regions import Region
from streamcnn.geometry.windows import crop, layout
from streamcnn.stores.base import Store, StoreSpec
from streamcnn.stores.frontier import Frontier
from streamcnn.stores.transfer import to_compute, to_host

_HUGE_PAGE_BYTES = 2**25
"""Maps of at least this many bytes ask for 2 MiB pages, which are zeroed and mapped in fewer steps."""


class MemoryStore(Store):
    """One tensor that holds the whole map, allocated when something is first written, in its layout.

    Parameters
    ----------
    spec
        The map.
    device
        Where the tensor lives.
    compute_device
        Where tiles are read to. If it is ``device``, reading returns a view and copies nothing.
    zeroed
        Whether memory comes zeroed. Else it comes from PyTorch's allocator as it is, and what is read before
        it was written is zeroed then.

    Notes
    -----
    Zeroed host RAM comes from the kernel page by page as it is touched, so a map that is written in
    part costs what was written. A limit on the data segment counts all of it at once. Transfers to a
    GPU go through a pinned buffer and are enqueued on the current stream; a write or add from a GPU
    waits for it. Where memory does not come zeroed, and on a GPU, a tile that covers the whole map
    may become the map without being copied.
    """

    def __init__(
        self,
        spec: StoreSpec,
        device: torch.device,
        compute_device: torch.device,
        *,
        zeroed: bool = True,
    ) -> None:
        super().__init__(spec)
        self._zeroed = zeroed
        self._device = device
        self._on_host = device.type == "cpu"
        self.compute_device = compute_device
        self._map: Tensor | None = None
        self._is_read = False
        """Whether the map is a tile that others may read, and so is not to be changed."""
        self._lock = Lock()
        """Held where memory is allocated and where it is noted which part has been written."""
        self._frontier = Frontier(spec.size)

    def _read(self, region: Region) -> Tensor:
        if self._map is None:
            return torch.zeros(
                self.spec.tile_shape(region), dtype=self.spec.dtype, device=self.compute_device
            )
        if not self._zeroed:
            self._zero_unwritten(self._map, region)
        view = self._view(self._map, region)
        return to_compute(view, self.compute_device) if self._on_host else view

    def _write(self, region: Region, tile: Tensor, *, may_keep: bool) -> None:
        if may_keep and self._can_keep(region, tile):
            self._keep(tile, is_read=True)
            return
        # Of another type only where it is stored: a conversion on a GPU would take its memory.
        tile = to_host(tile, tile.dtype) if self._on_host else tile
        whole = self._writable(tile)
        self._claim(whole, region)
        self._view(whole, region).copy_(tile)

    def _add(self, region: Region, tile: Tensor, *, may_keep: bool) -> None:
        tile = to_host(tile, self.spec.dtype) if self._on_host else tile.to(self.spec.dtype)
        if may_keep and self._can_keep(region, tile):
            self._keep(tile, is_read=False)
            return
        whole = self._writable(tile)
        for part, holds in self._claim(whole, region):
            share = crop(tile, self.spec.axes, region, part)
            target = self._view(whole, part)
            target.add_(share) if holds else target.copy_(share)

    def _free(self) -> None:
        self._map = None

    def _can_keep(self, region: Region, tile: Tensor) -> bool:
        """Whether ``tile`` is the whole map, where there is none yet, and keeps no other memory alive."""
        return (
            self._map is None
            and _keeps_tiles(self._device, zeroed=self._zeroed)
            and tile.device.type == self._device.type
            and tile.dtype == self.spec.dtype
            and region == self._whole
            and tile.untyped_storage().nbytes() == self.spec.nbytes
            and tile.is_contiguous(memory_format=layout(tile))
        )

    def _keep(self, tile: Tensor, *, is_read: bool) -> None:
        """Have a tile for the map; ``is_read`` if others may read it."""
        self._map, self._is_read = tile, is_read
        self._frontier.mark(self._whole)

    def _writable(self, tile: Tensor) -> Tensor:
        """The map, ready for a tile like ``tile`` to be written."""
        with self._lock:
            if self._map is None:
                new = _zeros if self._zeroed else _empty
                self._map = new(self.spec, self._device, layout(tile))
            elif self._is_read:
                self._map, self._is_read = self._map.clone(), False
            return self._map

    def _claim(self, whole: Tensor, region: Region) -> list[tuple[Region, bool]]:
        """``region`` in parts, each with whether something was written there; from now on, all of it was."""
        zero = None if self._zeroed else lambda part: self._view(whole, part).zero_()
        with self._lock:
            return self._frontier.claim(region, zero)

    def _zero_unwritten(self, whole: Tensor, region: Region) -> None:
        for part, holds in self._claim(whole, region):
            if not holds:
                self._view(whole, part).zero_()

    def _view(self, whole: Tensor, region: Region) -> Tensor:
        return crop(whole, self.spec.axes, self._whole, region)


def _keeps_tiles(device: torch.device, *, zeroed: bool) -> bool:
    """Whether a map may be in memory that a tile was computed in.

    In the C library's heap that would leave holes, where tiles around it have gone.
    """
    return device.type != "cpu" or not zeroed


def _zeros(spec: StoreSpec, device: torch.device, memory_format: torch.memory_format) -> Tensor:
    """A zeroed tensor for the whole map."""
    if device.type != "cpu":
        return torch.empty(spec.shape, dtype=spec.dtype, device=device, memory_format=memory_format).zero_()
    flat = _lazy_zeros(spec)
    if memory_format is not torch.channels_last:
        return flat.view(spec.shape)
    n, c, h, w = spec.shape
    return flat.view(n, h, w, c).permute(0, 3, 1, 2)


def _empty(spec: StoreSpec, device: torch.device, memory_format: torch.memory_format) -> Tensor:
    return torch.empty(spec.shape, dtype=spec.dtype, device=device, memory_format=memory_format)


def _lazy_zeros(spec: StoreSpec) -> Tensor:
    """A map's elements in one row: host zeros whose pages are not touched yet, in a mapping of their own.

    ``torch.zeros`` writes every page (1.07 GB became resident for a tensor of 2**30 bytes); pages fresh
    from the kernel are zero. A map taken from the C library's heap would outlive tiles' tensors around
    it and leave holes. The mapping is private, so that a limit on the data segment counts it.
    """
    nbytes = max(spec.nbytes, 1)
    if not hasattr(mmap, "MAP_ANONYMOUS"):
        return torch.zeros(math.prod(spec.shape), dtype=spec.dtype)
    buffer = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE") and nbytes >= _HUGE_PAGE_BYTES:
        buffer.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(buffer, dtype=torch.uint8, count=spec.nbytes).view(spec.dtype)
