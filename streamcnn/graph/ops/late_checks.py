"""Checks of values on a GPU, for which the host waits once, at the end of a block."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager


class _Pending(threading.local):
    """The checks of this thread's block; None outside of one."""

    checks: list[Callable[[], None]] | None = None


_pending = _Pending()


@contextmanager
def checked_at_the_end() -> Iterator[None]:
    """Run a block in which checks wait for its end; one that fails makes none of them."""
    outer, _pending.checks = _pending.checks, []
    try:
        yield
        for check in _pending.checks:
            check()
    finally:
        _pending.checks = outer


def check_late(check: Callable[[], None]) -> None:
    """Call ``check``, which raises if a value is not allowed: at once, or at the end of the block around."""
    if _pending.checks is None:
        check()
    else:
        _pending.checks.append(check)
