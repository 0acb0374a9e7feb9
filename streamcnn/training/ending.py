"""How a run is asked to end before it is over, and what it then ends with."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import TypeVar

from streamcnn.training.processes import Processes

T = TypeVar("T")
R = TypeVar("R")


class Terminated(Exception):
    """The run was asked to end, by a signal or by `Trainer.end`; its state is saved.

    Attributes
    ----------
    signal
        The number of the signal; None if it was no signal.
    """

    def __init__(self, text: str, number: int | None = None) -> None:
        super().__init__(text)
        self.signal = number


class EndAsked(Exception):
    """The run was asked to end during validation; what is saved is the state before it."""


class EndRequest:
    """Whether a process was asked to end the run, which looks between two updates and validation batches."""

    def __init__(self) -> None:
        self.reason: str | None = None
        """What asked it; None as long as nothing has."""
        self.signal: int | None = None
        """The number of the signal that asked it."""

    @property
    def is_made(self) -> bool:
        """Whether the run is to end."""
        return self.reason is not None

    def require_none(self) -> None:
        """End what may not go on once the run was asked to end.

        Raises
        ------
        EndAsked
            If it was.
        """
        if self.is_made:
            raise EndAsked

    def of_any(self, processes: Processes) -> EndRequest | None:
        """The first request that was made in any process, the same in all; None if none was."""
        return next((each for each in processes.gathered(self) if each.is_made), None)

    def divided(self, processes: Processes, work: Callable[[T], R], items: Sequence[T]) -> list[R]:
        """Results for all items, which processes divide, unless one is asked to end meanwhile.

        Raises
        ------
        EndAsked
            If one is.
        """
        found = processes.divided(lambda item: None if self.is_made else (work(item),), items)
        if self.of_any(processes) is not None:
            raise EndAsked
        return [each[0] for each in found if each is not None]

    def checked(self, processes: Processes, check: Callable[[Callable[[], None]], None]) -> None:
        """Have the first process check something, unless one is asked to end meanwhile.

        Parameters
        ----------
        check
            Calls what it is given now and then.

        Raises
        ------
        Terminated
            If one is.
        """

        def check_until_asked() -> None:
            with suppress(EndAsked):
                check(self.require_none)

        processes.first(check_until_asked)
        asked = self.of_any(processes)
        if asked is not None:
            raise asked.to_error(None)

    def to_error(self, update: int | None) -> Terminated:
        """What the run ends with after an update; None if it has not begun."""
        when = "before it began" if update is None else f"after update {update}; the state is saved"
        return Terminated(f"ended by {self.reason} {when}", self.signal)
