"""Overlapping caps: the lowest is in force, and the user's own comes back after the last.

``KeyboardInterrupt`` may come at any line. Callers that clean up repeat their changes, so each change may be
made twice, and no interrupt leaves the lock taken.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import suppress
from threading import RLock
from typing import Any, Generic, TypeVar
from weakref import WeakSet

from streamcnn.ceiling.children import Start

N = TypeVar("N", bound=float)


class LowestCap(Generic[N]):
    """The caps of all threads and the user's own, of which the system gets the lowest.

    A forked child has the user's own cap alone. So has a program that is announced to ``begin_start``: no
    other cap is in force while it is being started.

    Parameters
    ----------
    read, write
        Functions that return the system's present cap, and set it.
    """

    def __init__(self, read: Callable[[], N], write: Callable[[N], None]) -> None:
        self._read = read
        self._write = write
        self._lock: Any = RLock()
        self._caps: dict[object, N] = {}
        self._own: N | None = None
        """The user's own cap; None while there are no others, when it is the system's present one."""
        self._starts: list[Start] = []
        """Programs that are being started."""
        _all.add(self)

    @property
    def own(self) -> N:
        """The cap that the user has set."""
        own = self._own
        return self._read() if own is None else own

    def put(self, owner: object, cap: N) -> None:
        """Set ``owner``'s cap to ``cap`` until it is dropped."""

        def change() -> None:
            if self._own is None:
                self._own = self._read()
            self._caps[owner] = cap

        self._exclusively(change)

    def move(self, owner: object, cap: N) -> None:
        """Change ``owner``'s cap, if it has one."""

        def change() -> None:
            if owner in self._caps:
                self._caps[owner] = cap

        self._exclusively(change)

    def drop(self, owner: object) -> None:
        """Remove ``owner``'s cap. Doing so again does nothing."""
        self._exclusively(lambda: self._caps.pop(owner, None))

    def settle(self) -> None:
        """Restore the lowest cap once a program has been started. Call this every few milliseconds."""
        if self._starts:
            self._exclusively(lambda: None)

    def begin_start(self, start: Start) -> None:
        """Lift all caps until a program has been started."""
        if self._caps:
            self._exclusively(lambda: self._starts.append(start))

    def _exclusively(self, change: Callable[[], object]) -> None:
        """Make a change and set the system's cap to the lowest, one thread at a time."""
        # Twice: an interrupt in the first release leaves the lock to the second.
        try:
            try:
                self._lock.acquire()
                change()
                self._apply()
            finally:
                if self._lock._is_owned():
                    self._lock.release()
        finally:
            if self._lock._is_owned():
                self._lock.release()

    def _apply(self) -> None:
        """Set the system's cap to the lowest one."""
        if self._own is None:
            return
        self._starts = [start for start in self._starts if not start.is_over()]
        lowest = self._own if self._starts else min([self._own, *self._caps.values()])
        if lowest != self._read():
            self._write(lowest)
        if not self._caps:
            self._own = None
            self._starts.clear()

    def _forget(self) -> None:
        """Give a forked child the user's own cap, and a new lock, as its holder may not exist there."""
        self._lock = RLock()
        self._caps.clear()
        self._starts.clear()
        # There is no CUDA in a child: PyTorch refuses to read or change a card's settings there.
        with suppress(RuntimeError):
            self._apply()


_all: WeakSet[LowestCap[Any]] = WeakSet()


def _after_fork() -> None:
    for cap in list(_all):
        cap._forget()


os.register_at_fork(after_in_child=_after_fork)
