"""What a process does about the signals that ask it to end.

A signal that the process ignores when a block begins stays ignored, as under ``nohup``, or in the background
of a shell without job control. Only the main thread can be told; elsewhere nothing is done.

Two libraries do not bear an exception that comes from outside. zarr works in a thread of its own while the
main thread waits for it; interrupted there, the work would go on unwatched, in folders that are being cleared
away. pydantic's compiled part may print the exception and go on. What is raised waits until they return.
"""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

SIGNALS = tuple(
    getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if name in signal.Signals.__members__
)
BY_SIGNAL = 128
"""Exit status of a process that a signal ended, less the signal's number."""

_UNINTERRUPTED = ("zarr", "pydantic")

_Handler = Callable[[int, FrameType | None], object]


class Stopped(KeyboardInterrupt):
    """A signal asked the process to end.

    Attributes
    ----------
    signal
        Its number.
    """

    def __init__(self, number: int, text: str = "") -> None:
        super().__init__(text or f"ended by {signal.Signals(number).name}")
        self.signal = number


class StoppedAtOnce(Stopped):
    """A second signal came before the run had saved; the newest checkpoint is the one before."""

    def __init__(self, number: int) -> None:
        super().__init__(number, f"stopped at once by a second signal, {signal.Signals(number).name}")


@contextmanager
def heeding(end: Callable[[signal.Signals], None]) -> Iterator[None]:
    """Call ``end`` at the first of `SIGNALS` in the block, and raise at the second.

    Raises
    ------
    StoppedAtOnce
        At the second signal. A third has the system's own effect.
    """
    heeded = _heeded()

    def note(number: int, _: object) -> None:
        _set(heeded, stop)
        end(signal.Signals(number))

    def stop(number: int, frame: FrameType | None) -> None:
        _set(heeded, signal.SIG_DFL)
        _raise_outside(StoppedAtOnce(number), frame)

    with _handled(heeded, note):
        yield


@contextmanager
def raising() -> Iterator[list[int]]:
    """Raise at the first of `SIGNALS` in the block, so that what it began is cleared away.

    Yields
    ------
    A list that the signal's number is put into: whatever catches the error may raise another.

    Raises
    ------
    Stopped
        At the first signal. A second has the system's own effect.
    """
    heeded, found = _heeded(), list[int]()

    def stop(number: int, frame: FrameType | None) -> None:
        _set(heeded, signal.SIG_DFL)
        found.append(number)
        _raise_outside(Stopped(number), frame)

    with _handled(heeded, stop):
        yield found


def _raise_outside(error: Stopped, frame: FrameType | None) -> None:
    """Raise ``error`` in ``frame``, where a signal came, or in what called a library at work there."""
    frames = list(_outwards(frame))
    inside = [at for at, each in enumerate(frames) if _package(each) in _UNINTERRUPTED]
    if not inside or inside[-1] + 1 == len(frames):
        raise error

    def stop(*_: object) -> None:
        sys.settrace(None)
        raise error

    # A frame's own function is called only while something traces.
    frames[inside[-1] + 1].f_trace = stop
    sys.settrace(lambda *_: None)


def _outwards(frame: FrameType | None) -> Iterator[FrameType]:
    while frame is not None:
        yield frame
        frame = frame.f_back


def _package(frame: FrameType) -> str:
    return str(frame.f_globals.get("__name__", "")).partition(".")[0]


def _heeded() -> list[signal.Signals]:
    """The signals that this thread can be told of, and that are not ignored."""
    if threading.current_thread() is not threading.main_thread():
        return []
    # None is a handler that was not set from Python and cannot be put back.
    return [number for number in SIGNALS if signal.getsignal(number) not in (signal.SIG_IGN, None)]


@contextmanager
def _handled(numbers: list[signal.Signals], handler: _Handler) -> Iterator[None]:
    before = {number: signal.getsignal(number) for number in numbers}
    try:
        _set(numbers, handler)
        yield
    finally:
        for number in numbers:
            signal.signal(number, before[number])


def _set(numbers: list[signal.Signals], handler: _Handler | signal.Handlers) -> None:
    for number in numbers:
        signal.signal(number, handler)
