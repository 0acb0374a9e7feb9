"""A thread that takes readings at intervals while something else runs, and keeps the largest."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import suppress
from threading import Lock, Thread, get_ident
from typing import Generic, Protocol, TypeVar

INTERVAL = 0.02
"""Seconds between samples of a GPU's memory: a reading takes about a millisecond."""
MOST_SAMPLES = 4096
"""Samples kept at most; past that, every other one is dropped, and half as many new ones are kept."""
_LONGEST_START = 0.5
"""Seconds to wait at most for a thread to begin."""


class Sized(Protocol):
    """A reading, whatever else it says."""

    @property
    def nbytes(self) -> int:
        """Bytes held."""


R = TypeVar("R", bound=Sized)


class Sampler(Generic[R]):
    """Calls ``read`` on a thread of its own from ``start`` until ``close``.

    ``start`` takes a first reading before it returns. An error of ``read`` ends the sampling on the thread,
    and ``raise_error`` raises it. A sample on the thread that finds no memory for itself is left out: under a
    limit that is nearly reached, the work that is measured decides whether there is enough.

    Nothing here waits for a Python lock that ``KeyboardInterrupt`` could leave taken.

    Parameters
    ----------
    read
        Returns a reading, or None where it is unknown.
    interval
        Seconds between readings.
    """

    def __init__(self, read: Callable[[], R | None], interval: float = INTERVAL) -> None:
        self._read = read
        self._interval = interval
        self._thread: Thread | None = None
        self._running = Lock()
        """Taken until the thread is to end."""
        self._peaks: dict[int, R] = {}
        """The largest reading by thread; each thread changes only its own."""
        self._error: BaseException | None = None
        self._samples: list[tuple[float, int]] = []
        self._stride = 1
        self._num_read = 0
        self.num_asked = 0
        """How often a reading was asked for, known or not."""

    @property
    def peak(self) -> R | None:
        """The largest reading so far; None if none was known."""
        return max(list(self._peaks.values()), key=lambda reading: reading.nbytes, default=None)

    @property
    def samples(self) -> tuple[tuple[float, int], ...]:
        """Readings in order: ``time.perf_counter()`` in seconds, bytes. At most 4096, evenly spread."""
        return tuple(sorted(self._samples))

    @property
    def thread(self) -> Thread | None:
        """The thread, ended if it was closed; None before the start."""
        return self._thread

    def sample(self) -> None:
        """Take one reading now, on the calling thread."""
        reading = self._read()
        self.num_asked += 1
        if reading is None:
            return
        mine = self._peaks.get(get_ident())
        if mine is None or reading.nbytes > mine.nbytes:
            self._peaks[get_ident()] = reading
        if self._num_read % self._stride == 0:
            self._samples.append((time.perf_counter(), reading.nbytes))
        self._num_read += 1
        if len(self._samples) > MOST_SAMPLES:
            del self._samples[1::2]
            self._stride *= 2

    def start(self, *, threaded: bool = True) -> None:
        """Take a first reading and start the thread; without one, ``sample`` alone takes readings."""
        self.sample()
        if not threaded:
            return
        self._running.acquire(blocking=False)
        self._thread = Thread(target=self._run, name="streamcnn-sampler", daemon=True)
        try:
            self._thread.start()
        except Exception:
            self._thread = None
            raise

    def close(self) -> None:
        """End the thread. Closing again does what an interrupted call has left undone."""
        thread = self._thread
        if thread is None:
            return
        if self._running.locked():
            self._running.release()
        if not _shows_up(thread):
            # Interrupted before it ran; started, it leaves the list of threads that are to come.
            thread.start()
        thread.join()

    def raise_error(self) -> None:
        """Raise what a reading raised on the thread, if it did."""
        if self._error is not None:
            raise self._error

    def _run(self) -> None:
        try:
            # The lock can be acquired only once the thread is to end.
            while not self._running.acquire(timeout=self._interval):
                with suppress(MemoryError):
                    self.sample()
        except BaseException as error:
            self._error = error


def _shows_up(thread: Thread) -> bool:
    """Whether a thread runs or has run, after waiting a moment for it to begin."""
    until = time.monotonic() + _LONGEST_START
    while thread.ident is None and time.monotonic() < until:
        time.sleep(0)
    return thread.ident is not None
