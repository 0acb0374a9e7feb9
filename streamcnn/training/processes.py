"""Cooperation of the processes that train one model; a single process makes the same calls alone.

All processes make the same calls in the same order. What one of them does by itself, such as its share of the
images or the writing of files, runs inside a call here, so that an error in it ends all of them.
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
    """Applies a function to each of several items; the results are in the order of the items."""

    def __call__(self, work: Callable[[T], R], items: Sequence[T], /) -> list[R]: ...


def in_turn(work: Callable[[T], R], items: Sequence[T], /) -> list[R]:
    """The results of ``work`` for all items, computed in this process, one after another."""
    return [work(item) for item in items]


@dataclass(frozen=True, slots=True)
class Processes:
    """The processes that train one model."""

    rank: int = 0
    """This process's number, from 0."""
    count: int = 1

    @classmethod
    def present(cls) -> Processes:
        """The default group of ``torch.distributed``; this process alone if there is none."""
        everyone = all_processes()
        return cls() if everyone is None else cls(dist.get_rank(), everyone[1])

    @property
    def is_first(self) -> bool:
        """Whether this process is the first, which writes the files."""
        return self.rank == 0

    def require_usable(self, model: nn.Module) -> None:
        """Make sure that a model leaves gradients and parameters to its trainer to share among processes.

        Raises
        ------
        ValueError
            If the model sums gradients over processes itself, or its parameters are divided among processes.
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
        """The contiguous range of ``total`` items that is this process's share; shares differ by one at most.

        The shares follow the order of the processes. The first process has an item if any has.
        """
        return range(-(-self.rank * total // self.count), -(-(self.rank + 1) * total // self.count))

    def dealt(self, items: Iterable[T]) -> Iterator[T]:
        """The items that are this process's, where processes take items in turn."""
        return islice(items, self.rank, None, self.count)

    def meet_in(self, net: nn.Module) -> bool:
        """Whether processes wait for each other within a training pass, in synchronised batch norms."""
        return self.count > 1 and any(isinstance(each, nn.SyncBatchNorm) for each in net.modules())

    def divided(self, work: Callable[[T], R], items: Sequence[T], /, *, meets: bool = False) -> list[R]:
        """Results for all items, each worked out by one process; an error in one is one in all.

        With ``meets``, processes wait for each other within ``work``. One with an error then raises it
        without telling the others, which may be waiting inside.
        """
        with _others_there() if meets else self.agreeing():
            mine = [work(items[at]) for at in self.share(len(items))]
        return list(chain.from_iterable(self.gathered(mine)))

    def first(self, work: Callable[[], R]) -> R:
        """The result of ``work``, which only the first process runs; an error there ends all processes."""
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
        """Make an error that ends the block in one process end it in all processes.

        Raises
        ------
        OtherProcessFailed
            In processes without an error of their own, and in all but the first of several that have one.
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
        """The values of all processes, in the order of the processes."""
        if self.count == 1:
            return [value]
        found: list[T | None] = [None] * self.count
        with _others_there():
            dist.all_gather_object(found, value)
        return found  # type: ignore[return-value]

    def add_up(self, tensors: Iterable[Tensor]) -> None:
        """Replace each tensor by its sum over all processes; shapes and dtypes are the same in all."""
        if self.count == 1:
            return
        for some in _messages(tensors):
            # As contiguous elements: memory formats may differ between processes.
            joined = torch.cat([each.detach().flatten() for each in some])
            with _others_there():
                dist.all_reduce(joined)
            for each, summed in zip(some, torch.split(joined, [each.numel() for each in some]), strict=True):
                each.detach().copy_(summed.view(each.shape))

    def spread(self, tensors: Iterable[Tensor]) -> None:
        """Replace each tensor by the first process's values; shapes and dtypes are the same in all."""
        if self.count == 1:
            return
        for each in tensors:
            # As bytes, since collectives do not take all dtypes.
            sent = each.detach().contiguous().flatten().view(torch.uint8)
            with _others_there():
                dist.broadcast(sent, 0)
            each.detach().copy_(sent.view(each.dtype).view(each.shape))


def _messages(tensors: Iterable[Tensor]) -> Iterator[list[Tensor]]:
    """The tensors in order, in groups of one dtype and of limited size."""
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
    """Turn an error of a collective that other processes do not answer into one that says so.

    Raises
    ------
    OtherProcessFailed
        If they do not answer.
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
