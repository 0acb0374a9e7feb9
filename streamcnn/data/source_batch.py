"""A batch of image sources, read region by region as stored."""

from __future__ import annotations

import functools
import os
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor

from streamcnn.data.sources import ImageSource
from streamcnn.geometry.regions import Interval, Region
from streamcnn.geometry.windows import dense, layout
from streamcnn.plan.reading import NO_READING, BatchCost


class SourceBatch:
    """Sources of one shape and dtype, read one after the other or, for a GPU, in parallel.

    Parameters
    ----------
    sources
        The images; empty if the batch is a tensor.
    device
        Device to which pixels are delivered.

    Attributes
    ----------
    sources
        The images of the batch.
    reading
        Bytes that reading takes of a budget of host memory; nothing if the budget is a GPU's.
    keeps_last
        Whether the region that was read last stays in host RAM.
    """

    def __init__(self, sources: Sequence[ImageSource], device: torch.device) -> None:
        self.sources = sources
        self.device = device
        self.reading = self._cost()
        self.keeps_last = device.type != "cpu" and bool(sources)
        self._last: tuple[Region, Tensor] | None = None

    def _cost(self) -> BatchCost:
        if not self.sources or self.device.type != "cpu":
            return NO_READING
        first = self.sources[0]
        costs = tuple(source.reading_cost for source in self.sources)
        return BatchCost(costs, first.shape[0] * first.dtype.itemsize)

    @property
    def shared_tensors(self) -> list[Tensor]:
        """The caller's own tensors from which pixels are read."""
        shared = (source.shared_tensor for source in self.sources)
        return [tensor for tensor in shared if tensor is not None]

    def samples(self) -> list[tuple[str, bytes]]:
        """Names and some pixels of the caller's arrays among the sources."""
        found = ((source.name, source.sample) for source in self.sources)
        return [(name, sample) for name, sample in found if sample is not None]

    def read_stored(self, region: Region) -> Tensor:
        """The pixels (N, C, h, w) of ``region`` as stored, on the CPU.

        For a GPU, which waits for them, images are read in parallel, and the last region is kept in host RAM:
        with large tiles, the backward pass begins with the region at which the forward pass ended.
        """
        if not self.keeps_last:
            return _batch([source.read(region) for source in self.sources])
        if self._last is None or self._last[0] != region:
            self._last = None
            tiles = list(_readers().map(lambda source: source.read(region), self.sources))
            self._last = (region, _batch(tiles))
        return self._last[1]

    def delivered(self, stored: Tensor) -> Tensor:
        """Pixels on the model's device, copied through pinned memory, so that the host does not wait."""
        if self.device.type == "cuda" and stored.device.type == "cpu":
            stored = _pinned(stored)
        return stored.to(self.device, non_blocking=True)

    def settle(self) -> None:
        """Make deferred checks of everything read since the last call; stored values have none."""

    @property
    def held_bytes(self) -> int:
        """Bytes of decoded pixels that the images keep now, which are included in ``reading``."""
        return sum(source.held_bytes for source in self._distinct())

    def start(self) -> None:
        """Start the threads that read the images, before their stacks would count towards a budget."""
        for source in self._distinct():
            source.start()

    def open(self) -> None:
        """Decode images that can only be decoded whole, one after the other, and keep them.

        Raises
        ------
        CorruptImage
            If pixels cannot be read.
        """
        for source in self.sources if self.reading.opening else ():
            source.read(Region(Interval(0, 1), Interval(0, 1)))

    def release(self, *, but: Iterable[ImageSource] = ()) -> None:
        """Release the images' decoded pixels, except those of images ``but``, in use elsewhere."""
        used = {id(source) for source in but}
        for source in self._distinct():
            if id(source) not in used:
                source.release()

    def _distinct(self) -> Iterable[ImageSource]:
        """Each source once, as a batch may hold one twice."""
        return {id(source): source for source in self.sources}.values()


def _pinned(stored: Tensor) -> Tensor:
    """A dense copy in pinned memory; a tensor that is one already is returned as it is.

    ``Tensor.pin_memory`` keeps strides: for a region of an image it would pin everything from its first pixel
    to its last, and the copy to a GPU would go through memory that is not pinned.
    """
    if stored.is_pinned() and dense(stored) is stored:
        return stored
    pinned = torch.empty(stored.shape, dtype=stored.dtype, pin_memory=True, memory_format=layout(stored))
    return pinned.copy_(stored)


def _batch(tiles: list[Tensor]) -> Tensor:
    return tiles[0][None] if len(tiles) == 1 else torch.stack(tiles)


@functools.cache
def _readers() -> ThreadPoolExecutor:
    """The pool of threads that read images for a GPU."""
    return ThreadPoolExecutor(min(8, os.cpu_count() or 1), thread_name_prefix="streamcnn-reader")
