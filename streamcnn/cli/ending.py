"""The message and the exit status of a command that a signal ends."""

from __future__ import annotations

import contextlib
import os
import signal
import stat
from collections.abc import Iterator
from contextlib import contextmanager

from streamcnn.support.signals import BY_SIGNAL
from streamcnn.support.text import printable

_OUTPUT, _ERRORS = 1, 2


def say_ending(number: int | None, text: str) -> None:
    """Write a line on standard error; safe in a signal's handler.

    It does not use ``sys.stderr``, which the signal may have interrupted in a write. If the terminal has hung
    up, all later output to it is dropped.
    """
    if number == getattr(signal, "SIGHUP", None):
        _leave_terminal()
    # The reader may be gone, which must not prevent saving and cleaning up.
    with contextlib.suppress(OSError):
        os.write(_ERRORS, printable(f"streamcnn: {text}").encode() + b"\n")


@contextmanager
def keeping(what: str) -> Iterator[None]:
    """Say what remains if a signal interrupts the block."""
    try:
        yield
    except KeyboardInterrupt as ended:
        say_ending(getattr(ended, "signal", None), f"{what} are kept; the same command goes on")
        raise


def status_of(number: int | None) -> int:
    """The shells' exit status for a command that a signal ended; 1 if there was no signal."""
    return 1 if number is None else BY_SIGNAL + number


def leave_output() -> None:
    """Drop all further output to standard output, which has failed, and what is buffered."""
    _leave(_OUTPUT)


def _leave_terminal() -> None:
    for descriptor in (_OUTPUT, _ERRORS):
        with contextlib.suppress(OSError):  # it is closed
            if stat.S_ISCHR(os.fstat(descriptor).st_mode):
                _leave(descriptor)


def _leave(descriptor: int) -> None:
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, descriptor)
    os.close(nowhere)
