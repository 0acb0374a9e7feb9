"""Host memory for reading an image, as data: image sources state it, plans count it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import NamedTuple

HELD = "decoded image"
"""Name of the plan's term for bytes held between reads."""
OPENING = "decoding the image"
"""Name of the term for bytes that the first read takes in addition."""
READING = "reading the image"
"""Name of the term for bytes that one region takes while it is read."""

OF_IMAGES = frozenset((HELD, OPENING, READING))
"""Terms that are zero for most images."""

Size = tuple[int, int]
"""Height and width in pixels."""


class ReadingBytes(NamedTuple):
    """Host memory in bytes while regions of one size are read."""

    held: int
    """Kept between reads, for as long as a pass uses the image."""
    transient: int
    """On top of ``held`` while one region is read, the region itself included."""


@dataclass(frozen=True, slots=True)
class ReadingCost:
    """Bytes of host memory that reading one image takes, as a function of the region's size.

    Equal costs mean equal plans, so nothing in here tells one file from another of its kind.
    """

    size: Size
    """Extents of the whole image."""
    held: int = 0
    """Kept after the first read: pixels that are decoded whole, or a cache at its limit."""
    opening: int = 0
    """On top of ``held``, once, while the first read fills it."""
    pixel: int = 0
    """For each pixel of the region, all channels and all copies."""
    piece: Size = (1, 1)
    """Extents of a chunk, tile or strip, which is only decoded as a whole."""
    piece_bytes: int = 0
    """For each piece that is decoded: its encoded and its decoded bytes, and the codec's copies."""
    layers: int = 1
    """Pieces at one position, such as one for each channel."""
    at_once: int | None = None
    """Pieces in memory at the same time, at most; ``None`` for all that the region touches."""
    fixed: int = 0
    """For each read, whatever the region's size."""

    def of(self, region: Size) -> ReadingBytes:
        """The cost of a region of the given size, placed where it touches the most pieces."""
        rows, cols = map(_touched, region, self.piece, self.size)
        touched = rows * cols * self.layers
        pieces = touched if self.at_once is None else min(touched, self.at_once)
        transient = self.pixel * region[0] * region[1] + self.piece_bytes * pieces + self.fixed
        return ReadingBytes(self.held, transient)

    @property
    def least(self) -> int:
        """The peak of reading if all regions were one pixel: no tile size makes it smaller."""
        return self.held + max(self.opening, self.of((1, 1)).transient)

    def transposed(self) -> ReadingCost:
        """The cost of the same image with rows and columns exchanged."""
        return replace(self, size=self.size[::-1], piece=self.piece[::-1])


@dataclass(frozen=True, slots=True)
class BatchCost:
    """Bytes of host memory that reading a batch takes, one image after the other."""

    costs: tuple[ReadingCost, ...] = ()
    """One for each image; none if the batch is in memory already, or host memory is not what is limited."""
    stored_pixel: int = 0
    """Bytes of one pixel as stored, all channels."""
    maps: tuple[tuple[str, BatchCost], ...] = ()
    """By node name: the costs of maps that are read by regions beside the image, such as a mask."""

    @property
    def held(self) -> int:
        """Kept after the first read of every image and map."""
        return sum(cost.held for cost in self.costs) + sum(cost.held for _, cost in self.maps)

    @property
    def opening(self) -> int:
        """On top of ``held``, while the images and maps are read for the first time."""
        every = (*(cost.opening for cost in self.costs), *(cost.opening for _, cost in self.maps))
        return max(every, default=0)

    @property
    def least(self) -> int:
        """The peak of reading if all tiles were one pixel: no plan makes it smaller."""
        return self.held + max(self.opening, self.of((1, 1)).transient)

    def of_map(self, name: str, region: Size) -> ReadingBytes:
        """The cost of one region of the map ``name`` beside the image, or of the image if no map has it."""
        return dict(self.maps).get(name, self).of(region)

    def of(self, region: Size) -> ReadingBytes:
        """The cost of one region of every image."""
        largest = max((cost.of(region).transient for cost in self.costs), default=0)
        # The regions read before the last one, and the batch into which all are copied.
        copies = 2 * len(self.costs) - 1 if len(self.costs) > 1 else 0
        return ReadingBytes(self.held, largest + copies * self.stored_pixel * region[0] * region[1])


NO_READING = BatchCost()
"""The cost of a batch whose pixels are in memory already."""


def _touched(extent: int, piece: int, size: int) -> int:
    """Pieces that an interval of ``extent`` positions touches at most."""
    return min(-(-size // piece), (max(extent, 1) + piece - 2) // piece + 1)
