"""Cleaning up although ``KeyboardInterrupt`` may come at any line, that of the clean-up itself among them.

Python runs signal handlers between any two lines of the main thread. A ``finally`` alone is therefore not
enough: what it does may be interrupted half-way, or before it has begun. So each clean-up can be done twice,
and is: the second time does what is left of it, most often nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")


def cleaning_up(run: Callable[[], T], clean_up: Callable[[], object]) -> T:
    """What ``run`` returns; ``clean_up`` is called in any case, and once more."""
    try:
        try:
            return run()
        finally:
            clean_up()
    finally:
        clean_up()


def undoing(run: Callable[[], T], undo: Callable[[], object]) -> T:
    """What ``run`` returns; if it raises, ``undo`` is called, and once more."""
    try:
        try:
            return run()
        except BaseException:
            undo()
            raise
    except BaseException:
        undo()
        raise
