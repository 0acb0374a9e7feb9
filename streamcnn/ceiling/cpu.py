"""The ceiling on host memory: the kernel refuses what goes past the budget, and keeps the peak.

Two different numbers, both the kernel's own. The *limit* counts the data segment: every private
writable page that was asked for, touched or not, and thread stacks at full length. The *peak*
counts resident memory: pages that were touched, those of library code that runs for the first time
among them (some 10 MB for a first convolution), so it may pass the budget by that much. Memory from
``calloc`` that nobody wrote to is refused by the first and unknown to the second.

Memory that the heap holds free is handed out again without the kernel being asked. It counts as taken
where that is a small part of the budget. Where it is more, as after plain PyTorch in the same process,
taking all of it off would leave no room for the large blocks, which never come from the heap: the limit
is then laxer than the budget, and ``DataLimit.check`` holds the peak against it after every step.

Compiled code is left out of the limit, but for the part that is touched: oneDNN compiles kernels for every
new shape of a convolution's operands and keeps about a megabyte of address space for each.

How much is too much is not decided here; see ``streamcnn.ceiling.allocator`` for what makes the
process fit to be limited.
"""

from __future__ import annotations

import mmap
import sys
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

from streamcnn.ceiling.allocator import (
    free_heap_bytes,
    free_matrix_buffers,
    start_thread_pool,
    tame_allocator,
    trim_heap,
)
from streamcnn.errors import BudgetExceeded, StreamError
from streamcnn.units import format_bytes

_STATUS = Path("/proc/self/status")
_MAPS = Path("/proc/self/maps")
_CLEAR_REFS = Path("/proc/self/clear_refs")
_RESET_HIGH_WATER = "5"
_HEAP_SHARE = 8
_HEAP_LEAST = 2**24
"""What is taken off a budget for bytes that the heap holds free, at most: one in so many of the budget's, or
so many if that is more."""
_CODE_SHARE = 16
"""The part of compiled code, one in so many bytes, that is touched: 3 to 6 % were."""
_WRITABLE_CODE = b" rwxp "


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
        free_matrix_buffers()
        trim_heap()
        data, resident = _status_bytes("VmData"), _status_bytes("VmRSS")
        return cls(None if data is None else data - _untouched_code_bytes(), resident, free_heap_bytes())


class DataLimit:
    """A ``with`` block in which the process may take ``budget`` bytes beyond a baseline.

    An allocation past the ceiling fails as it would on a full machine, and ``is_out_of_memory``
    knows the errors; the process lives on. Blocks may be nested: the lowest ceiling holds, and each
    block has its own peak. The ceiling is the whole process's, whichever thread allocates. A thread
    whose first parallel PyTorch operator runs inside the block needs stacks for a thread pool of its
    own, and OpenMP ends the process if it gets none: call ``start_thread_pool`` on that thread first.
    The kernel's high-water mark is reset on entry, for everybody who reads it.

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
        self._reads_high_water = False
        self._peak: int | None = None

    @property
    def peak_bytes(self) -> int | None:
        """Most resident memory above the baseline since entry, in bytes; None if unknown."""
        if self in _active:
            self._note_peak()
        return self._peak

    @property
    def reading(self) -> str:
        """Name of the kernel's counter behind ``peak_bytes``, or "unknown"."""
        return "VmHWM" if self._reads_high_water else "unknown"

    @property
    def samples(self) -> tuple[tuple[float, int], ...]:
        """Nothing: the kernel keeps the peak, so nobody has to look in between."""
        return ()

    def __enter__(self) -> Self:
        if self._budget is not None:
            tame_allocator(reuse=self._reuse_heap)
        self._baseline = Baseline.now() if self._given_baseline is None else self._given_baseline
        for outer in _active:
            outer._note_peak()
        self._reads_high_water = self._baseline.resident_bytes is not None and _reset_high_water()
        if self._budget is not None:
            self._lower(self._budget)
        _active.append(self)
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
        self._note_peak()
        _active.remove(self)

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

    def _note_peak(self) -> None:
        """Bring the peak up to date, before another block resets the high-water mark."""
        if not self._reads_high_water:
            return
        mark, resident = _status_bytes("VmHWM"), self._baseline.resident_bytes
        assert mark is not None
        assert resident is not None
        self._peak = max(self._peak or 0, mark - resident)


_active: list[DataLimit] = []
"""Blocks entered and not left, outermost first; the limit and the mark are the process's, not theirs."""


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


def _reset_high_water() -> bool:
    """Start the high-water mark anew at what is resident now; False where that is not allowed."""
    try:
        _CLEAR_REFS.write_text(_RESET_HIGH_WATER)
    except OSError:
        return False
    return _status_bytes("VmHWM") is not None


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
