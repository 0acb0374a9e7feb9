"""From a list of images to logits: what the methods train."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.harness.images import read_whole
from streamcnn.data.normalisation import Normalise
from streamcnn.data.sources import ImageSource
from streamcnn.models import load_model
from streamcnn.regions import Interval, Region

HIDDEN = 100
"""Units between the two fully connected layers, as in the authors' code."""


def make_net(model: str, num_classes: int, size: int, *, pretrained: bool) -> nn.Module:
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
    """
    if ":" in model:
        return load_model(model, num_classes=num_classes, size=size)
    backbone = load_model(model, num_classes=0, in_chans=1, pretrained=pretrained)
    width: int = (
        backbone.num_features if not hasattr(backbone, "head_hidden_size") else backbone.head_hidden_size
    )
    return nn.Sequential(backbone, nn.Linear(width, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, num_classes))


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

    def grid(self, source: ImageSource) -> list[Region]:
        """The pieces of an image, row by row."""
        rows, cols = (_starts(size, self.tile) for size in source.shape[1:])
        return [
            Region(Interval(row, row + self.tile), Interval(col, col + self.tile))
            for row in rows
            for col in cols
        ]

    def sample(self, num_pieces: int) -> list[int]:
        """Positions of as many pieces as the share says, at least one."""
        count = max(1, round(self.share * num_pieces))
        return sorted(torch.randperm(num_pieces)[:count].tolist())

    def run(self, source: ImageSource, regions: Sequence[Region]) -> Tensor:
        """What the network gives for each of the regions."""
        device = next(self.net.parameters()).device
        pixels = torch.stack([source.read(region) for region in regions])
        return self.net(self.normalise(pixels.to(device)))

    def run_one_by_one(self, source: ImageSource, regions: Sequence[Region]) -> Tensor:
        """The same without gradients, one region in memory at a time."""
        with torch.no_grad():
            return torch.cat([self.run(source, [region]) for region in regions])


class TileVote(_Pieces):
    """Pieces without context, whose logits are averaged: over a sample of them in train mode, else over all.

    What the UltraMNIST paper's related work warns of: the sum of digits in a piece is not that of the image.
    """

    def forward(self, sources: Sequence[ImageSource]) -> Tensor:
        """Logits (N, classes)."""
        return torch.stack([self._classify(source).mean(0) for source in sources])

    def _classify(self, source: ImageSource) -> Tensor:
        regions = self.grid(source)
        if not self.training:
            return self.run_one_by_one(source, regions)
        return self.run(source, [regions[at] for at in self.sample(len(regions))])


class PatchGD(_Pieces):
    """Gupta et al., Patch Gradient Descent: Training Neural Networks on Very Large Images (2023).

    A grid Z of features, one vector for each patch, is filled without gradients. Then a sample of patches is
    run again with gradients and takes its places in Z, from which a small network finds the logits; this is
    done ``inner_steps`` times, Z keeping what was put into it. The gradients of all inner steps are added up
    to one update (their epsilon equals the number of inner steps). In eval mode Z is filled, and read.

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
    inner_steps
        Samples of one batch.
    """

    def __init__(
        self,
        net: nn.Module,
        tile: int,
        share: float,
        *,
        width: int,
        grid_size: int,
        num_classes: int,
        inner_steps: int = 1,
    ) -> None:
        super().__init__(net, tile, share)
        self.inner_steps = inner_steps
        self.head = nn.Sequential(
            nn.Conv2d(width, HIDDEN, 3 if grid_size >= 3 else 1),
            nn.ReLU(),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(HIDDEN, num_classes),
        )
        self.grid_size = grid_size
        self._filled: list[Tensor] = []

    def begin(self, sources: Sequence[ImageSource]) -> None:
        """Fill Z (patches, width) for each image, without gradients."""
        was_training = self.training
        self.eval()  # running statistics are for what is trained on
        self._filled = [self.run_one_by_one(source, self.grid(source)) for source in sources]
        self.train(was_training)

    def forward(self, sources: Sequence[ImageSource]) -> Tensor:
        """Logits (N, classes) of an inner step, or in eval mode of the images."""
        if not self.training:
            self.begin(sources)
            return self.head(self._as_grid(self._filled))
        grids = []
        for index, source in enumerate(sources):
            regions = self.grid(source)
            chosen = self.sample(len(regions))
            fresh = self.run(source, [regions[at] for at in chosen])
            mixed = self._filled[index].index_copy(0, torch.tensor(chosen, device=fresh.device), fresh)
            self._filled[index] = mixed.detach()
            grids.append(mixed)
        return self.head(self._as_grid(grids))

    def _as_grid(self, filled: Sequence[Tensor]) -> Tensor:
        stacked = torch.stack(list(filled))
        return stacked.transpose(1, 2).unflatten(2, (self.grid_size, -1))


def grid_size(size: int, tile: int) -> int:
    """Rows and columns of pieces of an image of ``size`` pixels."""
    return len(_starts(size, tile))


def _starts(size: int, tile: int) -> list[int]:
    """Where pieces begin; evenly spread, so that the last one ends with the image."""
    if tile >= size:
        return [0]
    count = math.ceil(size / tile)
    return [at * (size - tile) // (count - 1) for at in range(count)]
