"""Augmentations that are functions of coordinates and pixels alone.

An image is read tile by tile, several times, in an order that the plan decides. So an augmentation is drawn
once for an image, and moves or changes each pixel independently of the tile it is read in: mirroring,
rotation by quarter turns, inversion and scaling of intensities. Anything that reads neighbours (blur, elastic
deformation, rotation by other angles) is not of this kind.
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass, replace
from typing import Any, final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from streamcnn.data.sources import ImageSource
from streamcnn.geometry.regions import Interval, Region
from streamcnn.plan.reading import ReadingCost

Pixels = NDArray[Any]
_FLOAT_BYTES = 8
"""Bytes of a sample of an integer type while its intensity is changed."""


@dataclass(frozen=True, slots=True)
class Augmentation:
    """The augmentation of one image: it is mirrored, then rotated, then its intensities are changed."""

    mirror: bool = False
    """Whether left and right are exchanged."""
    quarter_turns: int = 0
    """Number of counterclockwise rotations by 90 degrees, 0 to 3."""
    invert: bool = False
    """Black and white change places: 255 - x for uint8, 4095 - x where the image says that it has 12 bits,
    -1 - x for signed integers, 1 - x for floats."""
    gain: float = 1.0
    """Factor of the distance from the middle of the image's range; of floats, from 0.5."""

    def __post_init__(self) -> None:
        if self.quarter_turns not in range(4):
            raise ValueError(f"quarter_turns={self.quarter_turns}: allowed are 0, 1, 2 and 3")
        if not self.gain > 0:
            raise ValueError(f"gain={self.gain}: allowed are positive factors")

    @property
    def is_identity(self) -> bool:
        """Whether the augmentation changes nothing."""
        return self == Augmentation()


@final
class AugmentedSource(ImageSource):
    """An image source seen through an augmentation; shape as augmented, dtype as stored."""

    def __init__(self, source: ImageSource, augmentation: Augmentation) -> None:
        channels, height, width = source.shape
        turned = augmentation.quarter_turns % 2 == 1
        shape = (channels, width, height) if turned else source.shape
        super().__init__(shape, source.dtype, source.name, largest=source.largest)
        self._source = source
        self._augmentation = augmentation

    def __reduce__(self) -> tuple[type[AugmentedSource], tuple[ImageSource, Augmentation]]:
        return AugmentedSource, (self._source, self._augmentation)

    @property
    def shared_tensor(self) -> Tensor | None:
        """The shared tensor of the image as stored."""
        return self._source.shared_tensor

    @property
    def sample(self) -> bytes | None:
        """The sample of the image as stored."""
        return self._source.sample

    @property
    def held_bytes(self) -> int:
        """Bytes that the stored image's source holds."""
        return self._source.held_bytes

    @property
    def pieces(self) -> str:
        """The pieces of the image as stored."""
        return self._source.pieces

    @property
    def reading_cost(self) -> ReadingCost:
        """The stored image's cost, plus copies of the region, and floats if intensities change."""
        chosen, channels = self._augmentation, self.shape[0]
        cost = self._source.reading_cost
        cost = cost.transposed() if chosen.quarter_turns % 2 else cost
        floats = 2 * (self.dtype.itemsize if self.dtype.is_floating_point else _FLOAT_BYTES)
        sample = 2 * self.dtype.itemsize + (0 if chosen.gain == 1 else floats)
        return replace(cost, pixel=cost.pixel + channels * sample)

    def start(self) -> None:
        """Start the stored image's source."""
        self._source.start()

    def release(self) -> None:
        """Release what the stored image's source holds."""
        self._source.release()

    def _read(self, region: Region) -> Tensor:
        chosen = self._augmentation
        # In NumPy, since PyTorch has no such operations on uint16.
        pixels = self._source.read(self._stored_region(region)).numpy()
        if chosen.mirror:
            pixels = np.flip(pixels, 2)
        pixels = np.rot90(pixels, chosen.quarter_turns, (1, 2))
        pixels = _with_intensity(pixels, self.largest, invert=chosen.invert, gain=chosen.gain)
        # Always a copy: NumPy counts an axis of one pixel with a negative stride as contiguous.
        return torch.from_numpy(pixels.copy())

    def _stored_region(self, region: Region) -> Region:
        """The region of the stored image that holds the pixels of ``region``."""
        rows, cols = region
        _, height, width = self.shape
        # A counterclockwise quarter turn moved the pixel now at (row, col) from (col, height - 1 - row).
        for _ in range(self._augmentation.quarter_turns):
            rows, cols = cols, _reversed(rows, height)
            height, width = width, height
        if self._augmentation.mirror:
            cols = _reversed(cols, width)
        return Region(rows, cols)


@dataclass(frozen=True, slots=True)
class RandomAugmentation:
    """Draws an augmentation for each image and epoch, of the kinds that are enabled."""

    mirrors: bool = False
    """Mirror half of the images."""
    turns: bool = False
    """Rotate by 0, 1, 2 or 3 quarter turns, equally likely."""
    inversion: float = 0.0
    """Share of images that are inverted."""
    gains: tuple[float, float] = (1.0, 1.0)
    """Range of the gain, which is drawn uniformly on a logarithmic scale."""

    def __post_init__(self) -> None:
        if not 0 <= self.inversion <= 1:
            raise ValueError(f"inversion={self.inversion}: allowed are shares from 0 to 1")
        low, high = self.gains
        if not 0 < low <= high < math.inf:
            raise ValueError(f"gains={self.gains}: allowed is (low, high) with 0 < low <= high, both finite")

    def draw(self, *, seed: int, epoch: int, index: int) -> Augmentation:
        """The augmentation of an image in an epoch, which depends on the arguments alone."""
        key = hashlib.sha256(f"augmentation {seed} {epoch} {index}".encode()).digest()
        mirror, turn, invert, gain = (int.from_bytes(key[at : at + 4], "little") for at in range(0, 16, 4))
        low, high = self.gains
        return Augmentation(
            mirror=self.mirrors and mirror % 2 == 1,
            quarter_turns=turn % 4 if self.turns else 0,
            invert=invert < self.inversion * 2**32,
            gain=float(low * (high / low) ** (gain / 2**32)),
        )


def _with_intensity(pixels: Pixels, largest: int | None, *, invert: bool, gain: float) -> Pixels:
    """``pixels`` inverted, and with more or less contrast, clipped to their range."""
    dtype = pixels.dtype
    if np.issubdtype(dtype, np.floating):
        pixels = 1 - pixels if invert else pixels
        return pixels if gain == 1 else (pixels - 0.5) * dtype.type(gain) + dtype.type(0.5)
    assert largest is not None
    least = np.iinfo(dtype).min if dtype.kind == "i" else 0
    if invert:
        pixels = _inverted(pixels, largest)
    if gain == 1:
        return pixels
    # For signed types, the type's range: nothing says how small the image's numbers may be.
    middle = -0.5 if dtype.kind == "i" else largest / 2
    from_middle = np.subtract(pixels, middle, dtype=np.float64)
    changed: Pixels = (from_middle * gain + middle).round().clip(least, largest).astype(dtype)
    return changed


def _inverted(pixels: Pixels, largest: int) -> Pixels:
    """Exchange the smallest and the largest value, in signed types too."""
    dtype = pixels.dtype
    if dtype.kind != "u" or largest == np.iinfo(dtype).max:
        return ~pixels
    top = dtype.type(largest)
    inverted: Pixels = top - np.minimum(pixels, top)
    return inverted


def _reversed(interval: Interval, size: int) -> Interval:
    """``interval`` counted from the other end of an axis."""
    return Interval(size - interval.stop, size - interval.start)
