"""The ceiling on host memory: the kernel refuses what goes past the budget, and reports the peak.

Limit and peak are different numbers of the kernel. The *limit* counts the data segment: every private
writable page that was asked for, touched or not, and thread stacks at full length. The *peak* counts resident
memory: pages that were touched, among them those of library code that runs for the first time, some 10 MB for
a first convolution. Such code is taken off the limit once a step has run it, and until then the peak may pass
the budget by that much. Memory from ``calloc`` that nobody wrote to counts towards the limit and not towards
the peak. Enforcing the limit does not depend on the peak; ``streamcnn.ceiling.peak`` says how exactly the
peak is known.

The heap hands out its free memory again without asking the kernel. Its large holes are filled while a
baseline is in use (``streamcnn.ceiling.heap``), and small holes count as taken. Where the small holes are
more than a small part of the budget, subtracting all of them would leave no room for large blocks, which
never come from the heap. The limit is then laxer than the budget, and ``DataLimit.check`` compares the peak,
as far as it is known, with the budget after every step.

Tensors may be taken from kept blocks (``streamcnn.ceiling.kept_blocks``), which refuse what goes past the
budget by themselves. Free blocks are not part of a baseline: they count towards the budget. The limit is then
for everything but tensors.

Compiled code counts towards the limit only where it was touched: oneDNN compiles kernels for every new shape
of a convolution's operands and keeps about a megabyte of address space for each.

The budget is not decided here; see ``streamcnn.ceiling.allocator`` for how a process is prepared for a limit.
"""

from __future__ import annotations

import os
import sys
import threading
from contextlib import ExitStack
from typing import Self

from streamcnn.ceiling.allocator import free_matrix_buffers, set_mmap_threshold
from streamcnn.ceiling.baseline import HEAP_LEAST, Baseline
from streamcnn.ceiling.data_segment import data_caps, is_enforced, not_enforced, soft_limit
from streamcnn.ceiling.kept_blocks import KeptBlocks
from streamcnn.ceiling.peak import Peak, PeakGauge
from streamcnn.ceiling.process import resident_bytes, status_bytes, untouched_code_bytes
from streamcnn.errors import BudgetExceeded, StreamError
from streamcnn.support.interrupts import cleaning_up, undoing
from streamcnn.support.units import format_bytes

_HEAP_SHARE = 8
"""At most the budget divided by this, or ``HEAP_LEAST`` if more, is taken off for the heap's free bytes."""

_MOST_LIBRARIES = 3 * 2**23
"""The most bytes taken off a budget for library code: what plans reserve for the run time."""

HIGH_WATER, SAMPLED = "VmHWM", "VmRSS, sampled"
"""Readings behind a peak of resident memory: the kernel's high-water mark, or samples, which may miss it."""


class DataLimit:
    """A ``with`` block in which the process may take ``budget`` bytes beyond a baseline.

    An allocation past the ceiling fails as it would on a full machine, with errors that ``is_out_of_memory``
    knows; the process lives on. Blocks may overlap, nested or on several threads. The ceiling is the whole
    process's, whichever thread allocates: the lowest one is in force, and the user's own limit is back after
    the last. But where tensors come from kept blocks on several threads, each block has its own budget.

    A thread whose first parallel PyTorch operator runs inside the block needs stacks for a thread pool of its
    own, and OpenMP ends the process if it gets none: call ``start_thread_pool`` on that thread first. Forked
    children have the user's own limit, and so have programs: no ceiling is in force for the few milliseconds
    in which one is started (``streamcnn.ceiling.children``).

    Parameters
    ----------
    budget
        Bytes; None measures only.
    baseline
        Where budget and peak count from; what the process holds on entry if None.
    reuse_heap
        Whether the C library may keep blocks of up to 32 MiB for reuse, which is faster but wastes memory.
    must_hold
        Whether a kernel that does not enforce the budget is an error; otherwise there is no budget then.
    kept
        Bytes that this thread's tensors and the free blocks kept for them may take together; tensors past the
        budget are refused. None leaves PyTorch's allocator as it is.

    Raises
    ------
    StreamError
        On entry, if there is a budget that must hold and the kernel here does not enforce it.

    Notes
    -----
    ``KeyboardInterrupt`` may come at any line, the first of ``__exit__`` among them, which nothing here can
    guard: whoever has to be sure calls ``close`` once more in a ``finally`` around the block.
    """

    def __init__(
        self,
        budget: int | None,
        *,
        baseline: Baseline | None = None,
        reuse_heap: bool = False,
        must_hold: bool = True,
        kept: int | None = None,
    ) -> None:
        self._budget = budget
        self._must_hold = must_hold
        self._reuse_heap = reuse_heap
        self._given_baseline = baseline
        self._baseline = Baseline(None, None)
        self._gauge = PeakGauge(data_caps.settle)
        self._is_shared = False
        self._thread = threading.get_ident()
        self._blocks = None if kept is None else KeptBlocks(budget, kept)

    @property
    def peak_bytes(self) -> int | None:
        """Most resident memory above the baseline since entry, in bytes; None if unknown.

        Exact if ``reading`` is ``VmHWM``, else a lower bound. It is the whole process's, see ``is_shared``.
        """
        peak = self._peak()
        return None if peak is None else peak.at_least

    @property
    def at_most_bytes(self) -> int | None:
        """Upper bound of the peak in bytes: more than ``peak_bytes`` where that is a lower bound."""
        peak = self._peak()
        return None if peak is None else peak.at_most

    @property
    def reading(self) -> str:
        """Name of the kernel's counter behind ``peak_bytes``, or "unknown"."""
        peak = self._gauge.peak()
        if peak is None:
            return "unknown"
        return HIGH_WATER if peak.at_least == peak.at_most else SAMPLED

    @property
    def is_shared(self) -> bool:
        """Whether other blocks were entered at the same time: their memory is part of the peak."""
        return self._is_shared

    @property
    def samples(self) -> tuple[tuple[float, int], ...]:
        """Resident memory above the baseline, if that is what ``reading`` names; else nothing.

        ``time.perf_counter()`` in seconds, bytes.
        """
        if self.reading != SAMPLED:
            return ()
        resident = self._baseline.resident_bytes or 0
        return tuple((when, nbytes - resident) for when, nbytes in self._gauge.samples)

    def __enter__(self) -> Self:
        return undoing(self._enter, self.close)

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        cleaning_up(self.close, self.close)
        if error is None:
            self._gauge.raise_error()

    def close(self) -> None:
        """Lift the limit and end the measurement. Closing again does what an interrupt has left undone."""
        # Called in reverse, and each even if another one fails.
        with ExitStack() as closing:
            closing.callback(entered_limits.pop, self, None)
            closing.callback(self._gauge.close)
            closing.callback(data_caps.drop, self)
            if self._blocks is not None:
                closing.callback(self._blocks.leave)

    def keep_blocks(self, nbytes: int) -> None:
        """Let tensors and free blocks take ``nbytes`` together; free blocks beyond that go back."""
        if self._blocks is not None:
            self._blocks.keep(nbytes)

    def check(self, *, compiled: bool = True) -> None:
        """Free buffers that libraries need not keep, and check what the limit does not refuse.

        Code that was compiled since the limit was set no longer counts towards it, unless it was touched.

        Parameters
        ----------
        compiled
            Whether there may be new compiled code. Looking for it takes the kernel a millisecond.

        Raises
        ------
        BudgetExceeded
            If the peak has passed the budget, where the heap held too much free for the limit to be strict.
        """
        self._gauge.sample()
        if self._budget is None:
            return
        free_matrix_buffers()
        if compiled:
            self._move(self._budget)
        if self._baseline.free_bytes > _heap_share(self._budget):
            peak = self.peak_bytes
            if peak is not None and peak > self._budget:
                raise BudgetExceeded(
                    f"{format_bytes(peak)} were taken of a budget of {format_bytes(self._budget)}, partly "
                    f"from the {format_bytes(self._baseline.free_bytes)} that the heap held free"
                )

    def _enter(self) -> Self:
        self._thread = threading.get_ident()
        if self._budget is not None:
            set_mmap_threshold(reuse=self._reuse_heap)
        self._baseline = self._given_baseline or Baseline.now(fill_holes=self._budget is not None)
        self._join_others()
        if self._baseline.resident_bytes is not None and resident_bytes() is not None:
            # Before the limit, which must not refuse the thread: Python waits forever for one that fails to
            # begin. Under another block's limit there is no thread, only the readings after every step.
            self._gauge.open(threaded=not self._is_shared)
        if self._blocks is not None:
            # What the forward pass has left counts towards the backward pass.
            for part in self._baseline.passes:
                self._blocks.inherit(part)
            self._baseline.passes[:] = [self._blocks]
            # Before the limit, since this gives excess free blocks back.
            self._blocks.enter()
        if self._budget is not None:
            try:
                self._lower(self._budget)
            except StreamError:
                if self._must_hold:
                    raise
                data_caps.drop(self)
                self._budget = None
        return self

    def _join_others(self) -> None:
        """Register among the entered blocks. A forked child ignores those of its parent."""
        entered_limits[self] = os.getpid()
        for each, process in list(entered_limits.items()):
            if process == os.getpid() and each is not self:
                self._is_shared = each._is_shared = True
                self._leave_room(each)
                each._leave_room(self)

    def _leave_room(self, other: DataLimit) -> None:
        """Make room for another thread's tensors, which that thread's block holds within its own budget."""
        if self._blocks is None or other._blocks is None or self._thread == other._thread:
            return
        if self._budget is not None and other._budget is not None:
            # All of it: what the other held already may be in this baseline or not.
            self._baseline.others[other._baseline.key] = other._budget
            self._move(self._budget)

    def _lower(self, budget: int) -> None:
        """Set the limit, unless a lower one is in force."""
        if sys.platform != "linux":
            raise not_enforced()
        others = self._others()
        ceiling = self._ceiling(budget)
        is_lowest = ceiling < soft_limit()
        data_caps.put(self, ceiling)
        self._move(budget, others)
        if is_lowest and not is_enforced():
            raise not_enforced()

    def _move(self, budget: int, known: int | None = None) -> None:
        """Set the limit to the present ceiling, if it is in force; other threads may change it meanwhile.

        ``known`` is what `_others` was before the limit was last set.
        """
        while known != (others := self._others()):
            known = others
            data_caps.move(self, self._ceiling(budget))

    def _others(self) -> int:
        """Bytes that other threads' updates may take under their own ceilings."""
        return sum(self._baseline.others.values())

    def _ceiling(self, budget: int) -> int:
        """The limit on the data segment in bytes."""
        if self._baseline.data_bytes is None:
            raise not_enforced()
        in_heap = min(self._baseline.free_bytes, _heap_share(budget))
        room = budget - in_heap - self._library_bytes()
        return self._baseline.data_bytes + untouched_code_bytes() + room + self._others()

    def _library_bytes(self) -> int:
        """Bytes of library code that has run for the first time: resident, and no part of the data segment.

        Other files may be mapped too, so this is at most what plans reserve for the run time.
        """
        before, now = self._baseline.file_bytes, status_bytes("RssFile")
        return 0 if before is None or now is None else min(max(0, now - before), _MOST_LIBRARIES)

    def _peak(self) -> Peak | None:
        """The peak beyond the baseline, never negative."""
        before, peak = self._baseline.resident_bytes, self._gauge.peak()
        if before is None or peak is None:
            return None
        return Peak(max(0, peak.at_least - before), max(0, peak.at_most - before))


def _heap_share(budget: int) -> int:
    """The most bytes taken off a budget for the heap's free bytes."""
    return max(budget // _HEAP_SHARE, HEAP_LEAST)


entered_limits: dict[DataLimit, int] = {}
"""Entered blocks, each with the number of the process that entered it."""
