"""The maps of one pass, by name and region: where they are read, written and added to."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor

from streamcnn.geometry.regions import Region
from streamcnn.geometry.windows import crop
from streamcnn.graph.program import Kind, Program
from streamcnn.plan.plan import Plan
from streamcnn.plan.storage import Tier
from streamcnn.stores import Deferred, Incoming, Store, StoreSpec


class ImageReader(Protocol):
    """Hands out regions of the batch of images, or of maps beside it, ready for the model."""

    device: torch.device
    """Where the pixels are delivered."""

    def read(self, region: Region) -> Tensor:
        """The pixels of ``region``, such as (N, C, h, w), in the model's dtype on the compute device."""

    def settle(self) -> None:
        """Raise errors in pixels that were read, where these do not show at once."""


OpenStore = Callable[[StoreSpec, Tier, tuple[int, int]], Store]
"""Opens an empty store, given a tile's extents as a hint for chunking."""


class Maps:
    """The image, global values read as maps, checkpoints and gradient maps.

    Parameters
    ----------
    images
        By node name: the image, and maps that are read by regions beside it.
    values
        The global values of the pass computed so far.
    """

    def __init__(
        self,
        program: Program,
        plan: Plan,
        images: Mapping[str, ImageReader],
        values: Mapping[str, Any],
        open_store: OpenStore,
    ) -> None:
        self._program = program
        self._plan = plan
        self._images = images
        self._values = values
        self._open_store = open_store
        self._checkpoints: dict[str, Store] = {}
        self._gradients: dict[str, Store] = {}

    def read(self, name: str, part: Region) -> Tensor:
        """A region of a map, which the caller must not write to."""
        node = self._program.nodes[name]
        if node.kind is Kind.IMAGE:
            return self._images[name].read(part)
        if node.kind is Kind.PROMOTED:
            value: Tensor = self._values[node.operands[0]]
            return crop(value, node.map_axes, Region.whole(node.size), part)
        return self._checkpoints[name].read(part)

    def reserve(self, name: str, part: Region) -> Incoming:
        """Like :meth:`read`, but the values of a stored map may arrive while something else is computed."""
        if name in self._checkpoints:
            return self._checkpoints[name].reserve(part)
        return Deferred(partial(self.read, name, part))

    def settle_images(self) -> None:
        """Raise errors in pixels that were read, where these do not show at once."""
        for image in self._images.values():
            image.settle()

    def read_whole(self, name: str) -> Tensor:
        """All of a map, which the caller must not write to."""
        return self.read(name, Region.whole(self._program.nodes[name].size))

    def open_checkpoint(self, name: str) -> None:
        """Open the store of a checkpoint, to be written."""
        self._checkpoints[name] = self._open(name, self._plan.stores[name].tier)

    def write(self, name: str, part: Region, tile: Tensor) -> None:
        """Write a region of a checkpoint; nobody may change the tile's values any more."""
        self._checkpoints[name].write(part, tile, may_keep=True)

    @property
    def with_gradient(self) -> list[str]:
        """The maps that have received a gradient."""
        return list(self._gradients)

    def reserve_gradient(self, name: str, part: Region) -> Incoming:
        """Like :meth:`reserve`, for a region of a gradient map."""
        return self._gradients[name].reserve(part)

    def add_gradient(self, name: str, part: Region, gradient: Tensor, *, may_keep: bool = False) -> None:
        """Add to a region of a map's gradient; ``may_keep`` is as for :meth:`~streamcnn.stores.Store.add`."""
        if name not in self._gradients:
            planned = self._plan.stores.get(name)
            self._gradients[name] = self._open(name, planned.gradient_tier if planned else Tier.MEMORY)
        self._gradients[name].add(part, gradient, may_keep=may_keep)

    def add_whole_gradient(self, name: str, gradient: Tensor) -> None:
        """Add to all of a map's gradient."""
        self.add_gradient(name, Region.whole(self._program.nodes[name].size), gradient)

    def take_gradient(self, name: str) -> Tensor:
        """Remove and return the whole gradient of a map."""
        store = self._gradients.pop(name)
        gradient = store.read(Region.whole(self._program.nodes[name].size)).clone()
        store.close()
        return gradient

    def store(self, name: str) -> Store:
        """The store of a checkpoint."""
        return self._checkpoints[name]

    def free_read(self, level: int) -> None:
        """Drop the checkpoints that nothing reads after the forward pass over ``level``."""
        for name in list(self._checkpoints):
            planned = self._plan.stores[name]
            if planned.last_reader <= level and not planned.kept:
                self._checkpoints.pop(name).close()

    def free(self, names: Iterable[str]) -> None:
        """Drop checkpoints and their gradients."""
        for name in names:
            for stores in (self._checkpoints, self._gradients):
                if name in stores:
                    stores.pop(name).close()

    @property
    def held_bytes(self) -> int:
        """Bytes of memory, device or host, that the checkpoints take."""
        # A copy, since passes in other threads ask too.
        stores = list(self._checkpoints.items())
        return sum(s.spec.nbytes for name, s in stores if self._plan.stores[name].tier is not Tier.DISK)

    def bytes_moved(self, names: Iterable[str]) -> tuple[int, int]:
        """Bytes read from and written to the open stores of these maps and their gradients so far."""
        read = written = 0
        for name in names:
            for stores in (self._checkpoints, self._gradients):
                if name in stores:
                    read += stores[name].bytes_read
                    written += stores[name].bytes_written
        return read, written

    def close(self) -> None:
        """Free every store, even if one of them fails. Closing again does nothing."""
        with ExitStack() as closing:
            for stores in (self._checkpoints, self._gradients):
                while stores:
                    closing.callback(stores.popitem()[1].close)

    def _open(self, name: str, tier: Tier) -> Store:
        node = self._program.nodes[name]
        spec = StoreSpec(node.tensor.shape, node.tensor.dtype, node.map_axes)
        planned = self._plan.stores.get(name)
        return self._open_store(spec, tier, planned.tile if planned else node.size)
