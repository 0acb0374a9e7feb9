"""Transfers of tiles between host memory and the compute device.

Where the host itself computes, there is nothing to move. A GPU has copy engines, which work while it
computes: during each tile the next tile's inputs are brought and the previous tile's results are taken. The
host's own part, such as reading a file, overlaps too, since the GPU's work is queued ahead. So no thread is
needed, and only work that needs the GPU's results waits for them. The last tile of a phase may still be on
its way while the next phase begins.

Three rules make this safe. A tile's memory is allocated before the preceding tile is computed, and the copy
into it waits for all work queued by then: nothing else uses that memory any more. A tile that is taken is
held until its copy is done. A store's memory goes to another store only when no copy uses it; if a pass
fails, the host waits for all copies.
"""

from __future__ import annotations

import itertools
import math
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor

from streamcnn.geometry.regions import Region
from streamcnn.geometry.windows import dense, layout

Mark = Any
"""A point in the queue of an engine or of the GPU's computation; its type is the engine's own."""
Copies = Sequence[tuple[Tensor, Tensor]]
"""Pairs of target and source, of equal shape, type and order of axes, none with gaps in memory."""

_MOST_PIECES = 64
"""The most pieces in which a region of a map is copied in place, unless they are large."""
_LARGE_PIECE = 2**18
"""Bytes of a piece whose copy takes longer than its launch."""


class CopyEngine(Protocol):
    """A GPU's copies, in two queues beside that of its computation; the host does not wait for them."""

    device: torch.device

    def mark(self) -> Mark:
        """The mark of the end of the work queued for computation."""

    def bring(self, copies: Copies, after: Mark) -> Mark:
        """Queue copies from pinned host memory, to begin after a mark; return the mark of their end."""

    def take(self, copies: Copies, after: Mark) -> Mark:
        """Queue copies to pinned host memory, to begin after a mark; return the mark of their end."""

    def hold(self, mark: Mark) -> None:
        """Make all computation that is queued from now on wait for a mark."""

    def settle(self, mark: Mark) -> None:
        """Wait on the host until a mark is reached."""

    def settle_all(self) -> None:
        """Wait on the host for all copies, including those whose mark was lost to an interrupt."""

    def ends(self) -> Sequence[Mark]:
        """Marks of the end of all copies queued so far."""

    def buffer(self, shape: Sequence[int], dtype: torch.dtype, memory_format: torch.memory_format) -> Tensor:
        """An uninitialised tensor in pinned memory, which is not reused before its copies are done."""

    def pin(self, block: Tensor) -> Callable[[], None] | None:
        """Pin host memory; return a function that undoes that, or None if no more can be pinned."""


class Incoming(Protocol):
    """A tile on its way to the compute device."""

    def fetch(self) -> None:
        """Do the host's part now; the copy runs while something else is computed."""

    def tile(self) -> Tensor:
        """The tile, for computation queued from now on; fetched now if it was not before."""


@dataclass(frozen=True, slots=True)
class Deferred:
    """A tile that is read when it is asked for, where reading ahead gains nothing."""

    read: Callable[[], Tensor]

    def fetch(self) -> None:
        """Do nothing."""

    def tile(self) -> Tensor:
        """Read the tile now."""
        return self.read()


Source = Callable[[], Tensor]
"""Returns a tile in host memory, pinned if it goes to a GPU."""
Finish = Callable[[Tensor], object]
"""Does the rest of the work on the host, once a tile has arrived there."""


@dataclass(frozen=True, slots=True)
class Place:
    """A region of a store's map."""

    store: object
    region: Region

    def meets(self, other: Place) -> bool:
        """Whether both have a position in common."""
        return self.store is other.store and self.region.meets(other.region)


class Transfers(ABC):
    """Moves the tiles of one pass between its stores and the compute device.

    Attributes
    ----------
    compute_device
        Where tiles are computed.
    overlaps
        Whether tiles that are taken from now on may arrive while others are computed: their transfers are
        finished when ``advance``, ``settle`` or ``finish`` is called.
    """

    compute_device: torch.device
    overlaps = False

    @abstractmethod
    def buffer(
        self,
        shape: Sequence[int],
        dtype: torch.dtype,
        memory_format: torch.memory_format = torch.contiguous_format,
    ) -> Tensor:
        """An uninitialised tile in host memory, of the kind from which tiles are brought fastest."""

    @abstractmethod
    def bring(
        self,
        shape: Sequence[int],
        dtype: torch.dtype,
        source: Source,
        memory_format: torch.memory_format = torch.contiguous_format,
        wanted: torch.memory_format | None = None,
    ) -> Incoming:
        """Prepare a tile of the given shape; ``source`` is called for its values when it is fetched.

        On a GPU the tile is converted there to the layout ``wanted``, on which kernels depend.
        """

    @abstractmethod
    def take(self, to: Place, tile: Tensor, dtype: torch.dtype, finish: Finish, *, is_final: bool) -> None:
        """Copy ``tile`` to host memory and call ``finish`` with it in ``dtype``, in the order of the calls.

        ``to`` is the place that the tile is for. ``is_final`` says that nobody changes the values of ``tile``
        any more.
        """

    @abstractmethod
    def settle(self, place: Place) -> None:
        """Finish the transfers to a place that is about to be read."""

    @abstractmethod
    def advance(self) -> None:
        """Finish transfers from earlier tiles; called when the present tile's work is queued."""

    @abstractmethod
    def finish(self) -> None:
        """Finish all transfers to host memory: no memory of the compute device is held for them any more."""

    @abstractmethod
    def drain(self) -> None:
        """Finish all transfers, and wait until no copy uses a store's memory."""

    @abstractmethod
    def drop(self) -> None:
        """Wait until no copy is under way, and forget the transfers that are not finished."""


class PlainTransfers(Transfers):
    """Transfers to and from a device that copies nothing while it computes, such as the host itself.

    Parameters
    ----------
    compute_device
        Where tiles are computed.
    """

    def __init__(self, compute_device: torch.device) -> None:
        self.compute_device = compute_device

    def buffer(
        self,
        shape: Sequence[int],
        dtype: torch.dtype,
        memory_format: torch.memory_format = torch.contiguous_format,
    ) -> Tensor:
        """An uninitialised tensor in ordinary host memory."""
        return torch.empty(tuple(shape), dtype=dtype, memory_format=memory_format)

    def bring(
        self,
        shape: Sequence[int],
        dtype: torch.dtype,
        source: Source,
        memory_format: torch.memory_format = torch.contiguous_format,
        wanted: torch.memory_format | None = None,
    ) -> Incoming:
        """Read the source when the tile is asked for."""
        return Deferred(lambda: source().to(self.compute_device))

    def take(self, to: Place, tile: Tensor, dtype: torch.dtype, finish: Finish, *, is_final: bool) -> None:
        """Finish the transfer now."""
        finish(tile.to("cpu", dtype))

    def settle(self, place: Place) -> None:
        """Do nothing: all transfers are finished."""

    def advance(self) -> None:
        """Do nothing: all transfers are finished."""

    def finish(self) -> None:
        """Do nothing: all transfers are finished."""

    def drain(self) -> None:
        """Do nothing: all transfers are finished."""

    def drop(self) -> None:
        """Do nothing: all transfers are finished."""


@dataclass(slots=True)
class _Taken:
    """A tile that is on its way to host memory."""

    to: Place
    done: Mark
    copies: Copies
    """Kept until the copies are done, so that nothing else uses their memory before."""
    finish: Callable[[], object]


class GpuTransfers(Transfers):
    """Transfers between a GPU and host memory, by way of copy engines."""

    def __init__(self, engine: CopyEngine) -> None:
        self.engine = engine
        self.compute_device = engine.device
        self._taken: deque[_Taken] = deque()
        self._num_earlier = 0
        """How many entries of ``_taken`` are from tiles before the present one."""

    def buffer(
        self,
        shape: Sequence[int],
        dtype: torch.dtype,
        memory_format: torch.memory_format = torch.contiguous_format,
    ) -> Tensor:
        """A pinned tensor."""
        return self.engine.buffer(shape, dtype, memory_format)

    def bring(
        self,
        shape: Sequence[int],
        dtype: torch.dtype,
        source: Source,
        memory_format: torch.memory_format = torch.contiguous_format,
        wanted: torch.memory_format | None = None,
    ) -> Incoming:
        """Allocate memory on the GPU now; the values come when the tile is fetched."""
        tile = torch.empty(tuple(shape), dtype=dtype, device=self.compute_device, memory_format=memory_format)
        return _Brought(self.engine, tile, source, wanted or memory_format, self.engine.mark())

    def take(self, to: Place, tile: Tensor, dtype: torch.dtype, finish: Finish, *, is_final: bool) -> None:
        """Copy the tile to a pinned buffer, and call ``finish`` when the copy is done."""
        found = dense(_plain(tile))
        buffer = self.engine.buffer(found.shape, found.dtype, layout(found))
        # If that made a copy, nobody else has it.
        is_final = is_final or found is not tile
        # Converted on the host, since converting on the GPU would take memory there.
        self._send(to, [(buffer, found)], lambda: finish(buffer.to(dtype)), is_final=is_final)

    def put(self, to: Place, tile: Tensor, target: Tensor, *, is_final: bool) -> None:
        """Copy a tile straight to its place in pinned memory; tile and target have one element type."""
        found = _plain(tile).contiguous(memory_format=layout(target))
        self._send(to, pieces(target, found), lambda: None, is_final=is_final or found is not tile)

    def unused(self) -> Callable[[], None]:
        """A function that waits until no copy that was asked for before this call is under way."""
        return partial(_settle, self.engine, self.engine.ends())

    def settle(self, place: Place) -> None:
        """Finish the transfers to this place, and those before them, which come first."""
        count = max((n for n, each in enumerate(self._taken, 1) if each.to.meets(place)), default=0)
        self._finish(count)

    def _send(self, to: Place, copies: Copies, finish: Callable[[], object], *, is_final: bool) -> None:
        done = self.engine.take(copies, self.engine.mark())
        self._taken.append(_Taken(to, done, copies, finish))
        if not self.overlaps:
            self.finish()
        elif not is_final:
            self.engine.hold(done)

    def advance(self) -> None:
        """Finish transfers from before the present tile, which the GPU computes meanwhile."""
        self._finish(self._num_earlier)
        self._num_earlier = len(self._taken)

    def finish(self) -> None:
        """Finish all transfers to host memory."""
        self._finish(len(self._taken))

    def drain(self) -> None:
        """Finish all transfers, and wait for all copies."""
        self.finish()
        self.engine.settle_all()

    def _finish(self, count: int) -> None:
        """Finish the first transfers, in order."""
        for _ in range(count):
            each = self._taken[0]
            self.engine.settle(each.done)
            self._taken.popleft()
            self._num_earlier = max(0, self._num_earlier - 1)
            each.finish()

    def drop(self) -> None:
        """Wait until no copy is under way, and forget the transfers that are not finished."""
        try:
            self.engine.settle_all()
        finally:
            # Once more, as the first call may have been interrupted.
            self.engine.settle_all()
            self._taken.clear()
            self._num_earlier = 0


class _Brought:
    """A tile whose memory on the GPU is allocated, and whose values are copied there when it is fetched."""

    def __init__(
        self, engine: CopyEngine, tile: Tensor, source: Source, wanted: torch.memory_format, free: Mark
    ) -> None:
        self._engine = engine
        self._tile = tile
        self._wanted = wanted
        self._source: Source | None = source
        self._free = free
        """The mark after which nothing queued earlier uses the memory."""
        self._done: Mark | None = None

    def fetch(self) -> None:
        """Ask the source for the tile, and queue the copy."""
        if self._source is not None:
            source, self._source = self._source(), None
            self._done = self._engine.bring(pieces(self._tile, source), self._free)

    def tile(self) -> Tensor:
        """The tile; computation queued from now on waits for it."""
        self.fetch()
        self._engine.hold(self._done)
        return self._tile.contiguous(memory_format=self._wanted)


def _settle(engine: CopyEngine, marks: Iterable[Mark]) -> None:
    for mark in marks:
        engine.settle(mark)


def _plain(tile: Tensor) -> Tensor:
    """Resolve pending conjugation and negation, which PyTorch would otherwise do on the host, too early."""
    return tile.resolve_conj().resolve_neg()


def pieces(target: Tensor, source: Tensor) -> Copies:
    """Divide two tensors into pairs of pieces without gaps in memory.

    Both tensors must have their axes in the same order in memory, and one of them must have no gaps.
    """
    axes = sorted({*_cut_axes(target), *_cut_axes(source)})
    if not axes:
        return [(target, source)]
    places = itertools.product(*(range(target.shape[axis]) for axis in axes))
    return [(_at(target, axes, place), _at(source, axes, place)) for place in places]


def few_pieces(view: Tensor) -> bool:
    """Whether copying a region of a map in place is faster than through memory without gaps."""
    count = math.prod(view.shape[axis] for axis in _cut_axes(view))
    return count <= _MOST_PIECES or view.nbytes >= count * _LARGE_PIECE


def _cut_axes(view: Tensor) -> list[int]:
    """The axes along which a view must be divided for its pieces to have no gaps in memory."""
    axes = sorted((axis for axis in range(view.dim()) if view.shape[axis] > 1), key=view.stride)
    extent = 1
    for place, axis in enumerate(axes):
        if view.stride(axis) != extent:
            return axes[place:]
        extent *= view.shape[axis]
    return []


def _at(x: Tensor, axes: Sequence[int], place: Sequence[int]) -> Tensor:
    for axis, index in zip(axes, place, strict=True):
        x = x.narrow(axis, index, 1)
    return x
