"""A batch of image sources, read region by region as they are stored."""

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
    """Sources of one shape and dtype, one after the other or, for a GPU, beside one another.

    Parameters
    ----------
    sources
        The images; none where a batch is a tensor.
    device
        Where the pixels are delivered.

    Attributes
    ----------
    sources
        The images of the batch.
    reading
        What reading takes in host memory, if the budget is of that: on a GPU it is not.
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
        """The caller's tensors that pixels are read from."""
        shared = (source.shared_tensor for source in self.sources)
        return [tensor for tensor in shared if tensor is not None]

    def samples(self) -> list[tuple[str, bytes]]:
        """Names and some pixels of the caller's arrays that are read."""
        found = ((source.name, source.sample) for source in self.sources)
        return [(name, sample) for name, sample in found if sample is not None]

    def read_stored(self, region: Region) -> Tensor:
        """The pixels (N, C, h, w) of ``region`` as they are stored, on the host.

        For a GPU, which waits for them, images are read beside one another, and the region read last is kept
        in host RAM: where tiles are large, the backward pass begins with what the forward pass ended with.
        """
        if not self.keeps_last:
            return _batch([source.read(region) for source in self.sources])
        if self._last is None or self._last[0] != region:
            self._last = None
            tiles = list(_readers().map(lambda source: source.read(region), self.sources))
            self._last = (region, _batch(tiles))
        return self._last[1]

    def delivered(self, stored: Tensor) -> Tensor:
        """Pixels where the model wants them. From memory that is pinned first, the host does not wait."""
        if self.device.type == "cuda" and stored.device.type == "cpu":
            stored = _pinned(stored)
        return stored.to(self.device, non_blocking=True)

    def settle(self) -> None:
        """Look at what was read since this was called last, as far as that waits for the device."""

    @property
    def held_bytes(self) -> int:
        """Bytes of decoded pixels that the images keep now: a part of what ``reading`` says is held."""
        return sum(source.held_bytes for source in self._distinct())

    def start(self) -> None:
        """Start the threads that read the images, whose stacks are no part of a budget."""
        for source in self._distinct():
            source.start()

    def open(self) -> None:
        """Decode the images that are only decoded whole, one after the other, and keep them.

        Raises
        ------
        CorruptImage
            If pixels cannot be read.
        """
        for source in self.sources if self.reading.opening else ():
            source.read(Region(Interval(0, 1), Interval(0, 1)))

    def release(self, *, but: Iterable[ImageSource] = ()) -> None:
        """Have the images let go of decoded pixels, except those that are in use elsewhere."""
        used = {id(source) for source in but}
        for source in self._distinct():
            if id(source) not in used:
                source.release()

    def _distinct(self) -> Iterable[ImageSource]:
        """Each source once: a batch may hold one twice."""
        return {id(source): source for source in self.sources}.values()


def _pinned(stored: Tensor) -> Tensor:
    """A copy in pinned memory, without gaps; what is there already so is taken as it is.

    ``Tensor.pin_memory`` keeps strides: of a region cut out of an image it pins all from its first pixel to
    its last, and from there to a GPU it goes by way of memory that is not pinned.
    """
    if stored.is_pinned() and dense(stored) is stored:
        return stored
    pinned = torch.empty(stored.shape, dtype=stored.dtype, pin_memory=True, memory_format=layout(stored))
    return pinned.copy_(stored)


def _batch(tiles: list[Tensor]) -> Tensor:
    return tiles[0][None] if len(tiles) == 1 else torch.stack(tiles)


@functools.cache
def _readers() -> ThreadPoolExecutor:
    """The threads that read images for a GPU."""
    return ThreadPoolExecutor(min(8, os.cpu_count() or 1), thread_name_prefix="streamcnn-reader")
