"""One stage of training under the ceiling, for as long as the scale allows it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.harness.batch_search import Fit
from benchmarks.harness.costs import Costs
from benchmarks.harness.method import Datasets, TrainingStage
from benchmarks.harness.trial import Trial
from streamcnn.ceiling.device import Limit
from streamcnn.training import Terminated, Trainer
from streamcnn.training.checkpoint_file import load_checkpoint
from streamcnn.training.checkpoints import CheckpointFolder
from streamcnn.training.runs import best_weights


@dataclass(frozen=True, slots=True)
class Trained:
    """What came of a stage."""

    checkpoint: Path
    is_selected: bool
    """Whether validation has chosen it; else it is the newest."""
    reading: str
    """Of what the peak was read."""
    costs: Costs


def train_stage(
    trial: Trial, stage: TrainingStage, fit: Fit, datasets: Datasets, folder: Path, start: Path | None
) -> Trained:
    """Train from the stage's newest checkpoint, or from the weights of another.

    Parameters
    ----------
    folder
        The stage's own.
    start
        The checkpoint of the stage before, if there is one.

    Raises
    ------
    Refused
        If the ceiling refuses memory.
    Terminated
        If a signal ended it, when its state is saved.
    """
    weights = None if start is None else best_weights(load_checkpoint(start))
    costs = Costs(folder)
    with trial.ceiling.limited(reuse_heap=fit.reuse_heap) as limit:
        model = trial.make_model(datasets.train)
        if weights is not None:
            model.load_state_dict(weights)
            weights = None
        settings = trial.method.settings(trial.task, stage, fit.batch)
        _run(
            trial.method.trainer(
                model, datasets.train, datasets.validation, settings, folder, identity=trial.identity
            ),
            trial,
            costs,
            limit,
        )
        # What comes after has no need of them.
        model.zero_grad(set_to_none=True)
    checkpoints = CheckpointFolder(folder / "checkpoints")
    best = checkpoints.best()
    return Trained(best or checkpoints.paths()[0], best is not None, limit.reading, costs)


def _run(trainer: Trainer, trial: Trial, costs: Costs, limit: Limit) -> None:
    """Train until the end, or until time is up; after each update the peak is held against the budget."""
    seconds = trial.seconds_of_a_stage

    def is_time_up() -> bool:
        return seconds is not None and costs.trained_seconds > seconds

    def listen(kind: str, values: Mapping[str, Any]) -> None:
        trial.ceiling.check_peak(limit)
        costs.note(limit, trainer)
        if kind == "update" and is_time_up():
            trainer.end("the end of its time")

    # It may be: a row is started again for a later stage, or for the test.
    if is_time_up():
        return
    trainer.listener = listen
    try:
        trainer.run()
    except Terminated:
        # The checkpoint is newer than the last note.
        costs.note(limit, trainer)
        # Asked to by a signal, and not by the listener: the row is not done.
        if not is_time_up():
            raise
    costs.note(limit, trainer)
