"""The ``zarr.json`` of a level in a tile store, of which only the form that we write is allowed."""

from __future__ import annotations

import math
import operator
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from streamcnn.errors import CorruptImage
from streamcnn.support.documents import conform, parse_json

_MOST_IN_SHARD = 2**20
"""Largest number of chunks in a shard, whose index is read whole."""

Extents = tuple[int, int, int]


@dataclass(frozen=True, slots=True)
class _Chunks:
    chunk_shape: Extents


@dataclass(frozen=True, slots=True)
class _Grid:
    name: Literal["regular"]
    configuration: _Chunks


@dataclass(frozen=True, slots=True)
class _Shards:
    chunk_shape: Extents
    codecs: tuple[Mapping[str, Any], ...]
    index_location: Literal["end"] = "end"


@dataclass(frozen=True, slots=True)
class _Sharding:
    name: Literal["sharding_indexed"]
    configuration: _Shards


@dataclass(frozen=True, slots=True)
class Level:
    """The array of a level.

    Raises
    ------
    ValueError
        If a shard does not consist of whole chunks, or has too many.
    """

    node_type: Literal["array"]
    zarr_format: Literal[3]
    shape: Extents
    """(C, H, W) in pixels."""
    data_type: str
    chunk_grid: _Grid
    codecs: tuple[_Sharding]

    def __post_init__(self) -> None:
        shard, chunk = self.chunk_grid.configuration.chunk_shape, self.codecs[0].configuration.chunk_shape
        if min(*self.shape, *shard, *chunk) < 1 or any(map(operator.mod, shard, chunk)):
            raise ValueError(
                f"shape={self.shape}, shards of {shard} and chunks of {chunk}: allowed are extents of 1 and "
                "more, and shards of whole chunks"
            )
        if self.chunks_per_shard > _MOST_IN_SHARD:
            raise ValueError(
                f"{self.chunks_per_shard} chunks in a shard: allowed are {_MOST_IN_SHARD} at most"
            )

    @property
    def chunks_per_shard(self) -> int:
        """Number of inner chunks in a shard."""
        shard, chunk = self.chunk_grid.configuration.chunk_shape, self.codecs[0].configuration.chunk_shape
        return math.prod(map(operator.floordiv, shard, chunk))


def parse_level(content: bytes, where: Path) -> tuple[Level, Any]:
    """Parse a level's ``zarr.json``; return the level and the whole JSON value.

    Raises
    ------
    CorruptImage
        If it does not have the form that we write.
    """
    values = parse_json(content, where, error=CorruptImage)
    return conform(Level, values, where, error=CorruptImage), values


def chunks_per_shard(folder: Path, metadata: Mapping[str, bytes]) -> dict[str, int]:
    """Number of inner chunks in a shard, by the path of the level.

    Parameters
    ----------
    folder
        Folder of the image.
    metadata
        Contents of its ``zarr.json`` files, by path below the folder.

    Raises
    ------
    CorruptImage
        If one does not have the form that we write.
    """
    return {
        key.rpartition("/")[0]: parse_level(content, folder / key)[0].chunks_per_shard
        for key, content in metadata.items()
        if "/" in key
    }
