"""Requests to end a run early, and the errors that such a run ends with."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import TypeVar

from streamcnn.training.processes import Processes

T = TypeVar("T")
R = TypeVar("R")


class Terminated(Exception):
    """The run ended because of a signal or `Trainer.end`; its state is saved.

    Attributes
    ----------
    signal
        The signal's number; None if there was no signal.
    """

    def __init__(self, text: str, number: int | None = None) -> None:
        super().__init__(text)
        self.signal = number


class EndAsked(Exception):
    """The run was asked to end during validation; the state from before the validation is saved."""


class EndRequest:
    """A request to end the run, made to this process; the run looks at it between updates and batches."""

    def __init__(self) -> None:
        self.reason: str | None = None
        """What asked it; None as long as nothing has."""
        self.signal: int | None = None
        """The number of the signal that asked it."""

    @property
    def is_made(self) -> bool:
        """Whether there is such a request."""
        return self.reason is not None

    def require_none(self) -> None:
        """Raise if the run was asked to end.

        Raises
        ------
        EndAsked
            If it was.
        """
        if self.is_made:
            raise EndAsked

    def of_any(self, processes: Processes) -> EndRequest | None:
        """The request of the first process that has one, the same in all processes; None if none has."""
        return next((each for each in processes.gathered(self) if each.is_made), None)

    def divided(self, processes: Processes, work: Callable[[T], R], items: Sequence[T]) -> list[R]:
        """Results of ``work`` for all items, in their order; the processes divide the items among themselves.

        Raises
        ------
        EndAsked
            If a process is asked to end meanwhile.
        """
        found = processes.divided(lambda item: None if self.is_made else (work(item),), items)
        if self.of_any(processes) is not None:
            raise EndAsked
        return [each[0] for each in found if each is not None]

    def checked(self, processes: Processes, check: Callable[[Callable[[], None]], None]) -> None:
        """Have the first process run ``check``.

        Parameters
        ----------
        check
            Gets a function that it calls from time to time, which ends the check if the run was asked to end.

        Raises
        ------
        Terminated
            If any process was asked to end the run.
        """

        def check_until_asked() -> None:
            with suppress(EndAsked):
                check(self.require_none)

        processes.first(check_until_asked)
        asked = self.of_any(processes)
        if asked is not None:
            raise asked.to_error(None)

    def to_error(self, update: int | None) -> Terminated:
        """The error that ends the run after ``update``; None stands for a run that has not begun."""
        when = "before it began" if update is None else f"after update {update}; the state is saved"
        return Terminated(f"ended by {self.reason} {when}", self.signal)
