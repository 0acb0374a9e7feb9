"""What processes do together that train one model; a single process does the same alone.

All go through the same calls in the same order. What one of them does by itself, its share of the images or
the writing of files, stands in a call here, so that an error in it ends all of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain, islice
from typing import Protocol, TypeVar

import torch
from torch import Tensor, nn
from torch import distributed as dist

from streamcnn.errors import OtherProcessFailed
from streamcnn.support.processes import all_processes

T = TypeVar("T")
R = TypeVar("R")

_BYTES_AT_ONCE = 2**25
"""Of tensors that are added up in one message."""


class Each(Protocol):
    """Applies a function to each of some items; the results are in their order."""

    def __call__(self, work: Callable[[T], R], items: Sequence[T], /) -> list[R]: ...


def in_turn(work: Callable[[T], R], items: Sequence[T], /) -> list[R]:
    """Results for all items, worked out here, one after another."""
    return [work(item) for item in items]


@dataclass(frozen=True, slots=True)
class Processes:
    """Processes that train one model."""

    rank: int = 0
    """Of this one, from 0."""
    count: int = 1

    @classmethod
    def present(cls) -> Processes:
        """All that PyTorch's distributed package has brought together; this one alone, if it has none."""
        everyone = all_processes()
        return cls() if everyone is None else cls(dist.get_rank(), everyone[1])

    @property
    def is_first(self) -> bool:
        """Whether this one is the one that writes files."""
        return self.rank == 0

    def require_usable(self, model: nn.Module) -> None:
        """Make sure that a model leaves it to its trainer what processes do together.

        Raises
        ------
        ValueError
            If it adds up gradients itself, or each process has a part of it.
        """
        if self.count == 1:
            return
        from torch.distributed.tensor import DTensor
        from torch.nn.parallel import DistributedDataParallel

        if any(isinstance(each, DistributedDataParallel) for each in model.modules()):
            raise ValueError(
                "the model is within DistributedDataParallel: give the model itself, for the trainer adds up "
                "gradients among processes"
            )
        if any(isinstance(each, DTensor) for each in model.parameters()):
            raise ValueError(
                "the model's parameters are divided among processes: allowed is a whole model in each of them"
            )

    def share(self, total: int) -> range:
        """Which of so many items, in order, are this process's; shares differ by one at most.

        In the order of the processes they are all items in their order. The first has one, if any has.
        """
        return range(-(-self.rank * total // self.count), -(-(self.rank + 1) * total // self.count))

    def dealt(self, items: Iterable[T]) -> Iterator[T]:
        """Those of many items that are this process's: each in turn has the next one."""
        return islice(items, self.rank, None, self.count)

    def meet_in(self, net: nn.Module) -> bool:
        """Whether they wait for each other in the course of a training pass, by synchronised batch norms."""
        return self.count > 1 and any(isinstance(each, nn.SyncBatchNorm) for each in net.modules())

    def divided(self, work: Callable[[T], R], items: Sequence[T], /, *, meets: bool = False) -> list[R]:
        """Results for all items, each worked out by one process; an error in one is one in all.

        Where processes meet in the work, one with an error goes without a word: the others may wait in it.
        """
        with _others_there() if meets else self.agreeing():
            mine = [work(items[at]) for at in self.share(len(items))]
        return list(chain.from_iterable(self.gathered(mine)))

    def first(self, work: Callable[[], R]) -> R:
        """What ``work`` gives in the first process, which alone does it; an error there is one in all."""
        found: list[R | None] = [None]
        with self.agreeing():
            if self.is_first:
                found = [work()]
        if self.count > 1:
            with _others_there():
                dist.broadcast_object_list(found)
        return found[0]  # type: ignore[return-value]

    @contextmanager
    def agreeing(self) -> Iterator[None]:
        """A block that ends in an error in all processes if it does in one.

        Raises
        ------
        OtherProcessFailed
            In the others, and of several in which it does in all but the first.
        """
        failed: Exception | None = None
        try:
            yield
        except Exception as error:
            failed = error
        told = self.gathered("" if failed is None else f"{type(failed).__name__}: {failed}")
        first = next((rank for rank, text in enumerate(told) if text), None)
        if first is None:
            return
        if first == self.rank:
            assert failed is not None
            raise failed
        raise OtherProcessFailed(
            f"process {first} has failed, and this one ends with it: {told[first]}", rank=first
        ) from failed

    def gathered(self, value: T) -> list[T]:
        """What each process gives, in their order."""
        if self.count == 1:
            return [value]
        found: list[T | None] = [None] * self.count
        with _others_there():
            dist.all_gather_object(found, value)
        return found  # type: ignore[return-value]

    def add_up(self, tensors: Iterable[Tensor]) -> None:
        """Give tensors, of the same shapes and types in all processes, the sums over these."""
        if self.count == 1:
            return
        for some in _messages(tensors):
            # In the order of their elements, which lie in memory as suits each process.
            joined = torch.cat([each.detach().flatten() for each in some])
            with _others_there():
                dist.all_reduce(joined)
            for each, summed in zip(some, torch.split(joined, [each.numel() for each in some]), strict=True):
                each.detach().copy_(summed.view(each.shape))

    def spread(self, tensors: Iterable[Tensor]) -> None:
        """Give tensors, of the same shapes and types in all processes, the first one's values."""
        if self.count == 1:
            return
        for each in tensors:
            # As bytes, for some types are none that are sent.
            sent = each.detach().contiguous().flatten().view(torch.uint8)
            with _others_there():
                dist.broadcast(sent, 0)
            each.detach().copy_(sent.view(each.dtype).view(each.shape))


def _messages(tensors: Iterable[Tensor]) -> Iterator[list[Tensor]]:
    """Tensors of one type each, in order, so many that they are not too large together."""
    some: list[Tensor] = []
    nbytes = 0
    for each in tensors:
        if some and (each.dtype != some[0].dtype or nbytes + each.nbytes > _BYTES_AT_ONCE):
            yield some
            some, nbytes = [], 0
        some.append(each)
        nbytes += each.nbytes
    if some:
        yield some


@contextmanager
def _others_there() -> Iterator[None]:
    """Say what it means that other processes do not answer.

    Raises
    ------
    OtherProcessFailed
        If they do not.
    """
    try:
        yield
    except RuntimeError as error:
        if not (isinstance(error, dist.DistError) or "gloo" in str(error)):
            raise
        raise OtherProcessFailed(
            "another process of the run has ended before its time: what it said last tells why, and if it "
            f"said nothing, the system may have killed it for its memory ({str(error).partition('. ')[0]})"
        ) from error
