"""A GPU's copy engines without a GPU: copies take place as late as their order allows.

So code that reads a tile before it has come, changes or drops one before it has gone, or reuses host memory
that a copy still reads, fails here every time; on a GPU it would fail now and then.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from streamcnn.stores.transfers import Copies

Mark = tuple[str, int]
"""The queue, and the number of its entries to wait for; a CPU's computation is done at once."""


@dataclass
class _Copy:
    target: Tensor
    source: Tensor
    expected: Tensor
    """The values of the source when the copy was asked for."""
    on_device: Tensor
    """The target or source on the device, whose memory would be reused as soon as it is dropped."""


@dataclass
class LateCopies:
    """Copies between host memory and a "device" that is the host too."""

    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    pins: bool = True
    """Whether memory can be pinned."""
    num_pinned: int = 0
    num_brought: int = 0
    num_taken: int = 0
    num_settled: int = 0
    """How often the host waited for a copy that had not been made."""

    def __post_init__(self) -> None:
        self._queues: dict[str, deque[list[_Copy]]] = {"in": deque(), "out": deque()}
        self._done = {"in": 0, "out": 0}

    @property
    def num_open(self) -> int:
        """Number of requests for copies for which nothing has waited yet."""
        return sum(map(len, self._queues.values()))

    @property
    def num_taken_open(self) -> int:
        """Number of these that leave the device."""
        return len(self._queues["out"])

    def mark(self) -> Mark:
        """The mark of computation, which is done at once."""
        return "computed", 0

    def bring(self, copies: Copies, after: Mark) -> Mark:
        """Queue copies to the device: until they are made, targets must be held and sources unchanged."""
        self.num_brought += len(copies)
        for target, _ in copies:
            _spoil(target)
        return self._ask("in", [_Copy(_alias(t), _alias(s), s.clone(), _alias(t)) for t, s in copies])

    def take(self, copies: Copies, after: Mark) -> Mark:
        """Queue copies from the device: until they are made, sources must be held and unchanged."""
        self.num_taken += len(copies)
        return self._ask("out", [_Copy(_alias(t), _alias(s), s.clone(), _alias(s)) for t, s in copies])

    def hold(self, mark: Mark) -> None:
        """Make the copies up to a mark, as computation that waits for it is done at once."""
        self._reach(mark)

    def settle(self, mark: Mark) -> None:
        """Make the copies up to a mark, and count if there were any."""
        self.num_settled += self._reach(mark)

    def settle_all(self) -> None:
        """Make all copies."""
        for queue, asked in self._queues.items():
            self.num_settled += self._reach((queue, self._done[queue] + len(asked)))

    def ends(self) -> Sequence[Mark]:
        """The marks of the last copies of both queues."""
        return [(queue, self._done[queue] + len(asked)) for queue, asked in self._queues.items()]

    def buffer(self, shape: Sequence[int], dtype: torch.dtype, memory_format: torch.memory_format) -> Tensor:
        """Memory filled with arbitrary values."""
        buffer = torch.empty(tuple(shape), dtype=dtype, memory_format=memory_format)
        _spoil(buffer)
        return buffer

    def pin(self, block: Tensor) -> Callable[[], None] | None:
        """Count the block's bytes as pinned."""
        if not self.pins:
            return None
        self.num_pinned += block.nbytes
        _spoil(block)
        nbytes = block.nbytes

        def undo() -> None:
            self.num_pinned -= nbytes

        return undo

    def _ask(self, queue: str, copies: list[_Copy]) -> Mark:
        for copy in copies:
            target, source = copy.target, copy.source
            assert (target.shape, target.dtype) == (source.shape, source.dtype)
            assert _order(target) == _order(source), (
                "a copy between orders of axes takes other memory and time"
            )
            for each in (target, source):
                assert each.resolve_conj().resolve_neg() is each, "the host would change it before it comes"
                assert each.is_contiguous() or each.is_contiguous(memory_format=torch.channels_last), (
                    "a copy of memory with gaps takes other memory and time"
                )
        self._queues[queue].append(copies)
        return queue, self._done[queue] + len(self._queues[queue])

    def _reach(self, mark: Mark) -> int:
        queue, count = mark
        if queue == "computed" or count <= self._done[queue]:
            return 0
        while self._done[queue] < count:
            for copy in self._queues[queue][0]:
                assert self._is_held(copy.on_device), "let go of while it was copied"
                assert torch.equal(_bits(copy.source), _bits(copy.expected)), "changed while it was copied"
                copy.target.copy_(copy.source)
            self._queues[queue].popleft()
            self._done[queue] += 1
        return 1

    def _is_held(self, x: Tensor) -> bool:
        """Whether a tensor other than those of the copies uses the memory of ``x``, if there is any."""
        if not x.nbytes:
            return True
        copies = [copy for each in self._queues.values() for asked in each for copy in asked]
        held = [t for copy in copies for t in (copy.target, copy.source, copy.on_device)]
        place = x.untyped_storage().data_ptr()
        return _num_uses(x) > sum(t.untyped_storage().data_ptr() == place for t in held)


def _alias(x: Tensor) -> Tensor:
    return x.detach()


def _num_uses(x: Tensor) -> int:
    """The number of tensors in the memory of ``x``."""
    alone = torch.empty(1)
    counted = [torch._C._storage_Use_Count(t.untyped_storage()._cdata) for t in (x, alone)]
    return counted[0] - counted[1] + 1


def _order(x: Tensor) -> list[int]:
    """The strides of axes longer than 1."""
    return [stride for stride, extent in zip(x.stride(), x.shape, strict=True) if extent > 1]


def _spoil(x: Tensor) -> None:
    x.fill_(True if x.dtype == torch.bool else 77)


def _bits(x: Tensor) -> Tensor:
    return x.contiguous().view(torch.uint8)
