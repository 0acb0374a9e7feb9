"""The ceiling on host memory: the kernel refuses what goes past the budget, and tells the peak.

Two different numbers, both the kernel's own. The *limit* counts the data segment: every private
writable page that was asked for, touched or not, and thread stacks at full length. The *peak*
counts resident memory: pages that were touched, those of library code that runs for the first time
among them (some 10 MB for a first convolution), so it may pass the budget by that much. Memory from
``calloc`` that nobody wrote to is refused by the first and unknown to the second.

The kernel keeps one high-water mark (``VmHWM``) of a process's resident memory, over its whole life. It
belongs to the user, who may read it too, so it is never reset here, and it tells the peak of a block only
if it has risen in that block: then it is that peak. Otherwise the process has held as much before, and the
mark is no more than an upper bound. The peak is then the largest of the readings of resident memory
(``VmRSS``) that a thread takes every few milliseconds and ``DataLimit.check`` after every step. That is a
lower bound: a spike between two samples is missed. Enforcing the limit does not depend on either.

Memory that the heap holds free is handed out again without the kernel being asked. It counts as taken
where that is a small part of the budget. Where it is more, as after plain PyTorch in the same process,
taking all of it off would leave no room for the large blocks, which never come from the heap: the limit
is then laxer than the budget, and ``DataLimit.check`` holds the peak, as it is known, against it after
every step.

Compiled code is left out of the limit, but for the part that is touched: oneDNN compiles kernels for every
new shape of a convolution's operands and keeps about a megabyte of address space for each.

How much is too much is not decided here; see ``streamcnn.ceiling.allocator`` for what makes the
process fit to be limited.
"""

from __future__ import annotations

import mmap
import os
import sys
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Self

from streamcnn.ceiling.allocator import (
    cache_thread_stack,
    free_heap_bytes,
    free_matrix_buffers,
    start_thread_pool,
    tame_allocator,
    trim_heap,
    wait_for_stack,
)
from streamcnn.ceiling.sampler import Sampler
from streamcnn.errors import BudgetExceeded, StreamError
from streamcnn.units import format_bytes

_STATUS = Path("/proc/self/status")
_MAPS = Path("/proc/self/maps")
_PAGES = Path("/proc/self/statm")
_INTERVAL = 0.01
"""Seconds between samples: a reading takes some 10 microseconds."""
_HEAP_SHARE = 8
_HEAP_LEAST = 2**24
"""What is taken off a budget for bytes that the heap holds free, at most: one in so many of the budget's, or
so many if that is more."""
_CODE_SHARE = 16
"""The part of compiled code, one in so many bytes, that is touched: 3 to 6 % were."""
_WRITABLE_CODE = b" rwxp "


HIGH_WATER, SAMPLED = "VmHWM", "VmRSS, sampled"
"""What a peak of resident memory is read from: the kernel's own mark of it, or samples, which may miss it."""


@dataclass(frozen=True, slots=True)
class Baseline:
    """What the process held at one moment; the ceilings of one update count from it.

    Forward and backward of one update share a baseline, since what the forward pass keeps counts
    against the backward pass too.
    """

    data_bytes: int | None
    """Data segment less compiled code that is not touched; None if unknown."""
    resident_bytes: int | None
    """Resident memory; None if unknown."""
    free_bytes: int = 0
    """Part of the data segment that the heap holds free."""

    @classmethod
    def now(cls) -> Baseline:
        """What the process holds now, PyTorch's threads started and free memory given back."""
        start_thread_pool()
        cache_thread_stack()
        free_matrix_buffers()
        trim_heap()
        data, resident = _status_bytes("VmData"), _status_bytes("VmRSS")
        return cls(None if data is None else data - _untouched_code_bytes(), resident, free_heap_bytes())

    def less(self, nbytes: int) -> Baseline:
        """The baseline without ``nbytes`` of resident memory, which then count as taken since."""
        data, resident = self.data_bytes, self.resident_bytes
        return replace(
            self,
            data_bytes=None if data is None else data - nbytes,
            resident_bytes=None if resident is None else resident - nbytes,
        )


class DataLimit:
    """A ``with`` block in which the process may take ``budget`` bytes beyond a baseline.

    An allocation past the ceiling fails as it would on a full machine, and ``is_out_of_memory``
    knows the errors; the process lives on. Blocks may be nested: the lowest ceiling holds, and each
    block has its own peak. The ceiling is the whole process's, whichever thread allocates. A thread
    whose first parallel PyTorch operator runs inside the block needs stacks for a thread pool of its
    own, and OpenMP ends the process if it gets none: call ``start_thread_pool`` on that thread first.

    Parameters
    ----------
    budget
        Bytes; None measures only.
    baseline
        Where budget and peak count from; what the process holds on entry if None.
    reuse_heap
        Whether the C library may keep blocks of up to 32 MiB for reuse: faster, and wasteful.

    Raises
    ------
    StreamError
        On entry, if there is a budget and the kernel here does not enforce it.
    """

    def __init__(
        self, budget: int | None, *, baseline: Baseline | None = None, reuse_heap: bool = False
    ) -> None:
        self._budget = budget
        self._reuse_heap = reuse_heap
        self._given_baseline = baseline
        self._baseline = Baseline(None, None)
        self._soft_limit_before: int | None = None
        self._gauge: _PeakGauge | None = None
        self._cleanup = ExitStack()

    @property
    def peak_bytes(self) -> int | None:
        """Most resident memory above the baseline since entry, in bytes; None if unknown.

        Exact if ``reading`` is ``VmHWM``, else a lower bound.
        """
        return self._above(None if self._gauge is None else self._gauge.peak().at_least)

    @property
    def at_most_bytes(self) -> int | None:
        """What the peak cannot exceed: more than ``peak_bytes`` where that is a lower bound."""
        return self._above(None if self._gauge is None else self._gauge.peak().at_most)

    @property
    def reading(self) -> str:
        """Name of the kernel's counter behind ``peak_bytes``, or "unknown"."""
        if self._gauge is None:
            return "unknown"
        peak = self._gauge.peak()
        return HIGH_WATER if peak.at_least == peak.at_most else SAMPLED

    @property
    def samples(self) -> tuple[tuple[float, int], ...]:
        """Resident memory above the baseline, if that is what ``reading`` names; else nothing.

        ``time.perf_counter()`` in seconds, bytes.
        """
        if self._gauge is None or self.reading != SAMPLED:
            return ()
        resident = self._baseline.resident_bytes or 0
        return tuple((when, nbytes - resident) for when, nbytes in self._gauge.samples)

    def __enter__(self) -> Self:
        if self._budget is not None:
            tame_allocator(reuse=self._reuse_heap)
        self._baseline = Baseline.now() if self._given_baseline is None else self._given_baseline
        with ExitStack() as cleanup:
            if self._baseline.resident_bytes is not None and resident_bytes() is not None:
                # Before the limit, which is not to refuse a thread.
                self._gauge = cleanup.enter_context(_PeakGauge())
            if self._budget is not None:
                self._lower(self._budget)
            self._cleanup = cleanup.pop_all()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._soft_limit_before is not None:
            _set_soft_limit(self._soft_limit_before)
            self._soft_limit_before = None
        self._cleanup.__exit__(kind, error, trace)

    def check(self, *, compiled: bool = True) -> None:
        """Let go of what libraries keep without need, and see what the limit does not refuse.

        Code that was compiled since it was set is left out of it from now on.

        Parameters
        ----------
        compiled
            Whether there may be any. To look for it takes the kernel a millisecond.

        Raises
        ------
        BudgetExceeded
            If the peak has passed the budget, where the heap held too much free for the limit to be strict.
        """
        if self._gauge is not None:
            self._gauge.sample()
        if self._budget is None:
            return
        free_matrix_buffers()
        if compiled and self._soft_limit_before is not None:
            _set_soft_limit(min(self._soft_limit_before, self._ceiling(self._budget)))
        if self._baseline.free_bytes > _heap_share(self._budget):
            peak = self.peak_bytes
            if peak is not None and peak > self._budget:
                raise BudgetExceeded(
                    f"{format_bytes(peak)} were taken of a budget of {format_bytes(self._budget)}, partly "
                    f"from the {format_bytes(self._baseline.free_bytes)} that the heap held free"
                )

    def _lower(self, budget: int) -> None:
        """Set the limit, unless a lower one is in force."""
        if sys.platform != "linux":
            raise _not_enforced()
        ceiling, before = self._ceiling(budget), _soft_limit()
        if ceiling < before:
            _set_soft_limit(ceiling)
            if not _is_refused(ceiling):
                _set_soft_limit(before)
                raise _not_enforced()
        self._soft_limit_before = before

    def _ceiling(self, budget: int) -> int:
        """Bytes of data segment up to which the process may grow."""
        if self._baseline.data_bytes is None:
            raise _not_enforced()
        in_heap = min(self._baseline.free_bytes, _heap_share(budget))
        return self._baseline.data_bytes + _untouched_code_bytes() + budget - in_heap

    def _above(self, resident: int | None) -> int | None:
        """Resident bytes less what the baseline had, and never less than nothing."""
        before = self._baseline.resident_bytes
        return None if resident is None or before is None else max(0, resident - before)


@dataclass(frozen=True, slots=True)
class _Peak:
    """Bounds of the most bytes that were resident: equal if that is known."""

    at_least: int
    at_most: int


@dataclass(frozen=True, slots=True)
class _Resident:
    """Resident memory at one moment."""

    nbytes: int


class _PeakGauge:
    """A ``with`` block whose peak of resident memory is known as well as the kernel tells it."""

    def __init__(self) -> None:
        self._pages = -1
        self._mark = 0
        self._sampler = Sampler(self._read, _INTERVAL)
        self._final: _Peak | None = None

    def peak(self) -> _Peak:
        """The peak since entry, until the end of the block if that has come."""
        if self._final is not None:
            return self._final
        sampled, mark = self._sampler.peak, _status_bytes("VmHWM")
        assert sampled is not None
        assert mark is not None
        return _Peak(mark, mark) if mark > self._mark else _Peak(min(sampled.nbytes, mark), mark)

    @property
    def samples(self) -> tuple[tuple[float, int], ...]:
        """Readings in order: ``time.perf_counter()`` in seconds, bytes."""
        return self._sampler.samples

    def sample(self) -> None:
        """Take a reading now, unless the block has ended."""
        if self._final is None:
            self._sampler.sample()

    def __enter__(self) -> Self:
        with ExitStack() as cleanup:
            # Kept open: to open it takes longer than to read it.
            self._pages = os.open(_PAGES, os.O_RDONLY | os.O_CLOEXEC)
            cleanup.callback(os.close, self._pages)
            self._mark = _status_bytes("VmHWM") or 0
            cleanup.callback(self._let_stack_go)
            cleanup.enter_context(self._sampler)
            self._cleanup = cleanup.pop_all()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        try:
            self.sample()
            self._final = self.peak()
        finally:
            self._cleanup.__exit__(kind, error, trace)

    def _let_stack_go(self) -> None:
        """Leave the thread's stack to the next block's."""
        if self._sampler.thread is not None:
            wait_for_stack(self._sampler.thread)

    def _read(self) -> _Resident:
        return _Resident(int(os.pread(self._pages, 128, 0).split()[1]) * mmap.PAGESIZE)


def resident_bytes() -> tuple[int, int] | None:
    """Resident memory now and its high-water mark, in bytes; None if the kernel does not say."""
    resident, mark = _status_bytes("VmRSS"), _status_bytes("VmHWM")
    return None if resident is None or mark is None else (resident, mark)


def _status_bytes(name: str) -> int | None:
    """One counter of ``/proc/self/status`` in bytes; None where there is none."""
    try:
        lines = _STATUS.read_text().splitlines()
    except FileNotFoundError:
        return None
    for line in lines:
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024
    return None


def _untouched_code_bytes() -> int:
    """Address space of code that was compiled in this process, less what is touched of it."""
    nbytes = 0
    *mappings, _ = _MAPS.read_bytes().split(_WRITABLE_CODE)
    for mapping in mappings:
        span = mapping[mapping.rfind(b"\n") + 1 :]
        if b" " not in span:  # else it was in the path of a file
            start, end = span.split(b"-")
            nbytes += int(end, 16) - int(start, 16)
    return nbytes - nbytes // _CODE_SHARE


def _heap_share(budget: int) -> int:
    """The most of a budget that is taken off for what the heap holds free."""
    return max(budget // _HEAP_SHARE, _HEAP_LEAST)


def _soft_limit() -> int:
    """The soft limit on the data segment; no limit is larger than any number of bytes."""
    import resource

    soft, _ = resource.getrlimit(resource.RLIMIT_DATA)
    return sys.maxsize if soft == resource.RLIM_INFINITY else soft


def _set_soft_limit(soft: int) -> None:
    """Set the soft limit on the data segment; the hard limit stays."""
    import resource

    _, hard = resource.getrlimit(resource.RLIMIT_DATA)
    resource.setrlimit(resource.RLIMIT_DATA, (resource.RLIM_INFINITY if soft == sys.maxsize else soft, hard))


def _is_refused(nbytes: int) -> bool:
    """Whether the kernel refuses a mapping of ``nbytes``; old and emulated ones ignore the limit."""
    try:
        mapping = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except OSError:
        return True
    mapping.close()
    return False


def _not_enforced() -> StreamError:
    return StreamError(
        f"budget= cannot be enforced for host memory on this platform ({sys.platform}): that needs a "
        "Linux kernel with /proc and RLIMIT_DATA; run on Linux or on a GPU, or pass budget=None to "
        "run without a ceiling"
    )
