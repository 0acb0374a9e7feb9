"""Small segmentation trainings, on images in which a pixel's brightness nearly determines its class."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import tifffile

from streamcnn.training import RunConfig, TrainSettings

SIZE = (72, 64)
IGNORED = 255
FACTORY = "segmenting_nets:small"
MODULE = """
import torch
from torch import nn


def small(classes=3, width=6):
    torch.manual_seed(1)
    return nn.Sequential(
        nn.Conv2d(1, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU(), nn.Dropout(0.1),
        nn.Conv2d(width, classes, 1),
    )


class Named(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = small()

    def forward(self, x):
        found = self.net(x)
        return {"out": found, "aux": found[:, :1]}


def picked():
    net = Named()
    net.register_forward_hook(lambda module, args, result: result["out"])
    return net


def classifier():
    return nn.Sequential(nn.Conv2d(1, 3, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten())
"""


def draw_pair(seed: int, size: tuple[int, int] = SIZE) -> tuple[np.ndarray, np.ndarray]:
    """Draw a bright and a very bright square on dark ground, and their mask, whose first rows are ignored."""
    draw = np.random.default_rng(seed)
    mask = np.zeros(size, np.uint8)
    for label in (1, 2):
        top, left = draw.integers(4, size[0] - 28), draw.integers(4, size[1] - 28)
        mask[top : top + 24, left : left + 24] = label
    image = 40 + 80 * mask.astype(int) + draw.integers(-25, 26, size)
    mask[:2] = IGNORED
    return image.astype(np.uint8), mask


def write_pairs(
    folder: Path, count: int = 8, splits: tuple[str, ...] = ("train", "train", "val", "test")
) -> Path:
    """Write images and masks in two folders, and a table that names both with their splits."""
    rows = ["image,mask,split"]
    for seed in range(count):
        for name, pixels in zip(("images", "masks"), draw_pair(seed), strict=True):
            (folder / name).mkdir(parents=True, exist_ok=True)
            tifffile.imwrite(folder / name / f"{seed}.tif", pixels)
        rows.append(f"images/{seed}.tif,masks/{seed}.tif,{splits[seed % len(splits)]}")
    (folder / "scenes.csv").write_text("\n".join([*rows, ""]))
    return folder / "scenes.csv"


def write_factories(folder: Path) -> None:
    (folder / "segmenting_nets.py").write_text(MODULE)


def importable_place(folder: Path) -> Path:
    """Fill ``folder`` with images, masks, a table of them and importable factories of models."""
    write_pairs(folder)
    write_factories(folder)
    sys.path.insert(0, str(folder))
    return folder


def a_config(data: Path, **changes: Any) -> RunConfig:
    settings = {
        "epochs": 2,
        "accumulate": 2,
        "learning_rate": 0.05,
        "save_every": 1,
        **changes.pop("settings", {}),
    }
    values: dict[str, Any] = {
        "task": "segmentation",
        "model": FACTORY,
        "data": str(data),
        "validation_split": "val",
        "tile": (40, 40),
        "settings": TrainSettings(**settings),
        **changes,
    }
    return RunConfig(**values)
