"""Finding every digit and adding them up: outside the rules, since training knows boxes and values."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import Dataset

from benchmarks.harness.pyramid import WIDTHS, make_trunk
from streamcnn import StreamingModel
from streamcnn.data.dataset import Sample, TileDataset
from streamcnn.data.sources import ImageSource
from streamcnn.data.ultramnist.layout import PlacedDigit
from streamcnn.geometry.regions import Interval, Region
from streamcnn.runtime.streaming_model import Image
from streamcnn.training import Trainer

NUM_VALUES = 10
BACKGROUND = NUM_VALUES
"""The last class of a cell."""
STRIDE = 8
"""Pixels of a level from one cell to the next."""
SMALLEST_SIDE = 14
"""Pixels of a level: each finds digits of this side to twice of it, and the first also smaller ones."""
RARE = 0.01
"""The probability of a digit in a cell that training begins with (Lin et al. 2017, section 4.1)."""
FOCUS = 2.0
"""Exponent of the focal loss: how much less cells count that are background without a doubt."""
MOST_DIGITS = 100
"""Cells of a level that are looked at, the most probable ones."""
LEAST_PROBABLE = 0.05
"""Below this, a cell is no digit."""
LEAST_MASS = 1e-6
"""Of a sum's probability, so that its logarithm is finite."""


Cell = tuple[int, int, int]
"""Level, row and column."""


class DigitDetector(nn.Module):
    """Looks for digits at every octave of scale, by one trunk and one head.

    The image (N, C, H, W) is halved again and again, as in `ScalePyramid`, and every level gives a map
    (N, 11, H / 8, W / 8): logits of the ten values, and of background, for each cell of 8 x 8 pixels.

    Parameters
    ----------
    num_classes
        Sums that the digits of an image may have: 0 to one less; ten at least.
    num_levels
        Octaves; an image has to be ``8 * 2 ** (num_levels - 1)`` pixels wide and high at least.
    """

    def __init__(self, num_classes: int, num_levels: int) -> None:
        super().__init__()
        assert num_classes >= NUM_VALUES
        self.num_classes = num_classes
        self.num_levels = num_levels
        self.trunk = make_trunk(WIDTHS)
        self.head = nn.Conv2d(WIDTHS[-1], NUM_VALUES + 1, 1)
        assert self.head.bias is not None
        with torch.no_grad():
            self.head.bias.zero_()
            self.head.bias[BACKGROUND] = math.log(NUM_VALUES * (1 - RARE) / RARE)

    def forward(self, image: Tensor) -> list[Tensor]:
        """The maps, finest first."""
        levels = range(self.num_levels)
        return [self.head(self.trunk(image if k == 0 else F.avg_pool2d(image, 2**k))) for k in levels]


def digit_detector(num_classes: int, size: int) -> DigitDetector:
    """For images of ``size`` pixels, whose digits take about half of it at most."""
    num_levels = 1
    while SMALLEST_SIDE * 2**num_levels < size // 2 and STRIDE * 2**num_levels <= size:
        num_levels += 1
    return DigitDetector(num_classes, num_levels)


class DigitSums(StreamingModel):
    """Streams a `DigitDetector`: its maps in train mode, and in eval mode logits (N, classes) of the sums."""

    def forward(self, image: Image) -> Any:
        """Maps (N, 11, rows, columns), finest first, or logits."""
        assert isinstance(self.net, DigitDetector)
        maps: list[Tensor] = super().forward(image)
        return maps if self.training else sums(maps, self.net.num_classes)


# --- training ----------------------------------------------------------------------------------------


class SourceWithDigits(ImageSource):
    """An image source, and where its digits are."""

    def __init__(self, source: ImageSource, digits: Sequence[PlacedDigit]) -> None:
        super().__init__(source.shape, source.dtype, source.name)
        self.digits = tuple(digits)
        self._source = source

    def __reduce__(self) -> tuple[type[SourceWithDigits], tuple[ImageSource, tuple[PlacedDigit, ...]]]:
        return SourceWithDigits, (self._source, self.digits)

    def _read(self, region: Region) -> Tensor:
        return self._source.read(region)


class ImagesWithDigits(Dataset[Sample]):
    """UltraMNIST images, not augmented, whose sources are `SourceWithDigits`."""

    def __init__(self, images: TileDataset) -> None:
        assert images.augmentation is None
        self._images = images
        self.labels = images.labels
        self.set_epoch = images.set_epoch
        self.prefetch = images.prefetch

    @property
    def fingerprint(self) -> str:
        """That of the images."""
        return self._images.fingerprint

    def __len__(self) -> int:
        return len(self._images)

    def __getitem__(self, position: int) -> Sample:
        source, label = self._images[position]
        return SourceWithDigits(source, digits_of(self._images.truth(position))), label


def digits_of(truth: Sequence[Mapping[str, Any]]) -> list[PlacedDigit]:
    """The digits of an UltraMNIST image, from what its tile store knows of it."""
    found = []
    for digit in truth:
        top, left, bottom, right = digit["box"]
        box = Region(Interval(top, bottom), Interval(left, right))
        found.append(PlacedDigit(digit["value"], digit["side"], digit["factor"], box))
    return found


class DetectorTrainer(Trainer):
    """Trains `DigitSums` on boxes and values."""

    def differentiate(
        self, sources: list[ImageSource], labels: Tensor, weight: float
    ) -> tuple[float, Tensor]:
        """Add the gradients of the detector's loss; that, and logits of the sums."""
        assert isinstance(self.net, DigitDetector)
        with self.casting():
            maps: list[Tensor] = self.model(sources)
            loss = torch.zeros((), device=maps[0].device)
            # Taken apart at once: the gradient of a single index is as large as all of them.
            for source, *of_image in zip(sources, *(of_level.unbind() for of_level in maps), strict=True):
                assert isinstance(source, SourceWithDigits)
                loss = loss + detection_loss(of_image, source.digits)
        self.optimisation.backward(weight * loss)
        return float(loss.detach()), sums(maps, self.net.num_classes)


def detection_loss(maps: Sequence[Tensor], digits: Sequence[PlacedDigit]) -> Tensor:
    """The focal loss of an image's cells per digit (Lin et al., Focal Loss for Dense Object Detection, 2017).

    A digit is to be found by the cell at its centre, on the level on which it has 14 to 28 pixels. Other
    cells that it covers there, and those of the levels beside it, may say what they like.

    Parameters
    ----------
    maps
        Logits (11, rows, columns) of each level.
    """
    total = maps[0].new_zeros(())
    for level, logits in enumerate(maps):
        wanted = torch.full(logits.shape[1:], BACKGROUND)
        counts = torch.ones(logits.shape[1:], dtype=torch.bool)
        for digit in digits:
            if abs(level - level_of(digit, len(maps))) <= 1:
                counts[_cells(digit, level, digit.side / 2)] = False
        for digit in digits:
            if level == level_of(digit, len(maps)):
                at = _cells(digit, level, 0.0)
                wanted[at], counts[at] = digit.value, True
        loss = F.cross_entropy(logits[None], wanted[None].to(logits.device), reduction="none")[0]
        sure = torch.exp(-loss)
        total = total + ((1 - sure) ** FOCUS * loss)[counts.to(logits.device)].sum()
    return total / max(1, len(digits))


def level_of(digit: PlacedDigit, num_levels: int) -> int:
    """The level on which a digit is to be found."""
    octave = math.floor(math.log2(max(1.0, digit.side / SMALLEST_SIDE)))
    return min(octave, num_levels - 1)


def _cells(digit: PlacedDigit, level: int, reach: float) -> tuple[slice, slice]:
    """The cells of a level that are within ``reach`` pixels of a digit's centre."""
    cell = STRIDE * 2**level
    centres = ((span.start + span.stop) / 2 for span in digit.box)
    rows, cols = (
        slice(max(0, math.floor((at - reach) / cell)), math.floor((at + reach) / cell) + 1) for at in centres
    )
    return rows, cols


# --- adding up ---------------------------------------------------------------------------------------


def sums(maps: Sequence[Tensor], num_classes: int) -> Tensor:
    """Logarithms (N, num_classes) of the probabilities of what the digits of each image add up to.

    The digits that are found are independent, and each may also be none. What is more than the largest class
    counts as that.

    Parameters
    ----------
    maps
        Logits (N, 11, rows, columns) of each level.
    """
    found = [torch.softmax(logits.detach().float().cpu(), 1) for logits in maps]
    rows = [_sum_of(of_image, num_classes) for of_image in zip(*found, strict=True)]
    return torch.stack(rows).clamp(min=LEAST_MASS).log()


def _sum_of(probabilities: Sequence[Tensor], num_classes: int) -> Tensor:
    mass = np.array([1.0])
    for cell in most_probable(probabilities):
        zero, *others, background = cell.tolist()
        mass = np.convolve(mass, [zero + background, *others])
    classes = np.minimum(np.arange(len(mass)), num_classes - 1)
    return torch.from_numpy(np.bincount(classes, weights=mass, minlength=num_classes)).float()


def most_probable(probabilities: Sequence[Tensor]) -> list[Tensor]:
    """The cells of an image that hold a digit, each with its probabilities (11,), the most probable first.

    Of cells next to each other, on one level or on two levels next to each other, the most probable one is
    kept: digits do not overlap, so two of them are further apart, but for a few that touch.

    Parameters
    ----------
    probabilities
        Of the eleven classes (11, rows, columns), on each level.
    """
    candidates = []
    for level, of_level in enumerate(probabilities):
        there = 1 - of_level[BACKGROUND].flatten()
        likely, cells = there.topk(min(MOST_DIGITS, len(there)))
        for probability, at in zip(likely.tolist(), cells.tolist(), strict=True):
            if probability >= LEAST_PROBABLE:
                row, col = divmod(at, of_level.shape[2])
                candidates.append((probability, (level, row, col)))
    kept: list[Cell] = []
    for _, cell in sorted(candidates, reverse=True):
        if not any(_are_neighbours(cell, other) for other in kept):
            kept.append(cell)
    return [probabilities[level][:, row, col] for level, row, col in kept]


def _are_neighbours(one: Cell, other: Cell) -> bool:
    """Whether cells of one level, or of two next to each other, touch or overlap."""
    if abs(one[0] - other[0]) > 1:
        return False
    reach = STRIDE * 2 ** max(one[0], other[0])
    centres = [tuple((at + 0.5) * STRIDE * 2**level for at in cell) for level, *cell in (one, other)]
    return all(abs(a - b) <= reach for a, b in zip(*centres, strict=True))
