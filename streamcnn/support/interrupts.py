"""Clean-up that survives a ``KeyboardInterrupt`` at any line, even within the clean-up itself.

Python runs signal handlers between any two lines of the main thread. So a ``finally`` alone is not enough: it
may be interrupted half-way, or before it has begun. Each clean-up is therefore written so that it can run
twice, and does: the second run finishes the first, and most often does nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")


def cleaning_up(run: Callable[[], T], clean_up: Callable[[], object]) -> T:
    """Return ``run()``; call ``clean_up`` in any case, twice."""
    try:
        try:
            return run()
        finally:
            clean_up()
    finally:
        clean_up()


def undoing(run: Callable[[], T], undo: Callable[[], object]) -> T:
    """Return ``run()``; if it raises, call ``undo`` twice."""
    try:
        try:
            return run()
        except BaseException:
            undo()
            raise
    except BaseException:
        undo()
        raise
