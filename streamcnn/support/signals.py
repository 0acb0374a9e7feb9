"""What a process does about the signals that ask it to end.

A signal that the process ignores when a block begins stays ignored, as under ``nohup``, or in the background
of a shell without job control. Only the main thread can be told; elsewhere nothing is done.

Three things do not bear an exception that comes from outside. zarr works in a thread of its own while the
main thread waits for it; interrupted there, the work would go on unwatched, in folders that are being cleared
away. pydantic's compiled part may print the exception and go on. So may compiled modules that are being
imported, and PyTorch's abort the process. What is raised waits until they return.
"""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Callable, Container, Iterator
from contextlib import contextmanager
from types import FrameType

SIGNALS = tuple(
    getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if name in signal.Signals.__members__
)
BY_SIGNAL = 128
"""Exit status of a process that a signal ended, less the signal's number."""

_UNINTERRUPTED = ("zarr", "pydantic", "importlib")

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


def leave_to_system() -> None:
    """Have `SIGNALS` end the process, with nothing said or cleared away; Python raises an error at SIGINT."""
    _set(_heeded(), signal.SIG_DFL)


@contextmanager
def heeding(end: Callable[[signal.Signals], None]) -> Iterator[None]:
    """Call ``end`` at the first of `SIGNALS` in the block, and raise at the second.

    Raises
    ------
    StoppedAtOnce
        At the second signal. A third has the system's own effect.
    """
    heeded, block = _heeded(), _block()

    def note(number: int, _: object) -> None:
        _set(heeded, stop)
        end(signal.Signals(number))

    def stop(number: int, frame: FrameType | None) -> None:
        _set(heeded, signal.SIG_DFL)
        _raise_outside(StoppedAtOnce(number), frame, block)

    with _handled(heeded, note):
        yield


@contextmanager
def raising(found: list[int], *, importers: tuple[str, ...] = ()) -> Iterator[None]:
    """Raise at the first of `SIGNALS` in the block, so that what it began is cleared away.

    Parameters
    ----------
    found
        The signal's number is put into it: whatever catches the error may raise another.
    importers
        Our packages that import what they need before they begin anything: a signal that comes meanwhile has
        the system's own effect, at once.

    Raises
    ------
    Stopped
        At the first signal. A second has the system's own effect.
    """
    heeded, block = _heeded(), _block()

    def stop(number: int, frame: FrameType | None) -> None:
        _set(heeded, signal.SIG_DFL)
        ours = [name for name in map(_module, _callers_of({"importlib"}, frame, block)) if _is_ours(name)]
        if ours and all(name.startswith(importers) for name in ours):
            signal.raise_signal(number)
        found.append(number)
        _raise_outside(Stopped(number), frame, block)

    with _handled(heeded, stop):
        yield


def _raise_outside(error: Stopped, frame: FrameType | None, block: FrameType) -> None:
    """Raise ``error`` in ``frame``, where a signal came, or in what called a library at work there."""
    callers = _callers_of(_UNINTERRUPTED, frame, block)
    if not callers:
        raise error

    def stop(*_: object) -> None:
        sys.settrace(None)
        raise error

    # A frame's own function is called only while something traces.
    callers[0].f_trace = stop
    sys.settrace(lambda *_: None)


def _callers_of(packages: Container[str], frame: FrameType | None, block: FrameType) -> list[FrameType]:
    """What called some packages that are at work in ``frame``, up to the ``block``; none if they are not.

    What runs the block itself does not count, such as the import of a script that trains.
    """
    frames = list(_outwards(frame, block))
    inside = [at for at, each in enumerate(frames[:-1]) if _module(each).partition(".")[0] in packages]
    return frames[inside[-1] + 1 :] if inside else []


def _outwards(frame: FrameType | None, last: FrameType) -> Iterator[FrameType]:
    """A frame and those that called it, up to the last."""
    while frame is not None:
        yield frame
        frame = None if frame is last else frame.f_back


def _module(frame: FrameType) -> str:
    return str(frame.f_globals.get("__name__", ""))


def _is_ours(module: str) -> bool:
    return module.startswith("streamcnn.")


def _block() -> FrameType:
    """The frame of the ``with`` statement, asked of by its context manager."""
    return sys._getframe(3)


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
