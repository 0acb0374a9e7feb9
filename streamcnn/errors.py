"""The errors that streamcnn raises for causes that a user can change.

Each error also inherits the built-in error that a caller would catch. Broken invariants of our own are plain
assertions instead.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

_MOST_WORD, _MOST_TEXT = 1000, 4000
_LONG_WORD = re.compile(rf"\S{{{_MOST_WORD + 1},}}")


class StreamError(Exception):
    """Base of all errors raised by streamcnn.

    An error's text names what was found. It stays readable whatever a file holds: words of more than 1000
    characters and texts of more than 4000 are shown without their middle.
    """

    def __init__(self, text: str = "") -> None:
        words = _LONG_WORD.sub(lambda word: _without_middle(word[0], _MOST_WORD), text)
        super().__init__(_without_middle(words, _MOST_TEXT))


def _without_middle(text: str, most: int) -> str:
    """``text``, without its middle if it is longer than ``most`` characters."""
    if len(text) <= most:
        return text
    return f"{text[: most * 3 // 4]}…{text[len(text) - most // 4 + 1 :]}"


class PlanDoesNotFit(StreamError, MemoryError):
    """No plan stays within the budget, or the disk has no room for it; raised before the first allocation."""


class BudgetExceeded(StreamError, MemoryError):
    """An allocation went past the budget while a plan was carried out."""


class UnsupportedModel(StreamError, NotImplementedError):
    """The model does something that cannot be streamed exactly."""


class CorruptImage(StreamError, OSError):
    """An image cannot be read, or holds values that no image has."""


class DatasetMismatch(StreamError, ValueError):
    """Data differs from what the model, the manifest or the other images say."""


class DamagedCheckpoint(StreamError, OSError):
    """A checkpoint's bytes are not those that were written."""


class RunMismatch(StreamError, ValueError):
    """A run cannot be resumed with another model, other data or other settings than it began with."""


class UntrustedModel(StreamError, PermissionError):
    """A file names code to run that the caller has not allowed."""


class FactoryFailed(StreamError, RuntimeError):
    """The user's function that makes a model raised an error, which is this error's cause."""


class RatesUnusable(StreamError, OSError):
    """The file that keeps this machine's rates can be neither read nor written."""


class RunInUse(StreamError, BlockingIOError):
    """Another process trains in the run's folder."""


class CannotWrite(StreamError, OSError):
    """The disk is full, or a folder may not be written to."""


class OtherProcessFailed(StreamError, RuntimeError):
    """Another of the processes that train together has failed, which ends this one too.

    Attributes
    ----------
    rank
        Rank of the process that raises the error that happened; None if it is gone.
    """

    def __init__(self, text: str = "", *, rank: int | None = None) -> None:
        super().__init__(text)
        self.rank = rank


class TrainingDiverged(StreamError, ArithmeticError):
    """The loss is no longer a finite number."""


def some(names: Sequence[str]) -> str:
    """The first five of ``names`` and how many more there are, for an error's text."""
    shown = ", ".join(map(repr, names[:5]))
    return shown if len(names) <= 5 else f"{shown} and {len(names) - 5} more"
