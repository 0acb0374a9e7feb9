"""Writing of models' output maps: OME-Zarr folders and tiled BigTIFFs, each complete or not at all.

A map is written piece by piece, with a few pieces in memory at a time.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Sequence
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import zarr
from numpy.typing import NDArray
from tifffile import TiffWriter
from zarr.storage import LocalStore

from streamcnn.data.sources import ImageSource
from streamcnn.data.sources.placement import Placement
from streamcnn.data.tile_store.arrays import CHUNK, SHARD_BYTES, create_array, shards_of, write_shard
from streamcnn.errors import CannotWrite
from streamcnn.geometry.regions import Interval, Region
from streamcnn.support.atomic import flush_files
from streamcnn.support.disk import writing

_ZARR, _TIFF = (".zarr",), (".tif", ".tiff")
_CENTIMETRES = {"nanometer": 1e-7, "micrometer": 1e-4, "millimeter": 0.1, "centimeter": 1.0, "meter": 100.0}


def check_place(path: Path, *, overwrite: bool) -> None:
    """Make sure that a map can be written to ``path``, before anything is computed.

    Raises
    ------
    ValueError
        If its ending does not belong to a format.
    CannotWrite
        If something is there that must not be overwritten, or the parent folder is missing.
    """
    allowed = (*_ZARR, *_TIFF)
    if path.suffix.lower() not in allowed:
        raise ValueError(f"{path} ends in {path.suffix or 'nothing'!r}: allowed are {', '.join(allowed)}")
    if not path.parent.is_dir():
        raise CannotWrite(f"cannot write {path}: there is no folder {path.parent}; make it first")
    if not os.path.lexists(path):
        return
    if not overwrite:
        raise CannotWrite(f"cannot write {path}: it is there already; pass overwrite=True to replace it")
    is_image = (path / "zarr.json").is_file() if path.suffix.lower() in _ZARR else path.is_file()
    if path.is_symlink() or not is_image:
        raise CannotWrite(f"cannot write {path}: what is there is no map of this format; take it away first")


def write_map(
    path: Path, source: ImageSource, placement: Placement, *, class_names: Sequence[str] | None = None
) -> None:
    """Write a map to a path that :func:`check_place` allows, under another name until it is complete.

    Parameters
    ----------
    source
        The map (C, H, W).
    placement
        Of its pixels.
    class_names
        Of the classes 0, 1, …; OME-Zarr has them beside its own metadata, TIFF not at all, since its readers
        take text in a description for other formats.

    Raises
    ------
    CannotWrite
        If it cannot be written, as on a full disk; no part of it is left, and an old file is unchanged.
    """
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    needed = _nbytes(source, source.shape[1] * source.shape[2])
    with writing(path, needed=needed, at_most=True):
        _remove(partial)
        try:
            if path.suffix.lower() in _ZARR:
                _write_zarr(partial, source, placement, path.name, class_names)
            else:
                _write_tiff(partial, source, placement)
            flush_files(partial)
            _put(partial, path)
        except BaseException:
            _remove(partial)
            raise


def _write_zarr(
    folder: Path, source: ImageSource, placement: Placement, name: str, class_names: Sequence[str] | None
) -> None:
    named = {} if class_names is None else {"class_names": list(class_names)}
    group = zarr.create_group(LocalStore(folder), attributes={**_ome(placement, name), **named})
    array = create_array(group, "0", source, chunk=piece_edge(source))
    for region in shards_of(source.shape[1:], array):
        write_shard(array, region, source)


def _ome(placement: Placement, name: str) -> dict[str, Any]:
    """OME-Zarr 0.5 metadata."""
    unit = {"unit": placement.unit} if placement.unit and placement.spacing else {}
    axes = [{"name": "c", "type": "channel"}, *({"name": axis, "type": "space", **unit} for axis in "yx")]
    scale = [1.0, *(placement.spacing or (1.0, 1.0))]
    dataset = {"path": "0", "coordinateTransformations": [{"type": "scale", "scale": scale}]}
    return {"ome": {"version": "0.5", "multiscales": [{"name": name, "axes": axes, "datasets": [dataset]}]}}


def _write_tiff(file: Path, source: ImageSource, placement: Placement) -> None:
    channels, height, width = source.shape
    flat = channels == 1
    dtype = np.dtype(str(source.dtype).removeprefix("torch."))
    resolution: dict[str, Any] = {}
    if placement.spacing and placement.unit in _CENTIMETRES:
        down, across = (1 / (each * _CENTIMETRES[placement.unit]) for each in placement.spacing)
        resolution = {"resolution": (across, down), "resolutionunit": "CENTIMETER"}
    with TiffWriter(file, bigtiff=True) as writer:
        writer.write(
            _tiles(source),
            shape=(height, width) if flat else (height, width, channels),
            dtype=dtype,
            tile=(piece_edge(source), piece_edge(source)),
            photometric="minisblack",
            planarconfig=None if flat else "contig",
            compression="zlib",
            maxworkers=1,
            metadata={"axes": "YX" if flat else "YXS"},
            extratags=[(*tag, True) for tag in placement.tags],
            **resolution,
        )


def piece_edge(source: ImageSource) -> int:
    """Edge in pixels of a chunk or tile, which holds all channels; smaller if there are many."""
    edges = (edge for edge in (CHUNK, CHUNK // 2, CHUNK // 4) if _nbytes(source, edge**2) <= SHARD_BYTES)
    return next(edges, CHUNK // 8)


def _nbytes(source: ImageSource, num_pixels: int) -> int:
    return source.shape[0] * num_pixels * source.dtype.itemsize


def _tiles(source: ImageSource) -> Iterator[NDArray[Any]]:
    """The tiles (h, w) or (h, w, C) in order, padded to full size at the far edges."""
    channels, height, width = source.shape
    edge = piece_edge(source)
    for top, left in product(range(0, height, edge), range(0, width, edge)):
        rows, cols = Interval(top, min(top + edge, height)), Interval(left, min(left + edge, width))
        pixels = source.read(Region(rows, cols)).movedim(0, -1).numpy()
        tile = np.zeros((edge, edge, channels), pixels.dtype)
        tile[: rows.size, : cols.size] = pixels
        yield tile[..., 0] if channels == 1 else tile


def _put(partial: Path, path: Path) -> None:
    """Give the finished file its name; an old folder is moved away in one step, so never half removed."""
    if not partial.is_dir():
        partial.replace(path)
        return
    aside = path.with_name(f".{path.name}.{os.getpid()}.old.partial")
    _remove(aside)
    if path.exists():
        path.rename(aside)
    partial.rename(path)
    _remove(aside)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
