"""Programs that are started while a cap is in force, and should get the user's own cap.

A program inherits the soft limits in force when it is started, and keeps them. Python announces a start just
before it, by an audit event on the starting thread, but not its end: that is seen from the thread's call
stack. Python does not announce the programs that ``multiprocessing`` starts for its methods *spawn* and
*forkserver*, nor those that compiled code starts, so these are not seen.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass
from types import FrameType
from typing import Any

_STARTS = {"subprocess.Popen": True, "os.posix_spawn": False, "os.system": False}
"""Audit events: true if the start is over once the Python function that raised the event returns, false if
once that function's present call has returned."""


@dataclass(frozen=True, slots=True)
class Start:
    """A program's start, in progress on a thread."""

    thread: int
    caller: FrameType
    instruction: int | None
    """The caller's instruction, if the start is over once the caller moves on; None if once it returns."""

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
