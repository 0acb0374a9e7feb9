"""The peak of a process's resident memory, as exactly as the kernel reports it.

The kernel keeps one high-water mark (``VmHWM``) of a process's resident memory, over its whole life. The user
may read it too, so it is never reset here. If it rises during a block, it is that block's peak. Otherwise the
process has held as much before, and the mark is only an upper bound. The peak is then the largest
of the readings of resident memory (``VmRSS``) that a thread takes every few milliseconds and
``DataLimit.check`` after every step. That is a lower bound: a spike between two samples is missed.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from streamcnn.ceiling.allocator import wait_for_stack
from streamcnn.ceiling.process import ResidentFile, status_bytes
from streamcnn.ceiling.sampler import Sampler

_INTERVAL = 0.01
"""Seconds between samples: a reading takes some 10 microseconds."""


@dataclass(frozen=True, slots=True)
class Peak:
    """Bounds of the most bytes that were resident; equal if the peak is known."""

    at_least: int
    at_most: int


@dataclass(frozen=True, slots=True)
class _Resident:
    """Resident memory at one moment."""

    nbytes: int


class PeakGauge:
    """Measures the peak of resident memory between ``open`` and ``close``.

    Closing again does what an interrupted call has left undone.

    Parameters
    ----------
    besides
        Called before every reading.
    """

    def __init__(self, besides: Callable[[], object]) -> None:
        self._besides = besides
        self._file: ResidentFile | None = None
        self._mark = 0
        self._sampler = Sampler(self._read, _INTERVAL)
        self._final: Peak | None = None

    def peak(self) -> Peak | None:
        """The peak so far, or after ``close`` the final one; None if there was no reading."""
        if self._final is not None:
            return self._final
        sampled, mark = self._sampler.peak, status_bytes("VmHWM")
        if sampled is None:
            return None
        assert mark is not None
        return Peak(mark, mark) if mark > self._mark else Peak(min(sampled.nbytes, mark), mark)

    @property
    def samples(self) -> tuple[tuple[float, int], ...]:
        """Readings in order: ``time.perf_counter()`` in seconds, bytes."""
        return self._sampler.samples

    def sample(self) -> None:
        """Take a reading now, if the gauge is open."""
        if self._file is not None and self._final is None:
            self._sampler.sample()

    def open(self, *, threaded: bool = True) -> None:
        """Begin to take readings, on a thread too."""
        self._mark = status_bytes("VmHWM") or 0
        self._file = ResidentFile()
        self._sampler.start(threaded=threaded)

    def close(self) -> None:
        """Take a last reading, and end the thread, so that the next one can use its stack."""
        if self._final is None:
            self.sample()
            self._final = self.peak()
        self._sampler.close()
        if self._sampler.thread is not None:
            wait_for_stack(self._sampler.thread)
        if self._file is not None:
            self._file.close()

    def raise_error(self) -> None:
        """Raise what a reading raised on the thread."""
        self._sampler.raise_error()

    def _read(self) -> _Resident:
        assert self._file is not None
        self._besides()
        return _Resident(self._file.read())
