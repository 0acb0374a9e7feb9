"""The store of a map in the memory of the compute device."""

from __future__ import annotations

import torch
from torch import Tensor

from streamcnn.geometry.regions import Region
from streamcnn.geometry.windows import crop, layout
from streamcnn.stores.base import StoreSpec
from streamcnn.stores.pinned import fresh_memory, shaped
from streamcnn.stores.whole import WholeStore


class MemoryStore(WholeStore):
    """One tensor that holds the whole map, allocated at the first write in the layout of that tile.

    Parameters
    ----------
    spec
        The map.
    device
        Where the tensor lives. Reading returns a view and copies nothing.
    zeroed
        Whether to allocate zeroed memory. Otherwise memory comes from PyTorch's allocator uninitialised, and
        a part that is read before it was written is zeroed then.

    Notes
    -----
    Zeroed host RAM comes from the kernel page by page as it is touched, so a map that is written in
    part takes only the memory of that part. A limit on the data segment counts all of it at once. Without
    ``zeroed``, and on a GPU, a tile that covers the whole map may become the map without a copy.
    """

    def __init__(
        self,
        spec: StoreSpec,
        device: torch.device,
        *,
        zeroed: bool = True,
    ) -> None:
        super().__init__(spec, zeroed=zeroed)
        self._device = device
        self._is_shared = False
        """Whether the map is a tile that others may read, and so must not be changed."""

    def _read(self, region: Region) -> Tensor:
        if self._map is None:
            return torch.zeros(self.spec.tile_shape(region), dtype=self.spec.dtype, device=self._device)
        return self._readable(self._map, region)

    def _write(self, region: Region, tile: Tensor, *, may_keep: bool) -> None:
        if may_keep and self._can_keep(region, tile):
            self._keep(tile, is_shared=True)
            return
        whole = self._writable(tile)
        self._claim(whole, region)
        self._view(whole, region).copy_(tile)

    def _add(self, region: Region, tile: Tensor, *, may_keep: bool) -> None:
        tile = tile.to(self.spec.dtype)
        if may_keep and self._can_keep(region, tile):
            self._keep(tile, is_shared=False)
            return
        whole = self._writable(tile)
        for part, holds in self._claim(whole, region):
            share = crop(tile, self.spec.axes, region, part)
            target = self._view(whole, part)
            target.add_(share) if holds else target.copy_(share)

    def _free(self) -> None:
        self._map = None

    def _can_keep(self, region: Region, tile: Tensor) -> bool:
        """Whether ``tile`` is the map's first, covers all of it, and keeps no other memory alive."""
        return (
            self._map is None
            and _keeps_tiles(self._device, zeroed=self._zeroed)
            and tile.device.type == self._device.type
            and tile.dtype == self.spec.dtype
            and region == self._whole
            and tile.untyped_storage().nbytes() == self.spec.nbytes
            and tile.is_contiguous(memory_format=layout(tile))
        )

    def _keep(self, tile: Tensor, *, is_shared: bool) -> None:
        """Make a tile the map; ``is_shared`` if others may read it."""
        self._map, self._is_shared = tile, is_shared
        self._frontier.mark(self._whole)

    def _writable(self, tile: Tensor) -> Tensor:
        """The map, ready for a tile like ``tile`` to be written."""
        with self._lock:
            if self._map is None:
                new = _zeros if self._zeroed else _empty
                self._map = new(self.spec, self._device, layout(tile))
            elif self._is_shared:
                self._map, self._is_shared = self._map.clone(), False
            return self._map


def _keeps_tiles(device: torch.device, *, zeroed: bool) -> bool:
    """Whether the memory in which a tile was computed may become the map's.

    In the C library's heap the map would outlive the tiles around it, which leave holes.
    """
    return device.type != "cpu" or not zeroed


def _zeros(spec: StoreSpec, device: torch.device, memory_format: torch.memory_format) -> Tensor:
    """A zeroed tensor for the whole map."""
    if device.type != "cpu":
        return _empty(spec, device, memory_format).zero_()
    return shaped(fresh_memory(spec.nbytes), spec.shape, spec.dtype, memory_format)


def _empty(spec: StoreSpec, device: torch.device, memory_format: torch.memory_format) -> Tensor:
    return torch.empty(spec.shape, dtype=spec.dtype, device=device, memory_format=memory_format)
