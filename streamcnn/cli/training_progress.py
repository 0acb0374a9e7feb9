"""A training run on the terminal: progress with memory against the budget, or plain lines elsewhere."""

from __future__ import annotations

from collections.abc import Mapping
from types import TracebackType
from typing import Any, Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from streamcnn.training import Trainer
from streamcnn.units import format_bytes


class TrainingProgress:
    """Shows what a trainer does while the block runs.

    Parameters
    ----------
    trainer
        Whose listener this becomes.
    budget
        Bytes that a pass may hold, if there is a ceiling.
    console
        Where to print.
    """

    def __init__(self, trainer: Trainer, budget: int | None, console: Console) -> None:
        self._trainer = trainer
        self._budget = budget
        self._console = console
        columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn()
        self._progress = Progress(
            *columns,
            TimeRemainingColumn(),
            TextColumn("{task.fields[speed]}"),
            console=console,
            disable=not console.is_terminal,
        )
        total = trainer.settings.epochs * trainer.updates_per_epoch
        self._updates = self._progress.add_task("updates", total=total, speed="")
        trainer.listener = self._listen

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._progress.stop()

    def _listen(self, kind: str, values: Mapping[str, Any]) -> None:
        (self._show_update if kind == "update" else self._print_epoch)(values)

    def _show_update(self, values: Mapping[str, Any]) -> None:
        description = f"epoch {values['epoch'] + 1}, loss {values['loss']:.3f}{self._held(values)}"
        self._progress.update(
            self._updates,
            completed=self._trainer.progress.update,
            description=description,
            speed=f"{values['megapixels_per_second']:.2g} megapixels/s",
        )

    def _held(self, values: Mapping[str, Any]) -> str:
        """Memory of the update, with a bar against the budget."""
        measured = values["measured_bytes"]
        if measured is None:
            return ""
        if self._budget is None:
            return f", memory {format_bytes(measured)}"
        filled = min(round(10 * measured / self._budget), 10)
        return f", memory {'█' * filled}{'░' * (10 - filled)} {measured / self._budget:.0%}"

    def _print_epoch(self, values: Mapping[str, Any]) -> None:
        self._progress.console.print(
            f"epoch {values['epoch'] + 1}: loss {values['loss']:.4f}, accuracy {values['accuracy']:.1%}; "
            f"validation {values['validation_loss']:.4f}, {values['validation_accuracy']:.1%}",
            soft_wrap=True,
            highlight=False,
        )
