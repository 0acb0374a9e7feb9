"""A map on disk, as an uncompressed Zarr v3 array: the chunks' files, not how they are cut.

Any Zarr library can open the folder; none is needed to write it. Chunk files are read and written
here because rows of an uncompressed chunk can be had by themselves, and because the Zarr library's
threads and whole-chunk buffers take 150 to 240 MB of a limited data segment and three to ten times
as long. Float32 tiles of 64 x 256 x 256 with a halo of one, files in the page cache, two cores: 23
to 80 ms to read one through the library, whatever the chunks, and 8 to 12 ms here; 29 to 74 ms to
write one, and 7 ms here.
"""

from __future__ import annotations

import errno
import json
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager
from io import FileIO
from pathlib import Path
from threading import Lock
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from streamcnn.geometry.regions import Region
from streamcnn.geometry.windows import crop
from streamcnn.stores.base import Store, StoreSpec
from streamcnn.stores.chunks import ChunkGrid, ChunkPart
from streamcnn.stores.frontier import Frontier
from streamcnn.stores.spill import remove_with
from streamcnn.stores.transfer import host_buffer, to_host
from streamcnn.support.disk import writing

# Zarr has no bfloat16: its bit pattern is kept. The other names are NumPy's and Zarr's alike.
_STORED_AS = {
    torch.float64: "float64",
    torch.float32: "float32",
    torch.float16: "float16",
    torch.bfloat16: "uint16",
    torch.int64: "int64",
    torch.int32: "int32",
    torch.int16: "int16",
    torch.int8: "int8",
    torch.uint8: "uint8",
    torch.bool: "bool",
    torch.complex64: "complex64",
    torch.complex128: "complex128",
}

_Array = NDArray[Any]
_Combine = Callable[[_Array, _Array, _Array], None]
"""Brings a tile (second) into old values (first); the third is memory to use, laid out as the first."""


class ZarrStore(Store):
    """One map in a folder of chunk files, with at most one chunk of it in memory per call.

    A chunk holds about 1 MiB: all channels (as far as they fit), an eighth of a tile's columns (16
    to 64) and as many rows as fill it. A chunk without a file is zero.

    Parameters
    ----------
    spec
        The map.
    folder
        Folder to create for it; it must not exist. It is removed on ``close``, when the store is
        collected and when the interpreter exits.
    tile_hint
        Extents (H, W) of the tiles by which the map will mostly be read and written.
    compute_device
        Where tiles are read to.

    Raises
    ------
    ValueError
        If Zarr cannot hold the element type.
    OSError
        If the folder exists already. Reading and writing raise it too, when a file was tampered with.
    CannotWrite
        If the folder cannot be created, then and when writing if the disk is full; a region is then
        half written.

    Notes
    -----
    Regions that do not overlap may share a chunk. Writers wait for each other. A reader may meet a
    chunk that is being rewritten: the bytes of its own region are then rewritten with what they
    were. Copies run on the calling thread alone: a thread that calls a parallel PyTorch operator
    would start a thread pool of its own. Only a tile of another type is converted by PyTorch.
    """

    def __init__(
        self,
        spec: StoreSpec,
        folder: Path,
        tile_hint: tuple[int, int],
        compute_device: torch.device,
    ) -> None:
        super().__init__(spec)
        if spec.dtype not in _STORED_AS:
            names = ", ".join(str(dtype) for dtype in _STORED_AS)
            raise ValueError(f"a map of {spec.dtype} cannot be kept on disk; possible are {names}")
        self._grid = ChunkGrid.suited(spec, tile_hint)
        self._row_nbytes = self._grid.row_nbytes
        self._to_map_order = tuple(int(axis) for axis in np.argsort(self._grid.file_order))
        self._chunk_prefix = str(folder / "c.")
        self.compute_device = compute_device
        self._present: set[tuple[int, ...]] = set()
        self._frontier = Frontier(spec.size)
        self._writing = Lock()
        self._folder = folder
        with self._told():
            folder.parent.mkdir(parents=True, exist_ok=True)
        # What is there already is no fault of the disk.
        folder.mkdir()
        self._remove = remove_with(self, folder)
        with self._told():
            (folder / "zarr.json").write_text(json.dumps(_metadata(self._grid), indent=2))

    def _read(self, region: Region) -> Tensor:
        # Pinned, a tile goes to the GPU while the next one is being read.
        tile = host_buffer(self.spec.tile_shape(region), self.spec.dtype, self.compute_device)
        array = _as_numpy(tile)
        scratch = self._scratch(region)
        for part in self._grid.parts(region):
            if part.index in self._present:
                with FileIO(self._path(part), "r") as file:
                    array[part.in_tile] = self._load(file, part, scratch)[part.in_rows]
            else:
                array[part.in_tile] = 0
        return tile.to(self.compute_device, non_blocking=True)

    def _write(self, region: Region, tile: Tensor, *, may_keep: bool) -> None:
        self._update(region, tile, _replace, keeps_old=False)
        with self._writing:
            self._frontier.mark(region)

    def _add(self, region: Region, tile: Tensor, *, may_keep: bool) -> None:
        combine = _add_bfloat16 if self.spec.dtype == torch.bfloat16 else _add
        with self._writing:
            parts = list(self._frontier.split(region))
        for part, holds in parts:
            share = crop(tile, self.spec.axes, region, part)
            self._update(part, share, combine if holds else _replace, keeps_old=holds)

    def _free(self) -> None:
        self._remove()

    def _update(self, region: Region, tile: Tensor, combine: _Combine, *, keeps_old: bool) -> None:
        """Let ``combine`` bring each chunk's part of ``tile`` into its rows on disk."""
        array = _as_numpy(to_host(tile, self.spec.dtype))
        scratch, spare = self._scratch(region), self._scratch(region)
        with self._writing:
            for part in self._grid.parts(region):
                is_new = part.index not in self._present
                with self._opened(part, is_new=is_new) as file:
                    rows = self._rows(part, scratch)
                    if is_new:
                        self._make_sparse(file, part)
                        rows[...] = 0
                    elif keeps_old or not part.fills_rows:
                        self._load(file, part, scratch)
                    addend = self._rows(part, spare)[part.in_rows]
                    combine(rows[part.in_rows], array[part.in_tile], addend)
                    self._save(file, part, scratch)

    def _make_sparse(self, file: FileIO, part: ChunkPart) -> None:
        """Give a new chunk its full length; rows not written stay holes, which read as zero."""
        with self._told():
            file.truncate(self._grid.nbytes)
        self._present.add(part.index)

    def _opened(self, part: ChunkPart, *, is_new: bool) -> FileIO:
        with self._told():
            return FileIO(self._path(part), "w+" if is_new else "r+")

    def _told(self) -> AbstractContextManager[None]:
        """Say of an error in writing which disk it was, and how large the whole map is."""
        return writing(self._folder, needed=self.spec.nbytes)

    def _path(self, part: ChunkPart) -> str:
        return self._chunk_prefix + ".".join(map(str, part.index))

    def _scratch(self, region: Region) -> _Array:
        """Bytes for the largest part of a chunk that ``region`` can meet."""
        num_rows = min(region.rows.size, self._grid.chunk[self.spec.axes[0]])
        return np.empty(num_rows * self._row_nbytes, np.uint8)

    def _bytes_of(self, part: ChunkPart, scratch: _Array) -> _Array:
        return scratch[: part.rows.size * self._row_nbytes]

    def _rows(self, part: ChunkPart, scratch: _Array) -> _Array:
        """The scratch memory as the part's rows of a chunk, axes in the map's order."""
        extents = (part.rows.size, *(self._grid.chunk[axis] for axis in self._grid.file_order[1:]))
        stored = self._bytes_of(part, scratch).view(_STORED_AS[self.spec.dtype]).reshape(extents)
        return stored.transpose(self._to_map_order)

    def _load(self, file: FileIO, part: ChunkPart, scratch: _Array) -> _Array:
        file.seek(part.rows.start * self._row_nbytes)
        _read_fully(file, self._bytes_of(part, scratch).data)
        return self._rows(part, scratch)

    def _save(self, file: FileIO, part: ChunkPart, scratch: _Array) -> None:
        file.seek(part.rows.start * self._row_nbytes)
        with self._told():
            _write_fully(file, self._bytes_of(part, scratch).data)


def _metadata(grid: ChunkGrid) -> dict[str, Any]:
    """The array's ``zarr.json``, as the Zarr v3 core specification has it."""
    stored_as = _STORED_AS[grid.spec.dtype]
    return {
        "zarr_format": 3,
        "node_type": "array",
        "shape": list(grid.spec.shape),
        "data_type": stored_as,
        "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": list(grid.chunk)}},
        # One flat folder: a nested one would need a directory per row of chunks.
        "chunk_key_encoding": {"name": "default", "configuration": {"separator": "."}},
        "fill_value": _fill_value(stored_as),
        "codecs": [
            {"name": "transpose", "configuration": {"order": list(grid.file_order)}},
            {"name": "bytes", "configuration": {"endian": sys.byteorder}},
        ],
        "attributes": {"torch_dtype": str(grid.spec.dtype).removeprefix("torch.")},
    }


def _fill_value(stored_as: str) -> Any:
    """Zero as the metadata spell it."""
    if stored_as.startswith("complex"):
        return [0.0, 0.0]
    return False if stored_as == "bool" else 0


def _as_numpy(tensor: Tensor) -> _Array:
    """The tensor's memory as an array; bfloat16 as its bit pattern."""
    plain = tensor.view(torch.uint16) if tensor.dtype == torch.bfloat16 else tensor
    # Autograd may leave it to the reader to conjugate or negate.
    array: _Array = plain.resolve_conj().resolve_neg().numpy()
    return array


def _replace(total: _Array, tile: _Array, spare: _Array) -> None:
    np.copyto(total, tile)


def _add(total: _Array, tile: _Array, spare: _Array) -> None:
    # A sum of two arrays of one layout is one long loop; a copy is the cheaper way to change layout.
    np.copyto(spare, tile)
    total += spare


def _add_bfloat16(total: _Array, tile: _Array, spare: _Array) -> None:
    """Add bit patterns of bfloat16 as float32 and round to nearest, ties to even, as PyTorch does."""
    np.copyto(spare, tile)
    bits = (_widened(total) + _widened(spare)).view(np.uint32)
    # A sum of two bfloat16 that is not a number has zeros in its lower half: it stays what it is.
    bits += 0x7FFF + ((bits >> 16) & 1)
    total[...] = bits >> 16


def _widened(bits: _Array) -> NDArray[np.float32]:
    """The float32 numbers whose upper halves are ``bits``."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


def _read_fully(file: FileIO, buffer: memoryview) -> None:
    while buffer:
        num_read = file.readinto(buffer)
        if not num_read:
            raise OSError(errno.EIO, f"chunk ends {len(buffer)} bytes early", str(file.name))
        buffer = buffer[num_read:]


def _write_fully(file: FileIO, buffer: memoryview) -> None:
    while buffer:
        num_written = file.write(buffer)
        assert num_written is not None, "files block"
        buffer = buffer[num_written:]
