"""Records resident memory over the time of one update, together with the part that runs."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Self

from streamcnn.ceiling.process import resident_bytes
from streamcnn.execution.executor import PassEvent
from streamcnn.profiling.timeline import BETWEEN, GLOBAL_VALUES, TAIL, Sample, Span, Timeline, thin

_INTERVAL = 0.01
"""Seconds between readings at first; a reading takes some 0.1 ms."""
MOST_HELD = 4096
"""Largest number of samples while recording; their own memory, below 1 MB, is measured too."""
_MOST_KEPT = 300
"""Number of intervals with one sample each in a timeline; besides, each span keeps a sample."""

ReadMemory = Callable[[], tuple[int, int] | None]


class Recorder:
    """Samples resident memory while entered; :meth:`observe` gets the events of the pass.

    Memory is also read at every event, so that the time between two readings belongs to one part. A peak
    between readings shows in the kernel's high-water mark if it is the process's highest so far; if the mark
    has risen, it is the sample. The kernel counts pages for each core and adds them only now and then, so two
    readings may differ by some hundred KiB.

    Parameters
    ----------
    tail
        Level of the segment that is the resident tail; None if there is none.
    read
        Returns the resident bytes now and their high-water mark.
    """

    def __init__(self, tail: int | None, read: ReadMemory = resident_bytes) -> None:
        self._tail = tail
        self._read = read
        self._lock = threading.Lock()
        self._stopped = threading.Event()
        self._sampler = threading.Thread(target=self._sample, name="memory-sampler", daemon=True)
        self._interval = _INTERVAL
        self._spans: list[Span] = []
        self._samples: list[Sample] = []
        self._began: float | None = None
        self._mark: int | None = None
        self._is_open = False

    def __enter__(self) -> Self:
        self._sampler.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._stopped.set()
        self._sampler.join()

    def observe(self, event: PassEvent) -> None:
        """Note that a part begins or ends; an observer for a streamed model."""
        with self._lock:
            now = time.perf_counter()
            self._began = now if self._began is None else self._began
            moment = now - self._began
            if event.begins:
                self._close(moment)
                self._open(self._part(event), event.level, event.direction, moment)
                self._take(moment)
            else:
                self._take(moment)
                self._close(moment)

    def timeline(self, baseline_bytes: int) -> Timeline | None:
        """The recorded timeline, in bytes above the baseline; None if memory cannot be read."""
        if not self._samples:
            return None
        width = self._spans[-1].stop / _MOST_KEPT or 1.0
        kept = thin(self._samples, width)
        return Timeline(
            spans=tuple(self._spans),
            running=tuple(sample.span for sample in kept),
            seconds=tuple(sample.seconds for sample in kept),
            nbytes=tuple(sample.nbytes - baseline_bytes for sample in kept),
        )

    def _sample(self) -> None:
        while not self._stopped.wait(self._interval):
            with self._lock:
                if self._began is None:
                    continue
                moment = time.perf_counter() - self._began
                if not self._is_open:
                    if moment - self._spans[-1].stop < self._interval:
                        continue  # the moment between two parts is not a part itself
                    self._open(BETWEEN, self._spans[-1].level, "", self._spans[-1].stop)
                self._take(moment)

    def _part(self, event: PassEvent) -> str:
        if event.part != "segment":
            return event.part
        return TAIL if event.level == self._tail else GLOBAL_VALUES

    def _open(self, part: str, level: int, direction: str, moment: float) -> None:
        self._spans.append(Span(part, level, direction, moment, moment))
        self._is_open = True

    def _close(self, moment: float) -> None:
        if self._is_open:
            span = self._spans[-1]
            self._spans[-1] = Span(span.part, span.level, span.direction, span.start, moment)
            self._is_open = False

    def _take(self, moment: float) -> None:
        reading = self._read()
        if reading is None:
            return
        resident, mark = reading
        known, self._mark = self._mark, mark
        nbytes = resident if known is None or known == mark else max(resident, mark)
        self._samples.append(Sample(len(self._spans) - 1, moment, nbytes))
        if len(self._samples) > MOST_HELD:
            self._interval *= 2
            self._samples = thin(self._samples, 2 * moment / MOST_HELD)
