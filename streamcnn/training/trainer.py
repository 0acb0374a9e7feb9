"""The training loop. A run that was killed and resumed ends as if it had not been killed.

A checkpoint is taken between two updates and holds everything that the rest of the run depends on: weights,
optimiser, schedule, loss scaling, averaged weights, every random state, the place in the order of images, the
sums of the epoch so far, and the length of the log. Whatever came after it is repeated identically.

The processes of a ``torch.distributed`` group train one model. They divide the forward passes of each update
and the batches of each validation; everything else is as in one process.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, replace
from itertools import chain
from pathlib import Path
from signal import Signals
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from streamcnn.data.dataset import Images
from streamcnn.data.sampling import ResumableSampler
from streamcnn.data.sources import ImageSource
from streamcnn.runtime.streaming_model import StreamingModel
from streamcnn.support.signals import heeding
from streamcnn.training.batch_sizes import require_enough, require_one_size, require_one_size_in_order
from streamcnn.training.classification import Classification
from streamcnn.training.ending import EndAsked, EndRequest
from streamcnn.training.evaluation import require_finite_loss
from streamcnn.training.identity import (
    identity_of,
    plan_digest,
    require_alike,
    require_no_collectives,
    require_same_inputs,
    tell_differences,
    versions,
    with_present_fingerprints,
)
from streamcnn.training.naming import naming
from streamcnn.training.optimisation import Optimisation
from streamcnn.training.processes import Processes
from streamcnn.training.progress import Progress, TrainResult
from streamcnn.training.random_states import random_states, seed_all, seed_for, set_random_states
from streamcnn.training.records import Listener, Records
from streamcnn.training.running_statistics import RunningStatistics
from streamcnn.training.settings import TrainSettings, require_same
from streamcnn.training.state import FORMAT, progress_of, restoring
from streamcnn.training.task import Evaluation, Task
from streamcnn.training.update_record import BatchRecord, UpdateRecord

T = TypeVar("T")
R = TypeVar("R")


class Trainer:
    """Trains a model on whole images, together with the other processes of ``torch.distributed``, if any.

    Parameters
    ----------
    model
        For classification, a module that takes a list of image sources and returns logits ``(N, classes)``,
        as a ``StreamingModel`` does; if images have further inputs, it takes the batch's inputs after the
        sources. For segmentation, a ``StreamingModel`` that returns a map of scores (N, C, H, W).
    images, validation
        Images to train on, and images by which the best weights are chosen: labelled ones, or those of a
        ``MaskDataset``.
    settings
        The settings for one process: each process makes ``accumulate`` forward passes for an update. In the
        attribute of this name, ``accumulate`` counts the passes of all processes.
    folder
        The run's folder, for checkpoints and log. If it has checkpoints, the run resumes from the newest.
    task
        The task; None for classification.
    identity
        Further values, by name, that have to be the same for the run to be resumed: numbers, texts, lists
        and dicts. Task, settings, data and the shapes of tensors always have to be.
    events
        Whether to write TensorBoard events too.
    listener
        Called with each update and epoch as the log gets it.
    on_start
        Called when it is certain that the run begins or resumes.
    on_end
        Called with the reason, and the signal's number or None, as soon as the run is asked to end; for a
        signal, in its handler.

    Raises
    ------
    ValueError
        If there are no images, or the model does not suit the task, or it sums gradients itself.
    MissingExtra
        If a package that the task needs is not installed.
    """

    def __init__(
        self,
        model: nn.Module,
        images: Images,
        validation: Images,
        settings: TrainSettings,
        folder: Path,
        *,
        task: Task[Any] | None = None,
        identity: Mapping[str, Any] | None = None,
        events: bool = False,
        listener: Listener | None = None,
        on_start: Callable[[], None] = lambda: None,
        on_end: Callable[[str, int | None], None] = lambda reason, number: None,
    ) -> None:
        for what, data in (("training", images), ("validation", validation)):
            if not len(data):
                raise ValueError(f"there are no {what} images: allowed are one and more")
        self.task: Task[Any] = Classification() if task is None else task
        self.task.require_usable(model)  # now rather than after an epoch
        self.processes = Processes.present()
        self.processes.require_usable(model)
        self.model = model
        self.images = images
        self.validation = validation
        # The settings with which one process would do the same.
        self.settings = replace(settings, accumulate=settings.accumulate * self.processes.count)
        self.folder = folder
        self.identity = dict(identity or {})
        self.events = events
        self.listener = listener
        self.on_start = on_start
        self.on_end = on_end
        self.net: nn.Module = model.net if isinstance(model, StreamingModel) else model
        self.device = next((p.device for p in self.net.parameters()), torch.device("cpu"))
        self._meets = self.processes.meet_in(self.net)
        self.records = Records(folder, self.processes)
        self.progress = Progress()
        self._end_request = EndRequest()

    @property
    def updates_per_epoch(self) -> int:
        """Number of optimiser steps in a whole epoch."""
        return math.ceil(len(self._make_sampler()) / self.settings.images_per_update)

    def run(self) -> TrainResult:
        """Train, from the newest checkpoint if there is one, until the run is over.

        After SIGINT, SIGTERM or SIGHUP the run finishes the present update or validation batch, saves its
        state and ends; after a second signal it ends at once. An error in one process ends all processes.

        Raises
        ------
        RunMismatch
            If the checkpoints belong to another model, other data or other settings, or the log is shorter
            than it was when the newest checkpoint was written.
        DamagedCheckpoint
            If there are checkpoints and all are damaged, or the best one is gone.
        DatasetMismatch
            If training and validation images differ in kind, images of a batch would have different sizes, or
            masks hold classes that the model has no channel for.
        PlanDoesNotFit
            If the first image cannot be streamed within the budget.
        TrainingDiverged
            If the loss becomes NaN or infinite.
        RunInUse
            If another process trains in the folder.
        CannotWrite
            If the disk is full, or the folder may not be written to.
        Terminated
            After a signal or `end`, once the state is saved.
        StoppedAtOnce
            After a second signal; the newest checkpoint is then the last one saved before it.
        OtherProcessFailed
            If an error has ended another process.
        """
        self._end_request = EndRequest()
        with self.records.held(), heeding(self._end_by):
            self.begin()
            return self._run()

    def _run(self) -> TrainResult:
        """Train in the locked folder; see :meth:`run`."""
        saved = self.records.newest()
        if saved is not None and not saved["progress"]["update"] and saved["identity"] != self._identity:
            saved = None  # nothing was trained, so nothing is lost
        if saved is not None:
            with self.processes.agreeing(), restoring(self.records.checkpoints.folder):
                self._restore(saved)
            self.records.restore_best(self.progress)
        else:
            self._check()
        is_new, nbytes = saved is None, 0 if saved is None else saved["log_bytes"]
        del saved  # as large as model and optimiser together
        with self.records.open_log(nbytes=nbytes, update=self.progress.update, events=self.events):
            self.processes.first(self.on_start)
            if is_new:
                self._save()
            self._end_if_asked()
            while not self.progress.is_over:
                if self.sampler.epoch == self.progress.epoch:
                    self._train_epoch()
                self._end_epoch(self._validate())
        return self.progress.to_result(self.records.best())

    def end(self, reason: str) -> None:
        """Ask the run to save its state and end after the present update or validation batch.

        Parameters
        ----------
        reason
            What ends it, for the error's text.
        """
        self._end_request.reason = reason
        self.on_end(reason, self._end_request.signal)

    def _end_by(self, number: Signals) -> None:
        self._end_request.signal = number
        self.end(number.name)

    # --- state ---------------------------------------------------------------------------------------

    def begin(self) -> None:
        """Set everything to its state before the first update; `run` calls this before it loads a checkpoint.

        Raises
        ------
        DatasetMismatch
            If training and validation images differ in kind, or images of a batch would have different
            sizes.
        PlanDoesNotFit
            If the first image cannot be streamed within the budget.
        """
        seed_all(self.settings.seed)
        with self.processes.agreeing():
            self._begin()
        require_alike(self._identity, self.processes)
        self.processes.spread(chain(self.net.parameters(), self.net.buffers()))
        with self.processes.agreeing():
            self.optimisation = Optimisation(self.net, self.settings, self.device)
            self._find_plan_digest()  # raises for a plan that does not fit before anything is written
            require_no_collectives(self.model, self.processes)

    def _begin(self) -> None:
        """Set the state that does not depend on the weights."""
        self.sampler = self._make_sampler()
        self.progress = Progress()
        require_same_inputs(self.images, self.validation)
        size = self.settings.batch_size
        advice = f"train one at a time, with --batch 1 --accumulate {size}"
        require_one_size(self.images, size, advice=advice)
        require_one_size_in_order(self.validation, size, advice=advice)
        found = identity_of(self.model, self.images, self.validation, self.settings, self.device)
        self._identity = {**self.identity, **self.task.identity(), **found}
        if self._meets:
            self._identity["processes"] = self.processes.count
            require_enough(self.sampler, self.processes.count, size)

    def _check(self) -> None:
        """Check that the model fits all training and validation images; see `Task.check`."""
        images = {"training": self.images, "validation": self.validation}
        self._end_request.checked(
            self.processes, lambda before_image: self.task.check(self.model, images, before_image)
        )

    def _make_sampler(self) -> ResumableSampler:
        """The order of the images, at its beginning."""
        labels = self.task.groups(self.images) if self.settings.balanced else None
        multiple = self.settings.batch_size * self.processes.count if self._meets else 1
        return ResumableSampler(self.images, seed=self.settings.seed, labels=labels, multiple=multiple)

    def _save(self) -> None:
        """Write a checkpoint of the state as it is between two updates."""
        self.records.save(self._state, self.progress.update)

    def _state(self) -> dict[str, Any]:
        return {
            "format": FORMAT,
            "identity": self._identity,
            "versions": versions(),
            "progress": asdict(self.progress),
            "model": self.net.state_dict(),
            **self.optimisation.state_dict(),
            "sampler": self.sampler.state_dict(),
            "random": random_states(self.device),
            # Not the plan of the beginning: after a refused allocation there is another.
            "plan": self._find_plan_digest(),
        }

    def _restore(self, saved: Mapping[str, Any]) -> None:
        """Restore the state in a checkpoint."""
        images = {"images": self.images, "validation": self.validation}
        require_same(self._identity, with_present_fingerprints(saved["identity"], self._identity, images))
        # Augmented as when it was saved: if the first image is rotated, its plan differs.
        place = saved["sampler"]
        self.images.set_epoch(place["epoch"] if place["position"] else max(place["epoch"] - 1, 0))
        tell_differences(saved, self._find_plan_digest())
        self.net.load_state_dict(saved["model"])
        self.optimisation.load_state_dict(saved, self.records.checkpoints.folder)
        self.sampler.load_state_dict(saved["sampler"])
        self.progress = Progress(**progress_of(saved))
        set_random_states(saved["random"], self.device)
        # A run may be given more epochs, or more patience, than it had.
        self._decide_whether_over()

    def _find_plan_digest(self) -> str | None:
        """The fingerprint of the plan that carries out updates; None if the model is not streamed."""
        size = self.settings.batch_size
        return plan_digest(self.task, self.model, self.images, size, self.device, self.casting)

    # --- updates -------------------------------------------------------------------------------------

    def _train_epoch(self) -> None:
        """Train for the rest of the present epoch."""
        self.model.train()
        self.images.set_epoch(self.sampler.epoch)
        for positions in self.sampler.groups(self.settings.images_per_update, self._announce):
            self._update(positions)
            self._end_if_asked()
            if self.progress.update % self.settings.save_every == 0:
                self._save()
                self._end_if_asked()

    def _announce(self, position: int) -> None:
        """Prefetch the next image in order, if this process will read it."""
        batch = self.sampler.position % self.settings.images_per_update // self.settings.batch_size
        if batch in self.processes.share(self.settings.accumulate):
            self.images.prefetch(position)

    def _end_if_asked(self) -> None:
        """Save the state and end the run, if a process was asked to."""
        asked = self._end_request.of_any(self.processes)
        if asked is not None:
            self._save()
            raise asked.to_error(self.progress.update)

    def _update(self, positions: list[int]) -> None:
        """Make one optimiser step, on the mean gradient of the images at ``positions``."""
        size, record = self.settings.batch_size, UpdateRecord()
        learning_rate = self.optimisation.learning_rate
        statistics = RunningStatistics(self.net, self.processes)
        self.optimisation.clear_gradients()

        def add(at: int) -> BatchRecord:
            seed_for(self.settings.seed, "update", self.progress.update, at)
            return self._add_batch(positions[at : at + size], 1 / len(positions))

        batches = range(0, len(positions), size)
        record.add(self.processes.divided(add, batches, meets=self._meets))
        self.optimisation.add_up(self.processes)
        statistics.merge()
        self.optimisation.step()
        self.progress.add(record)
        self._note("update", record.values(epoch=self.progress.epoch, learning_rate=learning_rate))

    def _add_batch(self, batch: list[int], weight: float) -> BatchRecord:
        """Add the gradients of one forward pass."""
        where = f"update {self.progress.update + 1} of epoch {self.progress.epoch + 1}"
        sources, targets, *inputs = self.task.open_batch(self.images, batch, where)
        names = [source.name for source in sources]
        with naming(where, batch, names):
            loss, logits = self.differentiate(
                sources, targets, weight, *(each.to(self.device) for each in inputs)
            )
            require_finite_loss(loss, self.progress.update + 1, logits, batch, names)
        report = self.model.last_report if isinstance(self.model, StreamingModel) else None
        return BatchRecord.of(sources, loss, self.task.sums(logits, targets), report)

    def differentiate(
        self, sources: list[ImageSource], targets: Any, weight: float, *inputs: Tensor
    ) -> tuple[float, Tensor | None]:
        """Add the gradients of a batch; a hook for subclasses whose model needs more than one pass.

        Parameters
        ----------
        sources, targets
            The batch's sources, and its targets: labels ``(N,)``, int64, or a list of masks.
        weight
            Factor by which the sum of its losses is multiplied.
        *inputs
            Further inputs of the model, after the sources: (N, …) each, on its device.

        Returns
        -------
        The sum of the images' losses, without the factor, and a classifier's logits ``(N, classes)``,
        detached; None for other tasks.
        """
        with self.casting():
            loss, logits = self.task.loss(self.model, sources, targets, *inputs)
        self.optimisation.backward(weight * loss)
        return float(loss.detach()), logits

    def _note(self, kind: str, values: Mapping[str, Any]) -> None:
        """Tell the log and the listener."""
        # After a signal the listener's terminal may be gone, and an error would prevent saving the state.
        listener = self.listener if self._end_request.signal is None else None
        self.records.note(kind, values, self.progress.update, listener)

    def casting(self) -> AbstractContextManager[None]:
        """The context manager in which passes run: autocast, as the settings say."""
        return self.settings.casting(self.device)

    # --- epochs --------------------------------------------------------------------------------------

    def _validate(self) -> Evaluation:
        """Evaluate the averaged weights, or else the present ones, on the validation images."""
        self.model.eval()
        self.validation.set_epoch(0)
        try:
            with self.optimisation.averaged_weights():
                return self.task.evaluate(
                    self.model,
                    self.validation,
                    batch_size=self.settings.batch_size,
                    casting=self.casting,
                    each=self._each,
                    device=self.device,
                )
        except EndAsked:
            # The model has its own weights again.
            self._end_if_asked()
            raise

    def _each(self, work: Callable[[T], R], items: Sequence[T], /) -> list[R]:
        """Apply ``work`` to all validation batches, each with its own seed, divided among processes."""

        def seeded(item: T) -> R:
            seed_for(self.settings.seed, "validation", self.progress.epoch, item)
            return work(item)

        return self._end_request.divided(self.processes, seeded, items)

    def _end_epoch(self, found: Evaluation) -> None:
        """Log the validation, decide whether the run is over, and save."""
        progress = self.progress
        self.optimisation.end_epoch(found.loss)
        values = {"validation_loss": found.loss, **found.to_log()}
        self._note("epoch", {"epoch": progress.epoch, **progress.means(), **values})
        is_better = progress.end_epoch(found.value)
        if is_better:
            progress.best = self.records.keep_best(found, progress.update)
        self._decide_whether_over()
        self._save()
        if is_better:
            self.records.mark_best(progress.best)

    def _decide_whether_over(self) -> None:
        self.progress.is_over = self.progress.reaches(self.settings.epochs, self.settings.patience)
