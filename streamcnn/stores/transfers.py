"""Tiles on their way between host memory and the compute device.

Where the host itself computes, there is nothing to move. A GPU has copy engines, which work beside its
computation: the tile that is computed next is brought while this one is computed, and the last one's results
are taken away. The host's own part, which may be a file, falls into the same time, since a GPU is given its
work ahead of doing it. So no thread is needed, and nothing waits for the GPU but what needs its results.

Three rules make that safe. A tile's memory is allocated before the tile ahead of it is computed, and its
copy waits for all that the GPU had been given to do by then: nothing else uses that memory any more. A tile
that is taken away is held until its copy is done. A store's memory goes to another one only when no copy uses
it; where a pass fails, the host waits for that.
"""

from __future__ import annotations

import itertools
import math
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from streamcnn.geometry.windows import dense, layout

Mark = Any
"""A point in what an engine, or the GPU that computes, has been given to do; only engines know what it is."""
Copies = Sequence[tuple[Tensor, Tensor]]
"""Targets and sources, of equal shape, type and order of axes, none with gaps in memory."""

_MOST_PIECES = 64
"""Pieces in which a region of a map is copied as it lies; more of them, if each is large."""
_LARGE_PIECE = 2**18
"""Bytes of a piece that takes longer than it takes to ask for it."""


class CopyEngine(Protocol):
    """Copies of a GPU, in two queues beside that of its computation; the host waits for none."""

    device: torch.device

    def mark(self) -> Mark:
        """The end of what the GPU has been given to compute."""

    def bring(self, copies: Copies, after: Mark) -> Mark:
        """Copy from pinned host memory, after the computation up to a mark; the end of that."""

    def take(self, copies: Copies, after: Mark) -> Mark:
        """Copy to pinned host memory, after the computation up to a mark; the end of that."""

    def hold(self, mark: Mark) -> None:
        """Have all that is given to compute from now on wait for a mark."""

    def settle(self, mark: Mark) -> None:
        """Wait on the host until a mark is reached."""

    def settle_all(self) -> None:
        """Wait on the host for all copies: also for those that an interrupt left nobody the mark of."""

    def buffer(self, shape: Sequence[int], dtype: torch.dtype, memory_format: torch.memory_format) -> Tensor:
        """An uninitialised tensor in pinned memory, which is not reused before copies of it are done."""

    def pin(self, block: Tensor) -> Callable[[], None] | None:
        """Pin memory of the host's; how to undo it, or None if there is no more of it to be had."""


class Incoming(Protocol):
    """A tile that comes to the compute device."""

    def fetch(self) -> None:
        """Do the host's part, and have the rest done beside what is computed."""

    def tile(self) -> Tensor:
        """The tile, for what is computed from now on; fetched now if it was not yet."""


@dataclass(frozen=True, slots=True)
class Deferred:
    """A tile that is read when it is asked for, as there is nothing to gain before."""

    read: Callable[[], Tensor]

    def fetch(self) -> None:
        """Nothing."""

    def tile(self) -> Tensor:
        """What is read now."""
        return self.read()


Source = Callable[[], Tensor]
"""Gives a tile in host memory, pinned where it goes to a GPU."""
Finish = Callable[[Tensor], object]
"""Does on the host what is to be done with a tile that has come there."""


class Transfers(ABC):
    """What moves tiles of one pass between its stores and where it computes.

    Attributes
    ----------
    compute_device
        Where tiles are computed.
    """

    compute_device: torch.device

    @abstractmethod
    def buffer(
        self,
        shape: Sequence[int],
        dtype: torch.dtype,
        memory_format: torch.memory_format = torch.contiguous_format,
    ) -> Tensor:
        """An uninitialised tile in host memory, from which it is brought fastest."""

    @abstractmethod
    def bring(
        self,
        shape: Sequence[int],
        dtype: torch.dtype,
        source: Source,
        memory_format: torch.memory_format = torch.contiguous_format,
        wanted: torch.memory_format | None = None,
    ) -> Incoming:
        """A tile of such a shape; ``source`` is asked for it when it is fetched.

        A GPU, whose kernels mind it more and change it faster, gives it in the layout that is ``wanted``.
        """

    @abstractmethod
    def take(
        self, owner: object, tile: Tensor, dtype: torch.dtype, finish: Finish, *, is_final: bool
    ) -> None:
        """Have ``finish`` called with the tile in host memory and in ``dtype``, in the order of these calls.

        ``owner`` is the store that it is for. ``is_final`` says that nobody changes the values of ``tile``
        any more.
        """

    @abstractmethod
    def settle(self, owner: object) -> None:
        """Finish what was taken for a store: it is about to be read."""

    @abstractmethod
    def advance(self) -> None:
        """A tile was computed: finish what was taken of those before it."""

    @abstractmethod
    def drain(self) -> None:
        """Finish all that was taken, and wait until no copy uses memory of a store any more."""

    @contextmanager
    def overlapping(self, *, wanted: bool) -> Iterator[None]:
        """A stretch of tiles; whether what is taken of one may be finished while others are computed.

        All of it is finished at the end. If that ends in an error, what is not finished by then is dropped.
        """
        del wanted
        yield


class PlainTransfers(Transfers):
    """To and from a device that does nothing beside, such as the host itself.

    Parameters
    ----------
    compute_device
        The device.
    """

    def __init__(self, compute_device: torch.device) -> None:
        self.compute_device = compute_device

    def buffer(
        self,
        shape: Sequence[int],
        dtype: torch.dtype,
        memory_format: torch.memory_format = torch.contiguous_format,
    ) -> Tensor:
        """A tensor."""
        return torch.empty(tuple(shape), dtype=dtype, memory_format=memory_format)

    def bring(
        self,
        shape: Sequence[int],
        dtype: torch.dtype,
        source: Source,
        memory_format: torch.memory_format = torch.contiguous_format,
        wanted: torch.memory_format | None = None,
    ) -> Incoming:
        """What the source gives, when it is asked for."""
        return Deferred(lambda: source().to(self.compute_device))

    def take(
        self, owner: object, tile: Tensor, dtype: torch.dtype, finish: Finish, *, is_final: bool
    ) -> None:
        """Finish it now."""
        finish(tile.to("cpu", dtype))

    def settle(self, owner: object) -> None:
        """Nothing: all is finished."""

    def advance(self) -> None:
        """Nothing: all is finished."""

    def drain(self) -> None:
        """Nothing: all is finished."""


@dataclass(slots=True)
class _Taken:
    """A tile that is being taken away."""

    owner: object
    done: Mark
    copies: Copies
    """Kept until they are done: on their way, its memory is not to be used for anything else."""
    finish: Callable[[], object]


class GpuTransfers(Transfers):
    """Between a GPU and host memory, by way of copy engines."""

    def __init__(self, engine: CopyEngine) -> None:
        self.engine = engine
        self.compute_device = engine.device
        self._taken: deque[_Taken] = deque()
        self._num_earlier = 0
        """How many of those are of tiles before the present one."""
        self._overlaps = False

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
        """Memory on the GPU now, and what comes there when it is fetched."""
        tile = torch.empty(tuple(shape), dtype=dtype, device=self.compute_device, memory_format=memory_format)
        return _Brought(self.engine, tile, source, wanted or memory_format, self.engine.mark())

    def take(
        self, owner: object, tile: Tensor, dtype: torch.dtype, finish: Finish, *, is_final: bool
    ) -> None:
        """Copy it to a pinned buffer, and finish it when that is done."""
        found = dense(_plain(tile))
        buffer = self.engine.buffer(found.shape, found.dtype, layout(found))
        # What was made so is a copy that nobody else has.
        is_final = is_final or found is not tile
        # A conversion on the GPU would take its memory.
        self._send(owner, [(buffer, found)], lambda: finish(buffer.to(dtype)), is_final=is_final)

    def put(self, owner: object, tile: Tensor, target: Tensor, *, is_final: bool) -> None:
        """Copy a tile to pinned memory as it lies there; both of one type."""
        found = _plain(tile).contiguous(memory_format=layout(target))
        self._send(owner, pieces(target, found), lambda: None, is_final=is_final or found is not tile)

    def settle(self, owner: object) -> None:
        """Finish all, if some of it is the store's."""
        if any(each.owner is owner for each in self._taken):
            self.drain()

    def _send(self, owner: object, copies: Copies, finish: Callable[[], object], *, is_final: bool) -> None:
        done = self.engine.take(copies, self.engine.mark())
        if self._overlaps:
            if not is_final:
                self.engine.hold(done)
            self._taken.append(_Taken(owner, done, copies, finish))
        else:
            self.engine.settle(done)
            finish()

    def advance(self) -> None:
        """Finish what was taken before the present tile: the GPU computes that meanwhile."""
        self._finish(self._num_earlier)
        self._num_earlier = len(self._taken)

    def drain(self) -> None:
        """Finish all that was taken; nothing is brought any more."""
        self._finish(len(self._taken))
        self._num_earlier = 0
        self.engine.settle_all()

    def _finish(self, count: int) -> None:
        for _ in range(count):
            each = self._taken[0]
            self.engine.settle(each.done)
            self._taken.popleft()
            each.finish()

    @contextmanager
    def overlapping(self, *, wanted: bool) -> Iterator[None]:
        """Where it is wanted, tiles are taken away while later ones are computed."""
        self._overlaps = wanted
        try:
            try:
                yield
                self.drain()
            finally:
                self._drop()
        finally:
            # Once more, as it may have been interrupted.
            self._drop()

    def _drop(self) -> None:
        """Wait until no copy is under way; what is not finished never is."""
        self._overlaps = False
        self.engine.settle_all()
        self._taken.clear()
        self._num_earlier = 0


class _Brought:
    """A tile whose memory is there."""

    def __init__(
        self, engine: CopyEngine, tile: Tensor, source: Source, wanted: torch.memory_format, free: Mark
    ) -> None:
        self._engine = engine
        self._tile = tile
        self._wanted = wanted
        self._source: Source | None = source
        self._free = free
        """From when on nothing that was given to the GPU earlier uses the memory."""
        self._done: Mark | None = None

    def fetch(self) -> None:
        """Have it copied."""
        if self._source is not None:
            source, self._source = self._source(), None
            self._done = self._engine.bring(pieces(self._tile, source), self._free)

    def tile(self) -> Tensor:
        """The tile; what is computed from now on waits for it."""
        self.fetch()
        self._engine.hold(self._done)
        return self._tile.contiguous(memory_format=self._wanted)


def _plain(tile: Tensor) -> Tensor:
    """The tile, conjugated if it is to be: PyTorch would do so on the host before the copy is there."""
    return tile.resolve_conj().resolve_neg()


def pieces(target: Tensor, source: Tensor) -> Copies:
    """Two tensors in pieces that lie in memory without gaps.

    Axes of both have the same order in memory, and one of them no gaps at all.
    """
    axes = sorted({*_cut_axes(target), *_cut_axes(source)})
    if not axes:
        return [(target, source)]
    places = itertools.product(*(range(target.shape[axis]) for axis in axes))
    return [(_at(target, axes, place), _at(source, axes, place)) for place in places]


def few_pieces(view: Tensor) -> bool:
    """Whether a region of a map is copied faster as it lies than by way of memory without gaps."""
    count = math.prod(view.shape[axis] for axis in _cut_axes(view))
    return count <= _MOST_PIECES or view.nbytes >= count * _LARGE_PIECE


def _cut_axes(view: Tensor) -> list[int]:
    """The axes by which a view has to be cut for its pieces to have no gaps in memory."""
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
