"""A small run and a small tile store for tests that change their files, and the check of what these raise."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from streamcnn import TensorSource
from streamcnn.data.image_files import find_images
from streamcnn.data.tile_store import Head, TileStoreWriter, write_image_folder
from streamcnn.errors import StreamError
from streamcnn.training import RunConfig, TrainSettings, make_trainer

SIZE = (40, 30)
"""Size of the images in pixels."""
FACTORY = "hostile_factories:small"
_MODULE = """
from torch import nn

def small(width=4):
    return nn.Sequential(
        nn.Conv2d(3, width, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        nn.Linear(width, 2),
    )
"""


def make_run(folder: Path) -> Path:
    """A run of one epoch in ``folder``, whose model is a factory that can be imported from then on."""
    (folder / "hostile_factories.py").write_text(_MODULE)
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))
    for split in ("train", "val"):
        for name, value in (("bright", 200), ("dark", 50)):
            place = folder / "images" / split / name
            place.mkdir(parents=True)
            Image.fromarray(np.full((16, 12, 3), value, np.uint8)).save(place / "a.png")
    config = RunConfig(
        model=FACTORY,
        data=str(folder / "images"),
        validation_split="val",
        tile=(16, 12),
        settings=TrainSettings(epochs=1, batch_size=2),
    )
    make_trainer(config, folder / "run").run()
    return folder / "run"


def make_store(folder: Path, *, levels: int = 2) -> Path:
    """A store of two images of two classes, with two levels each."""
    pixels = torch.randint(0, 256, (3, 40, 30), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    with TileStoreWriter(folder, Head("images", {"made by": "a test"}, ("cat", "dog"))) as writer:
        for label, name in enumerate(("train/a", "train/b")):
            writer.add(
                write_image_folder(
                    writer.folder,
                    TensorSource(pixels.roll(label, 2)),
                    name=name,
                    split="train",
                    label=label,
                    levels=levels,
                    origin={"path": "/somewhere"},
                )
            )
        writer.finish()
    return folder


def change_json(path: Path, change: Callable[[Any], object]) -> None:
    """Change the content of a JSON file in place."""
    found = json.loads(path.read_text())
    change(found)
    path.write_text(json.dumps(found))


@contextmanager
def refused_or_not() -> Iterator[None]:
    """Assert that the block either succeeds or raises a `StreamError` with a readable text."""
    texts = []
    try:
        yield
    except StreamError as error:
        texts.append(str(error))
    assert all(0 < len(text) < 1500 for text in texts)


def find_images_of(path: Path) -> None:
    find_images([path])
