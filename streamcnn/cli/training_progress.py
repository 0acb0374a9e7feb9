"""A training run on the terminal: progress with memory against the budget, or plain lines elsewhere."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, Self

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TextColumn,
    TimeRemainingColumn,
)
from rich.table import Table

from streamcnn.cli.terminal import fits
from streamcnn.support.units import format_bytes

if TYPE_CHECKING:
    from streamcnn.training import Trainer


class _Fitting(Progress):
    """Progress in lines no wider than the terminal: a narrow one shows only the columns that matter most.

    Parameters
    ----------
    least_first
        Columns that may be left out, in this order.
    """

    def __init__(
        self, *columns: ProgressColumn, least_first: Iterable[ProgressColumn], console: Console, disable: bool
    ) -> None:
        self._every, self._least_first, self._terminal = columns, tuple(least_first), console
        super().__init__(*columns, console=console, disable=disable)

    def make_tasks_table(self, tasks: Iterable[Task]) -> Table:
        """A table of the columns that fit."""
        shown, least_first = [*self._every], iter(self._least_first)
        tasks = [*tasks]
        while True:
            self.columns = tuple(shown)
            table = super().make_tasks_table(tasks)
            column = None if fits(table, self._terminal) else next(least_first, None)
            if column is None:
                return table
            shown.remove(column)


class TrainingProgress:
    """Shows what a trainer does while the block runs.

    Parameters
    ----------
    trainer
        The trainer, whose listener this becomes.
    budget
        Bytes that a pass may hold, if there is a ceiling.
    console
        The console to print on.
    """

    def __init__(self, trainer: Trainer, budget: int | None, console: Console) -> None:
        self._trainer = trainer
        self._budget = budget
        self._console = console
        text, bar, count, left = (
            TextColumn("{task.description}"),
            BarColumn(20),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
        )
        memory, speed = TextColumn("{task.fields[memory]}"), TextColumn("{task.fields[speed]}")
        self._progress = _Fitting(
            *(text, bar, count, left, memory, speed),
            least_first=(bar, speed, left, memory),
            console=console,
            disable=not console.is_terminal,
        )
        total = trainer.settings.epochs * trainer.updates_per_epoch
        self._updates = self._progress.add_task("first update", total=total, memory="", speed="")
        trainer.listener = self._listen

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._progress.stop()

    def _listen(self, kind: str, values: Mapping[str, Any]) -> None:
        (self._show_update if kind == "update" else self._print_epoch)(values)

    def _show_update(self, values: Mapping[str, Any]) -> None:
        self._progress.update(
            self._updates,
            completed=self._trainer.progress.update,
            description=f"epoch {values['epoch'] + 1}, loss {values['loss']:.3f}",
            memory=self._held(values),
            speed=f"{values['megapixels_per_second']:.2g} megapixels/s",
        )

    def _held(self, values: Mapping[str, Any]) -> str:
        """The update's peak memory as text, with a bar against the budget."""
        measured = values["measured_bytes"]
        if measured is None:
            return ""
        if self._budget is None:
            return format_bytes(measured)
        filled = min(round(10 * measured / self._budget), 10)
        share = measured / self._budget
        return f"{'█' * filled}{'░' * (10 - filled)} {share:.0%} of {format_bytes(self._budget)}"

    def _print_epoch(self, values: Mapping[str, Any]) -> None:
        self._progress.console.print(
            f"epoch {values['epoch'] + 1}: {self._trainer.task.told(values)}",
            soft_wrap=True,
            highlight=False,
        )
