"""The training loop: a run that was killed goes on, and ends as if it had not been.

A checkpoint is taken between two updates and holds all that the rest of the run depends on: weights,
optimiser, schedule, loss scaling, averaged weights, every random state, the place in the order of images, the
sums of the epoch so far, and how long the log was. What came after it is done again, in the same way.

Several processes that PyTorch has brought together train one model: they divide the forward passes of each
update, and the batches of each validation, and all else is as in one process.
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
    """Trains a model on whole images, together with other processes if PyTorch's distributed package has any.

    Parameters
    ----------
    model
        Of a classifier: takes a list of image sources and gives logits ``(N, classes)``, as a
        ``StreamingModel`` does. Where images have further inputs, it takes those of the batch after the
        sources. Of a segmentation: a ``StreamingModel`` that gives a map of scores (N, C, H, W).
    images, validation
        What to train on, and what to choose the best weights by: labelled images, or those of a
        ``MaskDataset``.
    settings
        What to do with them. Of several processes each makes ``accumulate`` forward passes for an update; the
        attribute of this name has the passes of all together.
    folder
        Of the run: checkpoints and log. If there are checkpoints, the run goes on from the newest.
    task
        What the model is trained for; None for classification.
    identity
        What else has to be the same for the run to go on, by name, such as the model's own; task, settings,
        data and the shapes of tensors always have. Numbers, texts, lists and dicts.
    events
        Whether to write TensorBoard events too.
    listener
        Told of every update and epoch as the log is.
    on_start
        Called when it is certain that the run begins or goes on.
    on_end
        Called with the reason, and the signal's number or None, as soon as the run is asked to end: in the
        signal's handler, if a signal asks.

    Raises
    ------
    ValueError
        If there are no images, or the model is none for the task, or one that adds up gradients itself.
    MissingExtra
        If a package is not installed that the task needs.
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
        # Those of the one process that would do the same.
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
        """Steps of the optimiser in a whole epoch."""
        return math.ceil(len(self._make_sampler()) / self.settings.images_per_update)

    def run(self) -> TrainResult:
        """Train, from the newest checkpoint if there is one, until the run is over.

        At SIGINT, SIGTERM or SIGHUP the run ends after the present update or validation batch, its state
        saved; at a second one it ends at once. What one of several processes raises ends all of them.

        Raises
        ------
        RunMismatch
            If the checkpoints are of another model, other data or other settings, or the log is shorter than
            it was when the newest was written.
        DamagedCheckpoint
            If there are checkpoints and none can be read, or the best one is gone.
        DatasetMismatch
            If images to train on and to validate by have different further inputs or pixels, if images of a
            batch would have different sizes, or masks hold classes that the model does not tell apart.
        PlanDoesNotFit
            If the first image cannot be streamed within the budget.
        TrainingDiverged
            If the loss is no number any more.
        RunInUse
            If another process trains in the folder.
        CannotWrite
            If the disk is full, or the folder may not be written to.
        Terminated
            After a signal or `end`, when the state is saved.
        StoppedAtOnce
            After a second signal; the newest checkpoint is the one before.
        OtherProcessFailed
            If an error has ended another process.
        """
        self._end_request = EndRequest()
        with self.records.held(), heeding(self._end_by):
            self.begin()
            return self._run()

    def _run(self) -> TrainResult:
        """As `run`, in a folder that is this process's."""
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
        """Have the run end after the present update or validation batch, its state saved.

        Parameters
        ----------
        reason
            What ended it, for the error's text.
        """
        self._end_request.reason = reason
        self.on_end(reason, self._end_request.signal)

    def _end_by(self, number: Signals) -> None:
        self._end_request.signal = number
        self.end(number.name)

    # --- state ---------------------------------------------------------------------------------------

    def begin(self) -> None:
        """Make everything as it is before the first update; `run` does, and goes on from a checkpoint then.

        Raises
        ------
        DatasetMismatch
            If images to train on and to validate by have different further inputs or pixels, or if images
            of a batch would have different sizes.
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
            self._find_plan_digest()  # so that a plan that does not fit is told before anything is written
            require_no_collectives(self.model, self.processes)

    def _begin(self) -> None:
        """Make what the weights do not matter for."""
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
        """Compare the model with all that it is to be trained for."""
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
            # Not that of the beginning: it is another once memory was refused.
            "plan": self._find_plan_digest(),
        }

    def _restore(self, saved: Mapping[str, Any]) -> None:
        """Go on from what a checkpoint holds."""
        images = {"images": self.images, "validation": self.validation}
        require_same(self._identity, with_present_fingerprints(saved["identity"], self._identity, images))
        # As when it was saved: an augmentation that turns the first image has another plan.
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
        """The fingerprint of the plan that updates are carried out by, if the model is streamed."""
        size = self.settings.batch_size
        return plan_digest(self.task, self.model, self.images, size, self.device, self.casting)

    # --- updates -------------------------------------------------------------------------------------

    def _train_epoch(self) -> None:
        """The rest of the present epoch."""
        self.model.train()
        self.images.set_epoch(self.sampler.epoch)
        for positions in self.sampler.groups(self.settings.images_per_update, self._announce):
            self._update(positions)
            self._end_if_asked()
            if self.progress.update % self.settings.save_every == 0:
                self._save()
                self._end_if_asked()

    def _announce(self, position: int) -> None:
        """Prepare for the next image in order, if this process will read it."""
        batch = self.sampler.position % self.settings.images_per_update // self.settings.batch_size
        if batch in self.processes.share(self.settings.accumulate):
            self.images.prefetch(position)

    def _end_if_asked(self) -> None:
        """Save and end, if that was asked for."""
        asked = self._end_request.of_any(self.processes)
        if asked is not None:
            self._save()
            raise asked.to_error(self.progress.update)

    def _update(self, positions: list[int]) -> None:
        """One step of the optimiser, on the gradients of all ``positions``."""
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
        """Add the gradients of a batch, for subclasses whose model needs more than one pass.

        Parameters
        ----------
        sources, targets
            Of the batch; targets are labels ``(N,)``, int64, or a list of masks.
        weight
            Factor of the sum of its losses.
        *inputs
            What goes into the model after the sources, (N, …) each, on its device.

        Returns
        -------
        The sum of the images' losses, without the factor, and of a classifier their logits ``(N, classes)``,
        detached.
        """
        with self.casting():
            loss, logits = self.task.loss(self.model, sources, targets, *inputs)
        self.optimisation.backward(weight * loss)
        return float(loss.detach()), logits

    def _note(self, kind: str, values: Mapping[str, Any]) -> None:
        """Tell the log and the listener."""
        # After a signal the terminal that the listener writes to may be gone, and the state is to be saved.
        listener = self.listener if self._end_request.signal is None else None
        self.records.note(kind, values, self.progress.update, listener)

    def casting(self) -> AbstractContextManager[None]:
        """A block under autocast, as the settings say."""
        return self.settings.casting(self.device)

    # --- epochs --------------------------------------------------------------------------------------

    def _validate(self) -> Evaluation:
        """Evaluate the validation images by the averaged weights, or by the present ones if none are kept."""
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
            # With the model's own weights again.
            self._end_if_asked()
            raise

    def _each(self, work: Callable[[T], R], items: Sequence[T], /) -> list[R]:
        """What validation gives for all batches."""

        def seeded(item: T) -> R:
            seed_for(self.settings.seed, "validation", self.progress.epoch, item)
            return work(item)

        return self._end_request.divided(self.processes, seeded, items)

    def _end_epoch(self, found: Evaluation) -> None:
        """Note the validation, decide what comes next, and save."""
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
