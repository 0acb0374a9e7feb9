"""What a command that a signal ends says to whom, and its exit status."""

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
    """Write a line on standard error, from a signal's handler too.

    Not through ``sys.stderr``, which the signal may have interrupted in a write. A terminal that has hung up
    is written to no more, by whatever is still to come.
    """
    if number == getattr(signal, "SIGHUP", None):
        _leave_terminal()
    # Whoever read it may be gone, and what is to be saved or cleared away is not to be lost for that.
    with contextlib.suppress(OSError):
        os.write(_ERRORS, printable(f"streamcnn: {text}").encode() + b"\n")


@contextmanager
def keeping(what: str) -> Iterator[None]:
    """Say what stays of a command that is interrupted in the block."""
    try:
        yield
    except KeyboardInterrupt as ended:
        say_ending(getattr(ended, "signal", None), f"{what} are kept; the same command goes on")
        raise


def status_of(number: int | None) -> int:
    """The exit status of a command that a signal ended, as shells have it; 1 if it was no signal."""
    return 1 if number is None else BY_SIGNAL + number


def leave_output() -> None:
    """Write nothing more on standard output, which has failed: not even what is left of it."""
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
