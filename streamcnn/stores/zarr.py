"""The store of a map on disk: an uncompressed Zarr v3 array, of which ``stores.strips`` locates the bytes.

Any Zarr library can open the folder; none is needed to write it. The array is one shard, so one file: its
chunks are the strips, and the index at its end gives their offsets. This module reads and writes the file
itself, so that it can read some rows of a strip alone, and because the Zarr library's threads and whole-chunk
buffers take 150 to 240 MB of a limited data segment and three to ten times as long.
"""

from __future__ import annotations

import errno
import json
import os
import sys
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path
from threading import RLock
from typing import Any
from weakref import finalize

import numpy as np
import torch
from torch import Tensor

from streamcnn.geometry.regions import Region
from streamcnn.geometry.windows import crop, layout
from streamcnn.stores.base import Store, StoreSpec
from streamcnn.stores.frontier import Frontier
from streamcnn.stores.spare_files import SpareFiles
from streamcnn.stores.spill import remove_with
from streamcnn.stores.strips import Block, Strips
from streamcnn.stores.transfers import Incoming, Place, Transfers
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


class ZarrStore(Store):
    """One map in one file; a call holds about 1 MiB of it in memory beside the tile.

    A strip holds all rows and channels of some columns: of all columns if tiles are bands of full rows, else
    of an eighth of a tile's (16 to 64). Positions never written take no disk space, unless the file was
    another map's.

    Parameters
    ----------
    spec
        The map.
    folder
        Folder to create for the map; it must not exist. It is removed on ``close``, when the store is
        collected or when the interpreter exits.
    tile_hint
        Extents (H, W) of the tiles by which the map will mostly be read and written.
    transfers
        Moves tiles to and from the compute device.
    spares
        Supplies files and takes them back; if None, each map has a new file.

    Raises
    ------
    ValueError
        If Zarr cannot hold the element type.
    OSError
        If the folder exists already. Reading raises it too, if the file is shorter than it should be.
    CannotWrite
        If the folder cannot be created or the disk is full. `write` and `add` raise it too; part of the
        region may then be written.

    Notes
    -----
    Regions that do not overlap may share a strip's rows. Writers wait for each other. A reader may meet
    rows that are being rewritten: the bytes of its own region are then rewritten with the same values.
    """

    def __init__(
        self,
        spec: StoreSpec,
        folder: Path,
        tile_hint: tuple[int, int],
        transfers: Transfers,
        spares: SpareFiles | None = None,
    ) -> None:
        super().__init__(spec)
        if spec.dtype not in _STORED_AS:
            names = ", ".join(str(dtype) for dtype in _STORED_AS)
            raise ValueError(f"a map of {spec.dtype} cannot be kept on disk; possible are {names}")
        self._strips = Strips.suited(spec, tile_hint)
        self._file_order = self._strips.file_order
        self._map_order = tuple(int(axis) for axis in np.argsort(self._file_order))
        self._transfers = transfers
        self._frontier = Frontier(spec.size)
        self._writing = RLock()
        self._layout: torch.memory_format | None = None
        """Layout of the tile written last: maps are read in the layout in which they were written."""
        self._folder = folder
        if os.path.lexists(folder):
            # This is no fault of the disk, and the folder is another's: nothing in it is removed.
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(folder))
        with self._naming_the_disk():
            folder.mkdir(parents=True)
        self._remove = remove_with(self, folder)
        with self._naming_the_disk():
            (folder / "zarr.json").write_text(json.dumps(_metadata(self._strips), indent=2))
            index, start = _index(self._strips), self._strips.count * self._strips.nbytes
            self._path, self._spares = folder / _file_name(spec), spares
            # In a new file, strips that are not written stay holes, which read as zero.
            self._is_new = spares is None or not spares.take(self._path, start + len(index))
            self._file = os.open(self._path, os.O_RDWR | os.O_CREAT | (os.O_EXCL if self._is_new else 0))
            self._close_file = finalize(self, os.close, self._file)
            _write_fully(self._file, index, start)

    def _read(self, region: Region) -> Tensor:
        return self._reserve(region).tile()

    def _reserve(self, region: Region) -> Incoming:
        self._transfers.settle(Place(self, region))
        shape, on_host = self.spec.tile_shape(region), partial(self._on_host, region)
        return self._transfers.bring(shape, self.spec.dtype, on_host, wanted=self._layout)

    def _on_host(self, region: Region) -> Tensor:
        """The values inside ``region`` in host memory."""
        if not self._is_new:
            for part, holds in self._claim(region):
                if not holds:
                    self._zero(part)
        tile = self._transfers.buffer(self.spec.tile_shape(region), self.spec.dtype)
        scratch = self._scratch(region)
        for block in self._strips.blocks(region):
            self._load(block, scratch)
            crop(tile, self.spec.axes, region, block.part).copy_(self._part(block, scratch))
        return tile

    def _write(self, region: Region, tile: Tensor, *, may_keep: bool) -> None:
        self._layout = layout(tile)

        def finish(found: Tensor) -> None:
            self._claim(region)
            self._update(region, found, adds=False)
            self._mark(region)

        self._transfers.take(Place(self, region), tile, self.spec.dtype, finish, is_final=may_keep)

    def _add(self, region: Region, tile: Tensor, *, may_keep: bool) -> None:
        self._layout = layout(tile)

        def finish(found: Tensor) -> None:
            for part, holds in self._claim(region):
                self._update(part, crop(found, self.spec.axes, region, part), adds=holds)
            self._mark(region)

        self._transfers.take(Place(self, region), tile, self.spec.dtype, finish, is_final=may_keep)

    def _claim(self, region: Region) -> list[tuple[Region, bool]]:
        """Split ``region`` into parts, each with whether something was written there.

        In a file that was used before, positions that will count as written without being so are zeroed.
        """
        with self._writing:
            if self._is_new:
                return list(self._frontier.split(region))
            return self._frontier.claim(region, self._zero)

    def _mark(self, region: Region) -> None:
        with self._writing:
            self._frontier.mark(region)

    def _zero(self, region: Region) -> None:
        zero = torch.zeros((), dtype=self.spec.dtype)
        self._update(region, zero.expand(self.spec.tile_shape(region)), adds=False)

    def _free(self) -> None:
        # Tiles that are still on their way are written to the file.
        self._transfers.settle(Place(self, self._whole))
        self._close_file()
        try:
            if self._spares is not None:
                self._spares.keep(self._path)
        finally:
            self._remove()

    def _update(self, region: Region, tile: Tensor, *, adds: bool) -> None:
        """Write ``tile``, or add it to the values that are there."""
        scratch = self._scratch(region)
        with self._writing:
            for block in self._strips.blocks(region):
                if adds or not block.is_whole:
                    self._load(block, scratch)
                target = self._part(block, scratch)
                share = crop(tile, self.spec.axes, region, block.part)
                target.add_(share) if adds else target.copy_(share)
                self._save(block, scratch)

    def _scratch(self, region: Region) -> Tensor:
        """Memory for any block that ``region`` meets, from the allocator that keeps a pass's blocks."""
        return torch.empty(self._strips.largest_block(region), dtype=torch.uint8)

    def _bytes_of(self, block: Block, scratch: Tensor) -> memoryview:
        return scratch.numpy().data[: self._strips.block_nbytes(block)]

    def _part(self, block: Block, scratch: Tensor) -> Tensor:
        """The region's part of the block that the scratch memory holds, with axes in the map's order."""
        shape = self.spec.tile_shape(block.covered)
        stored = scratch[: self._strips.block_nbytes(block)].view(self.spec.dtype)
        rows = stored.view([shape[axis] for axis in self._file_order]).permute(self._map_order)
        return crop(rows, self.spec.axes, block.covered, block.part)

    def _load(self, block: Block, scratch: Tensor) -> None:
        try:
            _read_fully(self._file, self._bytes_of(block, scratch), block.offset)
        except OSError as error:
            error.filename = str(self._folder)
            raise

    def _save(self, block: Block, scratch: Tensor) -> None:
        with self._naming_the_disk():
            _write_fully(self._file, self._bytes_of(block, scratch), block.offset)

    def _naming_the_disk(self) -> AbstractContextManager[None]:
        """Make an error in writing name the disk and the size of the whole map."""
        return writing(self._folder, needed=self.spec.nbytes)


def _file_name(spec: StoreSpec) -> str:
    """The shard's file: its place in a grid of one."""
    return ".".join(("c", *("0" for _ in spec.shape)))


def _metadata(strips: Strips) -> dict[str, Any]:
    """The array's ``zarr.json``, after the Zarr v3 core specification and its sharding codec."""
    spec = strips.spec
    stored_as = _STORED_AS[spec.dtype]
    shard = list(strips.shape)
    shard[spec.axes[1]] *= strips.count
    bytes_codec = {"name": "bytes", "configuration": {"endian": sys.byteorder}}
    return {
        "zarr_format": 3,
        "node_type": "array",
        "shape": list(spec.shape),
        "data_type": stored_as,
        "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": shard}},
        "chunk_key_encoding": {"name": "default", "configuration": {"separator": "."}},
        "fill_value": _fill_value(stored_as),
        "codecs": [
            {
                "name": "sharding_indexed",
                "configuration": {
                    "chunk_shape": list(strips.shape),
                    "codecs": [
                        {"name": "transpose", "configuration": {"order": list(strips.file_order)}},
                        bytes_codec,
                    ],
                    "index_codecs": [bytes_codec],
                    "index_location": "end",
                },
            }
        ],
        "attributes": {"torch_dtype": str(spec.dtype).removeprefix("torch.")},
    }


def _index(strips: Strips) -> memoryview:
    """The shard's index: offset and bytes of each strip."""
    offsets = np.arange(strips.count, dtype=np.uint64) * np.uint64(strips.nbytes)
    return np.stack([offsets, np.full_like(offsets, strips.nbytes)], axis=1).data.cast("B")


def _fill_value(stored_as: str) -> Any:
    """Zero as Zarr's metadata write it."""
    if stored_as.startswith("complex"):
        return [0.0, 0.0]
    return False if stored_as == "bool" else 0


def _read_fully(file: int, buffer: memoryview, offset: int) -> None:
    while buffer:
        num_read = os.preadv(file, [buffer], offset)
        if not num_read:
            raise OSError(errno.EIO, f"the file ends {len(buffer)} bytes early")
        buffer, offset = buffer[num_read:], offset + num_read


def _write_fully(file: int, buffer: memoryview, offset: int) -> None:
    while buffer:
        num_written = os.pwrite(file, buffer, offset)
        buffer, offset = buffer[num_written:], offset + num_written
