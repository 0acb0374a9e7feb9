"""The command ``train``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from streamcnn.cli.arguments import Model, exit_for_wrong_usage
from streamcnn.cli.ending import say_ending, status_of
from streamcnn.cli.option_groups import with_option_groups
from streamcnn.cli.processes import joined
from streamcnn.cli.training_options import RunOptions, SettingsOptions
from streamcnn.cli.training_progress import TrainingProgress
from streamcnn.errors import StreamError
from streamcnn.support.extras import require
from streamcnn.support.text import as_text
from streamcnn.support.units import plural

if TYPE_CHECKING:
    from streamcnn.training import Trainer, TrainResult

Data = Annotated[
    str, typer.Argument(metavar="DATA", help="Tile store, CSV file, or folder of classes or of images.")
]


@with_option_groups
def train(
    model: Model,
    data: Data,
    out: Annotated[Path, typer.Option(help="Folder of the run; an existing run is resumed.")],
    run: RunOptions,
    settings: SettingsOptions,
    tensorboard: Annotated[bool, typer.Option("--tensorboard", help="Write events too.")] = False,
) -> None:
    """Train a model on whole images; the same command goes on with a run that was interrupted.

    At SIGINT (Ctrl-C), SIGTERM or SIGHUP it saves its state and ends with exit status 130, 143 or 129; at a
    second one it ends at once.

    In several processes, of which each makes --accumulate forward passes of --batch images for an update:
    torchrun --nproc-per-node 4 -m streamcnn train ...
    """
    make_config = run.config(model, data, settings)
    with joined() as processes:
        try:
            from streamcnn.support.processes import take_own_gpu

            with processes.agreeing():
                take_own_gpu(run.device)
                config = make_config()
                require("matplotlib.figure", extra="plots")  # fail now rather than after the run
                from streamcnn.training import make_trainer

                trainer = make_trainer(config, out, events=tensorboard)
        except StreamError:
            raise  # the files are at fault, not the command
        except ValueError as error:
            exit_for_wrong_usage(str(error))
        # The first process prints for all.
        console = Console(quiet=not processes.is_first)
        if processes.count > 1:
            size = trainer.settings.images_per_update
            console.print(f"{processes.count} processes, updates of {plural(size, 'image')}", highlight=False)
        result = _run(trainer, config.budget, console)
        processes.first(lambda: _print_result(trainer, result, out, console))


def _run(trainer: Trainer, budget: int | None, console: Console) -> TrainResult:
    """Train with progress on the terminal."""
    from streamcnn.training import StoppedAtOnce, Terminated

    say = (lambda number, text: None) if console.quiet else say_ending
    trainer.on_end = lambda reason, number: say(
        number, f"{reason}: saving after the present update; once more stops at once"
    )
    try:
        with TrainingProgress(trainer, budget, console):
            return trainer.run()
    except (Terminated, StoppedAtOnce) as ended:
        say(ended.signal, f"{ended}; the same command goes on")
        raise typer.Exit(status_of(ended.signal)) from None


def _print_result(trainer: Trainer, result: TrainResult, out: Path, console: Console) -> None:
    """Print a run's result, and write its page."""
    from streamcnn.training import read_log, write_report
    from streamcnn.training.report import best_epoch

    best = (
        f"{plural(result.num_updates, 'update')} in {plural(result.num_epochs, 'epoch')}; best validation "
        f"{trainer.task.measure} {result.best_score:.1%}: {result.best}"
    )
    classes = trainer.task.told_of_classes(best_epoch(trainer.task, read_log(out)))
    for line in (best, *classes, f"page: {write_report(out)}"):
        console.print(as_text(line), soft_wrap=True, highlight=False)
