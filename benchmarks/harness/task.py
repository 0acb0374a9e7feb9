"""What every method of a comparison is given: images, a budget, a seed, a device."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from benchmarks.harness.scales import Scale
from streamcnn.data.tile_store import TileStore


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """Images to be classified, and what may be taken for it."""

    scale: Scale
    budget: int
    """Bytes, for training and for inference."""
    seed: int
    pretrained: bool
    device: str
    store: TileStore
    """The scale's images."""
    shrunk: Path
    """Folder for these images shrunk."""
    folder: Path
    """The row's own, for checkpoints."""
