"""Programs that are started while a cap is in force, which are to have the user's own.

A program inherits the soft limits that hold where it is started, and keeps them. Python tells of a start just
before it (an audit event), on the thread that makes it, and not when it is over: that is seen from the calls
that this thread is in. Not told of, and so not seen, are the programs that ``multiprocessing`` starts for its
methods *spawn* and *forkserver*, and those that compiled code starts.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass
from types import FrameType
from typing import Any

_STARTS = {"subprocess.Popen": True, "os.posix_spawn": False, "os.system": False}
"""Events, and whether the call that tells of the start goes on to make it; else what it calls next does."""


@dataclass(frozen=True, slots=True)
class Start:
    """A program's start, which a thread is at."""

    thread: int
    caller: FrameType
    instruction: int | None
    """Where the caller was, if the start is over as soon as it goes on; None if only its end tells."""

    def is_over(self) -> bool:
        """Whether the program has been started, or has failed to."""
        frame = sys._current_frames().get(self.thread)
        while frame is not None and frame is not self.caller:
            frame = frame.f_back
        return frame is None or self.instruction not in (None, frame.f_lasti)


def watch_starts(begin: Callable[[Start], object]) -> None:
    """Call ``begin`` before every start of a program, on its thread, for the rest of the process."""

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if event in _STARTS:
            caller = sys._getframe(1)
            begin(Start(threading.get_ident(), caller, None if _STARTS[event] else caller.f_lasti))

    sys.addaudithook(hook)
