"""How a run is asked to end before it is over, and what it then ends with."""

from __future__ import annotations


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
    """Whether a run was asked to end; the run looks between two updates and two validation batches."""

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

    def to_error(self, update: int | None) -> Terminated:
        """What the run ends with after an update; None if it has not begun."""
        when = "before it began" if update is None else f"after update {update}; the state is saved"
        return Terminated(f"ended by {self.reason} {when}", self.signal)
