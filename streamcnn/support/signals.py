"""Handling of the signals that ask a process to end.

A signal that the process ignores when a block begins stays ignored, as under ``nohup``, or in the background
of a shell without job control. Only the main thread gets signals; in others, the blocks do nothing.

An exception from outside must not be raised in three places. zarr works in a thread of its own while the main
thread waits: its work would continue unobserved, in folders that are being removed. pydantic's compiled part
may print the exception and continue. So may compiled modules during import, and PyTorch's may abort the
process. So we raise only after these have returned.
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
"""Exit status of a process that a signal ended, minus the signal's number."""

_UNINTERRUPTED = ("zarr", "pydantic", "importlib")

_Handler = Callable[[int, FrameType | None], object]


class Stopped(KeyboardInterrupt):
    """A signal asked the process to end.

    Attributes
    ----------
    signal
        The signal's number.
    """

    def __init__(self, number: int, text: str = "") -> None:
        super().__init__(text or f"ended by {signal.Signals(number).name}")
        self.signal = number


class StoppedAtOnce(Stopped):
    """A second signal came before the run had saved; the newest checkpoint is from before the first."""

    def __init__(self, number: int) -> None:
        super().__init__(number, f"stopped at once by a second signal, {signal.Signals(number).name}")


def leave_to_system() -> None:
    """Let `SIGNALS` end the process silently and without clean-up; by default Python raises at SIGINT."""
    _set(_heeded(), signal.SIG_DFL)


@contextmanager
def heeding(end: Callable[[signal.Signals], None]) -> Iterator[None]:
    """Call ``end`` on the first of `SIGNALS` in the block, and raise on the second.

    Raises
    ------
    StoppedAtOnce
        On the second signal. A third has the system's default effect.
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
    """Raise on the first of `SIGNALS` in the block, so that its clean-up runs.

    Parameters
    ----------
    found
        Gets the signal's number, as code that catches the error may raise another.
    importers
        Our packages that import what they need before they begin anything: a signal during these imports has
        the system's default effect, at once.

    Raises
    ------
    Stopped
        On the first signal. A second has the system's default effect.
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
    """Raise ``error`` in ``frame``, where a signal came, or in the caller of a library running there."""
    callers = _callers_of(_UNINTERRUPTED, frame, block)
    if not callers:
        raise error

    def stop(*_: object) -> None:
        sys.settrace(None)
        raise error

    # A frame's trace function is called only while tracing is on.
    callers[0].f_trace = stop
    sys.settrace(lambda *_: None)


def _callers_of(packages: Container[str], frame: FrameType | None, block: FrameType) -> list[FrameType]:
    """The frames from the callers of ``packages`` running in ``frame`` to ``block``; empty if none runs.

    Packages that run the block itself do not count, such as the import of a script that trains.
    """
    frames = list(_outwards(frame, block))
    inside = [at for at, each in enumerate(frames[:-1]) if _module(each).partition(".")[0] in packages]
    return frames[inside[-1] + 1 :] if inside else []


def _outwards(frame: FrameType | None, last: FrameType) -> Iterator[FrameType]:
    """A frame and its callers, up to ``last``."""
    while frame is not None:
        yield frame
        frame = None if frame is last else frame.f_back


def _module(frame: FrameType) -> str:
    return str(frame.f_globals.get("__name__", ""))


def _is_ours(module: str) -> bool:
    return module.startswith("streamcnn.")


def _block() -> FrameType:
    """The frame of the ``with`` statement whose context manager calls this."""
    return sys._getframe(3)


def _heeded() -> list[signal.Signals]:
    """The signals that this thread can handle and that are not ignored."""
    if threading.current_thread() is not threading.main_thread():
        return []
    # None stands for a handler that was not set from Python and cannot be restored.
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
