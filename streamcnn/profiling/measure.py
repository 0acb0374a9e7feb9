"""Measures training updates with each tile size in a fresh process.

Each tile size needs a process of its own, because the peak of resident memory is a high-water mark that
never falls, and because memory freed by one update would be reused by the next.
"""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from streamcnn.data.sources.zarr import CHUNK, write_zarr_bands
from streamcnn.errors import StreamError
from streamcnn.profiling.tile_profile import TileProfile
from streamcnn.stores import free_bytes
from streamcnn.support.units import format_bytes

_LINES_OF_A_CRASH = 12


class ProfileFailed(StreamError, RuntimeError):
    """A measuring process failed for a reason other than the budget."""


def profile_tiles(
    model: str,
    shape: tuple[int, int, int, int],
    tiles: Sequence[int],
    budget: int | None,
    *,
    repeats: int = 1,
    options: Mapping[str, Any] | None = None,
) -> Iterator[TileProfile]:
    """Measure each tile size on random images on disk, and yield its profile as soon as it is known.

    Parameters
    ----------
    model
        A name as :func:`streamcnn.support.models.load_model` reads it.
    shape
        Shape of the batch, ``(N, C, H, W)`` in pixels.
    tiles
        Largest edges of a tile in input pixels.
    budget
        Bytes that an update may take above the baseline; ``None`` sets no ceiling. A tile size that does
        not fit has a profile too, with a refusal.
    repeats
        Number of updates whose median is the time, after one warm-up update; 0 times the warm-up update
        itself. The peak is the largest of all updates.
    options
        Arguments of the model, as JSON types.

    Raises
    ------
    ValueError
        If there is no tile size, one is not positive, or ``repeats`` is negative.
    ProfileFailed
        If a measurement fails for another reason than the budget.
    """
    if not tiles or min(tiles) < 1:
        raise ValueError(f"tiles={list(tiles)}: allowed are one or more positive numbers of pixels")
    if repeats < 0:
        raise ValueError(f"repeats={repeats}: allowed are 0 and positive numbers of updates")
    made = _Model(model, json.dumps(dict(options or {})))
    return _measure(made, shape, tuple(tiles), budget, repeats)


def _random_bands(shape: tuple[int, int, int]) -> Iterator[Tensor]:
    """Random bytes for an image, from the top, as many rows at a time as a chunk has."""
    channels, height, width = shape
    for row in range(0, height, CHUNK):
        yield torch.randint(256, (channels, min(CHUNK, height - row), width), dtype=torch.uint8)


@dataclass(frozen=True, slots=True)
class _Model:
    """The name and arguments from which a fresh process makes the model."""

    name: str
    options: str


def _measure(
    model: _Model, shape: tuple[int, int, int, int], tiles: tuple[int, ...], budget: int | None, repeats: int
) -> Iterator[TileProfile]:
    with tempfile.TemporaryDirectory(prefix="streamcnn-profile-") as name:
        folder = Path(name)
        needed, free = math.prod(shape), free_bytes(folder)
        if needed > free:
            raise ProfileFailed(
                f"the image takes {format_bytes(needed)} on the disk at {folder.parent}, of which "
                f"{format_bytes(free)} are free: give a smaller --size, or another disk with TMPDIR"
            )
        for index in range(shape[0]):
            write_zarr_bands(folder / f"image-{index}.zarr", shape[1:], torch.uint8, _random_bands(shape[1:]))
        for tile in tiles:
            yield _in_fresh_process(model, folder, tile, budget, repeats)


def _in_fresh_process(
    model: _Model, folder: Path, tile: int, budget: int | None, repeats: int
) -> TileProfile:
    limit = "none" if budget is None else str(budget)
    arguments = [model.name, str(folder), str(tile), limit, str(repeats), model.options]
    command = [sys.executable, "-m", "streamcnn.profiling.child", *arguments]
    # The child looks for the user's factory where this process does.
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    if done.returncode:
        raise ProfileFailed(_describe_crash(tile, done))
    return TileProfile.from_json(done.stdout.splitlines()[-1])


def _describe_crash(tile: int, done: subprocess.CompletedProcess[str]) -> str:
    if done.returncode < 0:
        return (
            f"the process that measured tile {tile} was ended by signal {-done.returncode}, which is what "
            "the kernel does when memory runs out: set --budget, or leave this tile size out"
        )
    last = "\n".join(done.stderr.strip().splitlines()[-_LINES_OF_A_CRASH:])
    return f"measuring tile {tile} failed (exit status {done.returncode}); its last words:\n{last}"
