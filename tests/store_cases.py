"""Maps of different sizes, tiles of them, and stores for them, for tests of stores."""

from __future__ import annotations

import dataclasses

import torch
from copy_engines import LateCopies
from hypothesis import strategies as st
from torch import Tensor

from streamcnn.geometry.regions import Interval, Region
from streamcnn.stores import (
    GpuTransfers,
    HostStore,
    PlainTransfers,
    SpareFiles,
    SparePinned,
    SpillFolder,
    StoreSpec,
    Transfers,
    ZarrStore,
)

CPU = torch.device("cpu")
HERE = PlainTransfers(CPU)
TILE_HINT = (24, 20)

# All extents differ, so that a swapped axis cannot hide; none is a multiple of a chunk.
NCHW = StoreSpec((2, 3, 61, 47), torch.float32, (2, 3))
NHWC = StoreSpec((2, 61, 47, 3), torch.float32, (1, 2))
SPECS = [
    dataclasses.replace(spec, dtype=dtype)
    for spec in (NCHW, NHWC)
    for dtype in (torch.bfloat16, torch.float32, torch.float64, torch.complex64)
]


def region(top: int, bottom: int, left: int, right: int) -> Region:
    return Region(Interval(top, bottom), Interval(left, right))


def at(spec: StoreSpec, where: Region) -> tuple[slice, ...]:
    """The index of a region in a dense tensor."""
    index = [slice(None)] * len(spec.shape)
    index[spec.axes[0]] = slice(where.rows.start, where.rows.stop)
    index[spec.axes[1]] = slice(where.cols.start, where.cols.stop)
    return tuple(index)


def random_tile(spec: StoreSpec, where: Region, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(spec.tile_shape(where), generator=generator).to(spec.dtype)


def assert_same(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual.cpu(), expected, rtol=0, atol=0)


def late(*, pins: bool = True, overlaps: bool = False) -> GpuTransfers:
    """A GPU's transfers, whose copies take place as late as possible."""
    transfers = GpuTransfers(LateCopies(pins=pins))
    transfers.overlaps = overlaps
    return transfers


def make_on_host(transfers: GpuTransfers, spec: StoreSpec) -> HostStore:
    """A store in memory that another map has used."""
    spares = SparePinned()
    used = spares.take(spec.nbytes + 100, transfers.engine.pin)
    used.memory.fill_(7)
    spares.keep(used, transfers.unused())
    return HostStore(spec, transfers, spares)


def make_on_disk(spill: SpillFolder, transfers: Transfers, spec: StoreSpec) -> ZarrStore:
    return ZarrStore(spec, spill.new_folder(), TILE_HINT, transfers)


def make_on_used_disk(spill: SpillFolder, transfers: Transfers, spec: StoreSpec) -> ZarrStore:
    """A store in a file that another map has used, and that still has its bytes."""
    spares = SpareFiles(spill.path)
    used = spill.new_folder()
    used.write_bytes(b"\x42" * (spec.nbytes // 2))
    spares.keep(used)
    return ZarrStore(spec, spill.new_folder(), TILE_HINT, transfers, spares)


@st.composite
def regions_of(draw: st.DrawFn, size: tuple[int, int], most: int = 2**62) -> Region:
    """A region of a map of ``size``, of at most so many rows and columns."""
    spans = []
    for extent in size:
        start = draw(st.integers(0, extent - 1))
        spans.append(Interval(start, draw(st.integers(start + 1, min(extent, start + most)))))
    return Region(*spans)
