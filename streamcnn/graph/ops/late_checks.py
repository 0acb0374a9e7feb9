"""Checks of values on a GPU, deferred to the end of a block, where the host synchronises once."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

Check = Callable[[list[int]], object]


class _Pending(threading.local):
    """The checks of this thread's block; None outside of one."""

    checks: list[tuple[Tensor, Check]] | None = None


_pending = _Pending()


@contextmanager
def checked_at_the_end() -> Iterator[None]:
    """Defer the block's checks to its end; if the block raises, they are dropped."""
    outer, _pending.checks = _pending.checks, []
    try:
        yield
        _make(_pending.checks)
    finally:
        _pending.checks = outer


def check_late(values: Tensor, check: Check) -> None:
    """Call ``check``, which raises if a value is not allowed: at once, or at the end of a block around it.

    Its argument is ``values``, integers (n,), which are copied from the GPU together with those of all
    checks.
    """
    if _pending.checks is None:
        _make([(values, check)])
    else:
        _pending.checks.append((values, check))


def _make(checks: list[tuple[Tensor, Check]]) -> None:
    if checks:
        found = iter(torch.cat([values for values, _ in checks]).tolist())
        for values, check in checks:
            check([next(found) for _ in range(len(values))])
