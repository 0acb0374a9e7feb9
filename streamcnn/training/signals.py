"""What a run does about the signals that ask it to end: save at the first, stop at once at the second."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

SIGNALS = tuple(
    getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if name in signal.Signals.__members__
)


class StoppedAtOnce(KeyboardInterrupt):
    """A second signal came before the run had saved; the newest checkpoint is the one before.

    Attributes
    ----------
    signal
        Its number.
    """

    def __init__(self, number: int) -> None:
        super().__init__(f"stopped at once by a second signal, {signal.Signals(number).name}")
        self.signal = number


@contextmanager
def heeding(end: Callable[[signal.Signals], None]) -> Iterator[None]:
    """Call ``end`` at the first of `SIGNALS` in the block, and raise at the second.

    A signal that the process ignores when the block begins stays ignored, as under ``nohup``, or in the
    background of a shell without job control. Only the main thread can be told; elsewhere nothing is heeded.

    Raises
    ------
    StoppedAtOnce
        At the second signal. After that the system's own dispositions hold.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.getsignal(number) for number in SIGNALS}
    # None is a handler that was not set from Python and cannot be put back.
    heeded = [number for number, handler in before.items() if handler not in (signal.SIG_IGN, None)]

    def note(number: int, _: object) -> None:
        for each in heeded:
            signal.signal(each, stop)
        end(signal.Signals(number))

    def stop(number: int, _: object) -> None:
        for each in heeded:
            signal.signal(each, signal.SIG_DFL)
        raise StoppedAtOnce(number)

    try:
        for number in heeded:
            signal.signal(number, note)
        yield
    finally:
        for number in heeded:
            signal.signal(number, before[number])
