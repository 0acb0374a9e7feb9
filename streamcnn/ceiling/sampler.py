"""A thread that reads a number again and again while something else runs, and keeps the largest."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import suppress
from threading import Event, Lock, Thread
from types import TracebackType
from typing import Generic, Protocol, Self, TypeVar

INTERVAL = 0.02
"""Seconds between samples of a GPU's memory: a reading takes about a millisecond."""
_MOST_SAMPLES = 4096
"""Samples kept at once; then every other one is dropped and they are taken half as often into the series."""


class Sized(Protocol):
    """A reading, whatever else it says."""

    @property
    def nbytes(self) -> int:
        """Bytes held."""


R = TypeVar("R", bound=Sized)


class Sampler(Generic[R]):
    """A ``with`` block during which ``read`` is called on a thread of its own, at its begin and its end too.

    The thread ends with the block, whatever happens in it. What ``read`` raises ends the sampling, and the
    block raises it if nothing else went wrong. A sample that finds no memory for itself is left out: under
    a limit that is nearly reached, the block's own work decides whether there is enough.

    Parameters
    ----------
    read
        A reading, or None where it is unknown.
    interval
        Seconds between readings.
    """

    def __init__(self, read: Callable[[], R | None], interval: float = INTERVAL) -> None:
        self._read = read
        self._interval = interval
        self._thread: Thread | None = None
        self._stopping = Event()
        self._lock = Lock()
        self._peak: R | None = None
        self._error: BaseException | None = None
        self._samples: list[tuple[float, int]] = []
        self._stride = 1
        self._num_read = 0

    @property
    def peak(self) -> R | None:
        """The largest reading so far; None if none was known."""
        return self._peak

    @property
    def samples(self) -> tuple[tuple[float, int], ...]:
        """Readings in order: ``time.perf_counter()`` in seconds, bytes. Some 4096 at most, evenly spread."""
        with self._lock:
            return tuple(self._samples)

    @property
    def thread(self) -> Thread | None:
        """The thread, ended if the block has; None before that began."""
        return self._thread

    def sample(self) -> None:
        """Take one reading now, on the calling thread."""
        reading = self._read()
        if reading is None:
            return
        with self._lock:
            if self._peak is None or reading.nbytes > self._peak.nbytes:
                self._peak = reading
            if self._num_read % self._stride == 0:
                self._samples.append((time.perf_counter(), reading.nbytes))
            self._num_read += 1
            if len(self._samples) > _MOST_SAMPLES:
                del self._samples[1::2]
                self._stride *= 2

    def __enter__(self) -> Self:
        self.sample()
        self._thread = Thread(target=self._run, name="streamcnn-sampler", daemon=True)
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stopping.set()
        assert self._thread is not None
        self._thread.join()
        if error is not None:
            return
        if self._error is not None:
            raise self._error
        self.sample()

    def _run(self) -> None:
        try:
            while not self._stopped_in(self._interval):
                with suppress(MemoryError):
                    self.sample()
        except BaseException as error:
            self._error = error

    def _stopped_in(self, seconds: float) -> bool:
        """Wait that long; whether the block has ended."""
        try:
            return self._stopping.wait(seconds)
        except MemoryError:
            time.sleep(seconds)
            return self._stopping.is_set()
