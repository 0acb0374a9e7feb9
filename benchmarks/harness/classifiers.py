"""From a list of images to logits: what the methods train."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.harness.images import read_whole
from streamcnn.data.normalisation import Normalise
from streamcnn.data.sources import ImageSource
from streamcnn.geometry.regions import Interval, Region
from streamcnn.support.models import load_model

HIDDEN = 100
"""Units between the two fully connected layers, as in the authors' code."""


def make_net(
    model: str, num_classes: int, size: int, *, pretrained: bool, hidden: int | None = HIDDEN
) -> nn.Module:
    """A network from images (N, 1, H, W) to logits.

    Parameters
    ----------
    model
        A timm name, whose head is replaced by two fully connected layers with a ReLU between them; or
        ``package.module:factory``, called with ``num_classes`` and ``size``.
    size
        Height and width of the images.
    pretrained
        Whether a timm model begins with the weights that timm has for it.
    hidden
        Units between the two layers; None takes a single layer.
    """
    if ":" in model:
        return load_model(model, num_classes=num_classes, size=size)
    backbone = load_model(model, num_classes=0, in_chans=1, pretrained=pretrained)
    width = getattr(backbone, "head_hidden_size", backbone.num_features)
    assert isinstance(width, int)
    if hidden is None:
        return nn.Sequential(backbone, nn.Linear(width, num_classes))
    return nn.Sequential(backbone, nn.Linear(width, hidden), nn.ReLU(), nn.Linear(hidden, num_classes))


def leave_out_compiled_code(model: nn.Module, check: Callable[[], None]) -> None:
    """Call ``check`` after each convolution has met a size of maps for the first time, forward and backward.

    On the CPU that is when oneDNN has compiled kernels for it. Of their address space, a megabyte each and
    hardly touched, the ceiling leaves out what it is told to look at.
    """
    seen = set()

    def look(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        known = (module, inputs[0].shape, output.requires_grad)
        if known not in seen:
            seen.add(known)
            check()
            if inputs[0].requires_grad:
                inputs[0].register_hook(lambda gradient: check())

    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            module.register_forward_hook(look)


class WholeImages(nn.Module):
    """Plain PyTorch on whole images."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net
        self.normalise = Normalise()

    def forward(self, sources: Sequence[ImageSource]) -> Tensor:
        """Logits (N, classes)."""
        return self.net(self.normalise(self.read(sources)))

    def read(self, sources: Sequence[ImageSource]) -> Tensor:
        """The images (N, C, H, W), as they are stored, on the network's device."""
        device = next(self.net.parameters()).device
        return torch.stack([read_whole(source) for source in sources]).to(device)


class LearnedResizer(nn.Module):
    """Talebi and Milanfar, Learning to Resize Images for Computer Vision Tasks (ICCV 2021), Figure 2.

    A bilinear resizing and, added to it, a branch of convolutions that is resized by the same rule between
    its first layers and its residual blocks.

    Parameters
    ----------
    size
        Height and width of the result.
    num_channels, num_features, num_blocks
        Of the image, of the branch, and residual blocks in it.
    """

    def __init__(self, size: int, num_channels: int = 1, num_features: int = 16, num_blocks: int = 1) -> None:
        super().__init__()
        self.size = size
        self.before = nn.Sequential(
            nn.Conv2d(num_channels, num_features, 7, padding=3),
            nn.LeakyReLU(0.2),
            nn.Conv2d(num_features, num_features, 1),
            nn.LeakyReLU(0.2),
            nn.BatchNorm2d(num_features),
        )
        self.blocks = nn.Sequential(*(_ResidualBlock(num_features) for _ in range(num_blocks)))
        self.join = nn.Sequential(
            nn.Conv2d(num_features, num_features, 3, padding=1, bias=False), nn.BatchNorm2d(num_features)
        )
        self.after = nn.Conv2d(num_features, num_channels, 7, padding=3)

    def forward(self, image: Tensor) -> Tensor:
        """(N, C, H, W) to (N, C, size, size)."""
        features = self._resized(self.before(image))
        features = features + self.join(self.blocks(features))
        return self._resized(image) + self.after(features)

    def _resized(self, image: Tensor) -> Tensor:
        return F.interpolate(image, size=(self.size, self.size), mode="bilinear", align_corners=False)


class _ResidualBlock(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.branch = nn.Sequential(
            nn.Conv2d(width, width, 3, padding=1, bias=False),
            nn.BatchNorm2d(width),
            nn.LeakyReLU(0.2),
            nn.Conv2d(width, width, 3, padding=1, bias=False),
            nn.BatchNorm2d(width),
        )

    def forward(self, image: Tensor) -> Tensor:
        return image + self.branch(image)


class _Pieces(nn.Module):
    """What reads an image piece by piece, all of the same size and inside of the image."""

    def __init__(self, net: nn.Module, tile: int, share: float) -> None:
        super().__init__()
        self.net = net
        self.tile = tile
        self.share = share
        self.normalise = Normalise()

    def grid(self, image: Tensor | ImageSource) -> list[Region]:
        """The pieces of an image, row by row."""
        rows, cols = (_starts(size, self.tile) for size in image.shape[1:])
        return [
            Region(Interval(row, row + self.tile), Interval(col, col + self.tile))
            for row in rows
            for col in cols
        ]

    def sample_size(self, num_pieces: int) -> int:
        """As many pieces as the share says, at least one."""
        return max(1, round(self.share * num_pieces))

    def run(self, images: Sequence[Tensor], regions: Sequence[Sequence[Region]]) -> Tensor:
        """What the network gives for the regions of each image (N, regions, width), all in one batch."""
        device = next(self.net.parameters()).device
        pixels = [
            image[:, rows.start : rows.stop, cols.start : cols.stop]
            for image, of in zip(images, regions, strict=True)
            for rows, cols in of
        ]
        found = self.net(self.normalise(torch.stack(pixels).to(device)))
        return found.unflatten(0, (len(images), -1))

    def run_all(self, images: Sequence[Tensor]) -> Tensor:
        """The same for all pieces (N, pieces, width) without gradients, as many at a time as a sample has."""
        grids = [self.grid(image) for image in images]
        step = self.sample_size(len(grids[0]))
        with torch.no_grad():
            parts = [
                self.run(images, [grid[at : at + step] for grid in grids])
                for at in range(0, len(grids[0]), step)
            ]
        return torch.cat(parts, 1)


class TileVote(_Pieces):
    """Pieces without context, whose logits are averaged: over a sample of them in train mode, else over all.

    What the UltraMNIST paper's related work warns of: the sum of digits in a piece is not that of the image.
    """

    def forward(self, sources: Sequence[ImageSource]) -> Tensor:
        """Logits (N, classes)."""
        images = [read_whole(source) for source in sources]
        if not self.training:
            return self.run_all(images).mean(1)
        grids = [self.grid(image) for image in images]
        drawn = [torch.randperm(len(grid))[: self.sample_size(len(grid))].tolist() for grid in grids]
        chosen = [[grid[at] for at in some] for grid, some in zip(grids, drawn, strict=True)]
        return self.run(images, chosen).mean(1)


class PatchGD(_Pieces):
    """Gupta et al., Patch Gradient Descent: Training Neural Networks on Very Large Images (2023).

    A grid Z of features, one vector for each patch, is filled without gradients. Then samples of the patches,
    which together are all of them, are run again with gradients and take their places in Z, from which a
    small network finds the logits: an inner step for each sample. The gradients of all inner steps are added
    up to one update (their epsilon equals the number of inner steps). In eval mode Z is filled, and read.

    Parameters
    ----------
    net
        From patches (N, C, tile, tile) to features (N, width).
    tile, share
        Height and width of a patch, and the share of them in a sample.
    width
        Of a feature vector.
    grid_size
        Rows and columns of Z.
    num_classes
        Of the logits.
    """

    def __init__(
        self, net: nn.Module, tile: int, share: float, *, width: int, grid_size: int, num_classes: int
    ) -> None:
        super().__init__(net, tile, share)
        self.head = nn.Sequential(
            nn.Conv2d(width, HIDDEN, 3 if grid_size >= 3 else 1),
            nn.ReLU(),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(HIDDEN, num_classes),
        )
        self.grid_size = grid_size
        self._images: list[Tensor] = []
        """Of the present update, as they are stored."""
        self.filled: Tensor | None = None
        """The grid Z (N, patches, width) of the present update, without gradients."""
        self._order: list[int] = []

    @property
    def num_inner_steps(self) -> int:
        """Samples that together are all patches."""
        num_patches = self.grid_size**2
        return math.ceil(num_patches / self.sample_size(num_patches))

    def begin(self, sources: Sequence[ImageSource]) -> None:
        """Fill Z (N, patches, width), and draw the order in which patches are sampled."""
        self._images = []  # Two batches are not to be held at a time.
        self._images = [read_whole(source) for source in sources]
        self.filled = self.run_all(self._images)
        self._order = torch.randperm(self.filled.shape[1]).tolist()

    def forward(self, sources: Sequence[ImageSource]) -> Tensor:
        """Logits (N, classes) of the next inner step, or in eval mode of the images."""
        if not self.training:
            return self._classify(self.run_all([read_whole(source) for source in sources]))
        assert self.filled is not None
        size = self.sample_size(self.filled.shape[1])
        chosen, self._order = self._order[:size], self._order[size:]
        grids = [self.grid(image) for image in self._images]
        fresh = self.run(self._images, [[grid[at] for at in chosen] for grid in grids])
        mixed = self.filled.index_copy(1, torch.tensor(chosen, device=fresh.device), fresh)
        self.filled = mixed.detach()
        if not self._order:
            self._images = []
        return self._classify(mixed)

    def _classify(self, filled: Tensor) -> Tensor:
        logits: Tensor = self.head(filled.transpose(1, 2).unflatten(2, (self.grid_size, -1)))
        return logits


def grid_size(size: int, tile: int) -> int:
    """Rows and columns of pieces of an image of ``size`` pixels."""
    return len(_starts(size, tile))


def _starts(size: int, tile: int) -> list[int]:
    """Where pieces begin; evenly spread, so that the last one ends with the image."""
    if tile >= size:
        return [0]
    count = math.ceil(size / tile)
    return [at * (size - tile) // (count - 1) for at in range(count)]
