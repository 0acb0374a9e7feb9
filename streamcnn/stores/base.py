"""The interface of stores, on every tier.

A store holds one map, a checkpoint or a gradient map. It hands out regions of the map and takes them in. It
knows nothing of phases or tiles: the executor decides who reads what, and when to close a store.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from functools import partial
from threading import Lock

import torch
from torch import Tensor

from streamcnn.geometry.regions import Region
from streamcnn.geometry.windows import with_extents
from streamcnn.stores.transfers import Deferred, Incoming


@dataclass(frozen=True, slots=True)
class StoreSpec:
    """Shape and element type of one map."""

    shape: tuple[int, ...]
    """Extents of the whole map, spatial axes included, such as (N, C, H, W)."""
    dtype: torch.dtype
    """Element type in the store; tiles of another type are converted when they are written."""
    axes: tuple[int, int]
    """Positions of H and of W in ``shape``."""

    @property
    def size(self) -> tuple[int, int]:
        """Spatial extents (H, W)."""
        return (self.shape[self.axes[0]], self.shape[self.axes[1]])

    @property
    def nbytes(self) -> int:
        """Bytes of the whole map."""
        return math.prod(self.shape) * self.dtype.itemsize

    @property
    def position_nbytes(self) -> int:
        """Bytes of one position; 0 for a map without positions."""
        return self.nbytes // max(1, math.prod(self.size))

    def tile_shape(self, region: Region) -> tuple[int, ...]:
        """``shape`` with the spatial extents of ``region``."""
        return with_extents(self.shape, self.axes, region.size)

    def tile_nbytes(self, region: Region) -> int:
        """Bytes of the map inside ``region``."""
        return self.position_nbytes * math.prod(region.size)


class Store(ABC):
    """One map, read and written by regions.

    Positions never written read as zero, and count as zero when something is added to them.
    Calls on regions that do not overlap may come from different threads at the same time; calls on
    overlapping regions, and ``close``, must be ordered by the caller.

    Attributes
    ----------
    spec
        Shape and element type of the map.
    bytes_read, bytes_written
        Bytes of the map handed out and taken in so far, in the store's element type. Bytes that the medium
        moves beyond that are not counted. ``add`` counts as both.
    """

    def __init__(self, spec: StoreSpec) -> None:
        self.spec = spec
        self._whole = Region.whole(spec.size)
        self.bytes_read = 0
        self.bytes_written = 0
        self._closed = False
        self._counting = Lock()

    def read(self, region: Region) -> Tensor:
        """The values inside ``region``, on the compute device.

        Returns
        -------
        Tensor
            Shape ``spec.tile_shape(region)``, type ``spec.dtype``. It may share the store's memory:
            the caller must not write to it, and must be done with it before the region is written.

        Raises
        ------
        ValueError
            If the store is closed.
        """
        self._check(region)
        tile = self._read(region)
        self._count(read=self.spec.tile_nbytes(region))
        return tile

    def reserve(self, region: Region) -> Incoming:
        """Like :meth:`read`, but the values may arrive while something else is computed.

        They are those written before this call. Memory for them is allocated now. Nothing may be written to
        ``region`` until the caller has asked for the tile.

        Raises
        ------
        ValueError
            If the store is closed.
        """
        self._check(region)
        incoming = self._reserve(region)
        self._count(read=self.spec.tile_nbytes(region))
        return incoming

    def write(self, region: Region, tile: Tensor, *, may_keep: bool = False) -> None:
        """Replace the values inside ``region`` by ``tile``, converted to ``spec.dtype``.

        Parameters
        ----------
        may_keep
            Whether the values of ``tile`` are final. If ``tile`` covers the whole map, a store may then keep
            the tensor itself as the map, and must not change it either.

        Raises
        ------
        ValueError
            If the store is closed.
        """
        self._check(region, tile)
        self._write(region, tile.detach(), may_keep=may_keep)
        self._count(written=self.spec.tile_nbytes(region))

    def add(self, region: Region, tile: Tensor, *, may_keep: bool = False) -> None:
        """Add ``tile``, converted to ``spec.dtype`` first, to the values inside ``region``.

        Parameters
        ----------
        may_keep
            Whether the caller gives up the memory of ``tile``. If ``tile`` covers the whole map, a store may
            then keep the tensor itself as the map, and add to it in place.

        Raises
        ------
        ValueError
            If the store is closed.
        """
        self._check(region, tile)
        self._add(region, tile.detach(), may_keep=may_keep)
        nbytes = self.spec.tile_nbytes(region)
        self._count(read=nbytes, written=nbytes)

    def close(self) -> None:
        """Free memory and files. Closing again does nothing."""
        if not self._closed:
            self._closed = True
            self._free()

    @abstractmethod
    def _read(self, region: Region) -> Tensor:
        """The values inside ``region``."""

    def _reserve(self, region: Region) -> Incoming:
        """The values inside ``region``, later."""
        return Deferred(partial(self._read, region))

    @abstractmethod
    def _write(self, region: Region, tile: Tensor, *, may_keep: bool) -> None:
        """Replace the values inside ``region``."""

    @abstractmethod
    def _add(self, region: Region, tile: Tensor, *, may_keep: bool) -> None:
        """Accumulate into ``region``."""

    @abstractmethod
    def _free(self) -> None:
        """Free memory and files; called once."""

    def _check(self, region: Region, tile: Tensor | None = None) -> None:
        if self._closed:
            raise ValueError(f"the store of a {self.spec.shape} map is closed: it cannot be used any more")
        # Slices clip and tensors broadcast silently, so a wrong region would become wrong values.
        assert self._whole.contains(region), f"{region} is not inside {self.spec.size}"
        if tile is not None:
            expected = self.spec.tile_shape(region)
            assert tuple(tile.shape) == expected, f"tile of shape {tuple(tile.shape)}, expected {expected}"

    def _count(self, *, read: int = 0, written: int = 0) -> None:
        # One thread reads while another writes, and an increment of an attribute is not atomic.
        with self._counting:
            self.bytes_read += read
            self.bytes_written += written
