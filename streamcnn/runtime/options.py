"""Convert a model's options from each form that users may give to one form."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from numbers import Integral
from pathlib import Path
from types import MappingProxyType
from typing import Any

from streamcnn.data.reader import Preprocess
from streamcnn.support.units import parse_bytes


def as_tile(tile: int | tuple[int, int] | None) -> tuple[int, int] | None:
    if tile is None:
        return None
    edges = tuple(tile) if isinstance(tile, (tuple, list)) else (tile, tile)
    if len(edges) != 2 or any(not isinstance(e, Integral) or isinstance(e, bool) or e < 1 for e in edges):
        raise ValueError(
            f"tile={tile!r}: allowed are a positive whole number of pixels or a pair (h, w) of them"
        )
    return (int(edges[0]), int(edges[1]))


def as_folder(spill: str | os.PathLike[str] | None) -> Path | None:
    if spill is None:
        return None
    folder = Path(spill)
    if not folder.is_dir():
        raise ValueError(f"spill={str(spill)!r} is no folder: create it, or pass None for the temporary one")
    return folder


def as_preprocess(preprocess: Preprocess | None) -> Preprocess | None:
    if preprocess is not None and not callable(preprocess):
        raise ValueError(
            f"preprocess={preprocess!r}: allowed is a function of a tile (N, C, h, w), such as "
            "lambda tile: tile / 255"
        )
    return preprocess


OPTIONS: Mapping[str, Callable[[Any], Any]] = MappingProxyType(
    {"budget": parse_bytes, "tile": as_tile, "spill": as_folder, "preprocess": as_preprocess}
)
"""By name of an option: the function that converts it to its one form."""
