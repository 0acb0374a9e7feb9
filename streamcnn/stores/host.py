"""The store of a map in host RAM, for a GPU that computes with it."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from streamcnn.geometry.regions import Region
from streamcnn.geometry.windows import crop, layout
from streamcnn.stores.base import StoreSpec
from streamcnn.stores.pinned import PinnedBlock, SparePinned, shaped
from streamcnn.stores.transfers import Deferred, GpuTransfers, Incoming, Place, few_pieces
from streamcnn.stores.whole import WholeStore


class HostStore(WholeStore):
    """One pinned block that holds the whole map, allocated at the first write in the layout of that tile.

    A region without gaps in memory, such as a band of full rows of one image in ``channels_last``, is copied
    in place while the GPU computes, and so is a region of few or large pieces. Other regions go through a
    pinned buffer, and so do tiles that are added to values that are there already.

    Parameters
    ----------
    spec
        The map.
    transfers
        Moves the map's tiles.
    spares
        Supplies blocks and takes them back.
    """

    def __init__(self, spec: StoreSpec, transfers: GpuTransfers, spares: SparePinned) -> None:
        super().__init__(spec, zeroed=False)
        self._transfers = transfers
        self._spares = spares
        self._block: PinnedBlock | None = None

    def _read(self, region: Region) -> Tensor:
        return self._reserve(region).tile()

    def _reserve(self, region: Region) -> Incoming:
        shape, dtype = self.spec.tile_shape(region), self.spec.dtype
        if self._map is None:
            return Deferred(partial(torch.zeros, shape, dtype=dtype, device=self._transfers.compute_device))
        self._transfers.settle(Place(self, region))
        view = self._readable(self._map, region)
        return self._transfers.bring(shape, dtype, partial(self._source, view), layout(view))

    def _source(self, view: Tensor) -> Tensor:
        """A region of the map in pinned memory: the view itself, or a copy in a buffer."""
        if self._is_copied_in_place(view):
            return view
        return self._transfers.buffer(view.shape, view.dtype, layout(view)).copy_(view)

    def _write(self, region: Region, tile: Tensor, *, may_keep: bool) -> None:
        self._put(region, tile, adds=False, is_final=may_keep)

    def _add(self, region: Region, tile: Tensor, *, may_keep: bool) -> None:
        self._put(region, tile, adds=True, is_final=may_keep)

    def _put(self, region: Region, tile: Tensor, *, adds: bool, is_final: bool) -> None:
        whole = self._writable(tile)
        for part, holds in self._claim(whole, region):
            target, to = self._view(whole, part), Place(self, part)
            share = crop(tile, self.spec.axes, region, part)
            # Values that are there may still be on their way; tiles that are taken are finished in order.
            if not holds and share.dtype == target.dtype and self._is_copied_in_place(target):
                self._transfers.put(to, share, target, is_final=is_final)
            else:
                finish = partial(_combine, target, adds=adds and holds)
                self._transfers.take(to, share, target.dtype, finish, is_final=is_final)

    def _free(self) -> None:
        # A tile that is still on its way to a buffer would be put into what is another map's memory by then.
        self._transfers.settle(Place(self, self._whole))
        self._map = None
        if self._block is not None:
            self._spares.keep(self._block, self._transfers.unused())
            self._block = None

    def _is_copied_in_place(self, view: Tensor) -> bool:
        assert self._block is not None
        return self._block.is_pinned and few_pieces(view)

    def _writable(self, tile: Tensor) -> Tensor:
        """The map, allocated in the layout of the first tile if it does not exist yet."""
        with self._lock:
            if self._map is None:
                self._block = self._spares.take(self.spec.nbytes, self._transfers.engine.pin)
                self._map = shaped(self._block.memory, self.spec.shape, self.spec.dtype, layout(tile))
            return self._map


def _combine(target: Tensor, tile: Tensor, *, adds: bool) -> None:
    target.add_(tile) if adds else target.copy_(tile)
