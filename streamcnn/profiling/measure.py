"""Measures one training update per tile size, each in a fresh process.

A process of its own per tile size, because the peak of resident memory is a high-water mark: it
never falls, and memory freed by one update would be reused by the next.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from streamcnn.data.sources import write_zarr_image
from streamcnn.errors import StreamError

_LINES_OF_A_CRASH = 12


class ProfileFailed(StreamError, RuntimeError):
    """A measuring process ended without a measurement for a reason other than the budget."""


@dataclass(frozen=True, slots=True)
class TileProfile:
    """One tile size: what its update was projected to hold and what it held. Sizes are bytes."""

    tile: int
    """Largest edge of a tile in input pixels, as asked for."""
    projected_bytes: int
    measured_bytes: int | None
    """Peak above the baseline; ``None`` if the update did not run or the peak cannot be read."""
    reading: str
    """Which counter ``measured_bytes`` comes from."""
    seconds: float | None
    """Forward and backward; ``None`` if they did not run."""
    recomputation: float
    """Positions that the tiles of all phases compute, over the positions of the maps: 1 without halos.
    A position counts once per operator, whatever its channels; operators on whole maps are left out."""
    bytes_moved: int | None
    """Read from and written to stores; ``None`` if the update did not run."""
    budget: int | None
    """``None`` for no ceiling."""
    plain_bytes: int
    """Projected peak of plain PyTorch on the whole image at once."""
    refusal: str | None
    """Why the update did not run under the budget; ``None`` if it did."""
    explanation: str
    """The plan in words."""

    def to_json(self) -> str:
        """The profile as one line of JSON; :meth:`from_json` reads it."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> TileProfile:
        """The profile that a line of JSON says."""
        return cls(**json.loads(text))


def fastest(profiles: Sequence[TileProfile]) -> TileProfile | None:
    """The profile with the shortest update of those that ran; ``None`` if none did."""
    ran = [profile for profile in profiles if profile.seconds is not None]
    return min(ran, key=lambda profile: profile.seconds or 0.0, default=None)


def profile_tiles(
    model: str, shape: tuple[int, int, int, int], tiles: Sequence[int], budget: int | None
) -> Iterator[TileProfile]:
    """The profile of each tile size, as soon as it is measured, on random images on disk.

    Parameters
    ----------
    model
        A name as :func:`streamcnn.models.load_model` reads it.
    shape
        Of the batch, ``(N, C, H, W)`` in pixels.
    tiles
        Largest edges of a tile in input pixels.
    budget
        Bytes that an update may take above the baseline; ``None`` sets no ceiling. A tile size that does
        not fit has a profile too, with a refusal.

    Raises
    ------
    ValueError
        If there is no tile size, or one is not positive.
    ProfileFailed
        If a measurement ends for another reason than the budget.
    """
    if not tiles or min(tiles) < 1:
        raise ValueError(f"tiles={list(tiles)}: allowed are one or more positive numbers of pixels")
    return _measure(model, shape, tuple(tiles), budget)


def _measure(
    model: str, shape: tuple[int, int, int, int], tiles: tuple[int, ...], budget: int | None
) -> Iterator[TileProfile]:
    with tempfile.TemporaryDirectory(prefix="streamcnn-profile-") as name:
        folder = Path(name)
        for index in range(shape[0]):
            pixels = torch.randint(256, shape[1:], dtype=torch.uint8)
            write_zarr_image(folder / f"image-{index}.zarr", pixels)
        del pixels
        for tile in tiles:
            yield _in_fresh_process(model, folder, tile, budget)


def _in_fresh_process(model: str, folder: Path, tile: int, budget: int | None) -> TileProfile:
    limit = "none" if budget is None else str(budget)
    command = [sys.executable, "-m", "streamcnn.profiling.child", model, str(folder), str(tile), limit]
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
