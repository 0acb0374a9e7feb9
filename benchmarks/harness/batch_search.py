"""The largest batch that a method can be trained with under its ceiling."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, ClassVar

import torch
import torch.nn.functional as F

from benchmarks.harness.attempts import Refused
from benchmarks.harness.scales import Scale
from streamcnn import StreamingModel
from streamcnn.data.dataset import LabelledImages
from streamcnn.data.sources import TensorSource
from streamcnn.data.ultramnist.layout import REFERENCE_SIZE

if TYPE_CHECKING:
    from benchmarks.harness.trial import Trial

UNKNOWN_BATCH = 4096
"""Where the search for the largest batch ends if nothing else ends it."""


@dataclass(frozen=True, slots=True)
class Fit:
    """The largest batch that an update can be made with, and how."""

    batch: int
    reuse_heap: bool
    """Whether the C library may keep freed blocks: faster, and more memory."""

    @property
    def heap(self) -> str:
        """For names."""
        return "reusing" if self.reuse_heap else "frugal"


class BatchSearch(ABC):
    """How that batch is found."""

    is_refused_memory: ClassVar[bool]
    """Whether the search asks for more than there is, which leaves holes in the heap of its process."""

    @abstractmethod
    def find(self, trial: Trial, images: LabelledImages) -> Fit:
        """The largest batch of ``images``.

        Raises
        ------
        Refused
            If not a single image fits.
        """

    @abstractmethod
    def less(self, trial: Trial, fit: Fit) -> Fit | None:
        """What to train with where ``fit`` was refused after all; None if there is nothing less."""


class PlannedBatch(BatchSearch):
    """Of a streamed model: as many pixels as its file says, if a plan for them fits; more cost time."""

    is_refused_memory = False

    def find(self, trial: Trial, images: LabelledImages) -> Fit:
        """The largest batch whose plan fits, by halving."""
        scale = trial.task.scale
        source = images[0][0]
        with trial.ceiling.limited(reuse_heap=True):
            model = trial.make_model(images)
            assert isinstance(model, StreamingModel)
            batch = trial.method.hyperparameters_for(trial.task.budget).batch or 1
            batch = min(_cap(scale), int(batch * (REFERENCE_SIZE / scale.canvas) ** 2))
            while batch > 1 and not model.train().plan((batch, *source.shape)).fits:
                batch //= 2
        return Fit(batch, reuse_heap=True)

    def less(self, trial: Trial, fit: Fit) -> Fit | None:
        """Fewer images."""
        return _fewer(fit)


class TriedBatch(BatchSearch):
    """Of plain PyTorch: updates are made until one is refused, with either kind of heap."""

    is_refused_memory = True

    def find(self, trial: Trial, images: LabelledImages) -> Fit:
        """The largest batch with a heap that keeps freed blocks, or else with a frugal one."""
        for reuse_heap in (True, False):
            batch, refusal = _largest(partial(_refusal, trial, images, reuse_heap), _cap(trial.task.scale))
            if batch is not None:
                return Fit(batch, reuse_heap)
        raise Refused(f"updates with a single image: {refusal}")

    def less(self, trial: Trial, fit: Fit) -> Fit | None:
        """A frugal heap, then fewer images."""
        if fit.reuse_heap and trial.task.device == "cpu":
            return Fit(fit.batch, reuse_heap=False)
        return _fewer(fit)


def without_single(fit: Fit, num_images: int) -> Fit:
    """The next smaller batch with which an epoch's last one has more than one image."""
    batch = fit.batch
    while batch > 2 and num_images % batch == 1:
        batch -= 1
    return Fit(max(1, batch), fit.reuse_heap)


def _cap(scale: Scale) -> int:
    return scale.largest_batch or UNKNOWN_BATCH


def _fewer(fit: Fit) -> Fit | None:
    return Fit(fit.batch * 3 // 4, fit.reuse_heap) if fit.batch > 1 else None


def _largest(refusal: Callable[[int], str | None], cap: int) -> tuple[int | None, str | None]:
    """The largest batch, by doubling, then halving the gap; or what refuses a single image."""
    # Two first: batch norm of pooled features cannot be trained on one image.
    if refusal(2) is not None:
        refused = refusal(1)
        return (1, None) if refused is None else (None, refused)
    good, bad = 2, 4
    while bad <= cap and refusal(bad) is None:
        good, bad = bad, 2 * bad
    bad = min(bad, cap + 1)
    while bad - good > max(1, good // 8):
        middle = (good + bad) // 2
        if refusal(middle) is None:
            good = middle
        else:
            bad = middle
    return good, None


def _refusal(trial: Trial, images: LabelledImages, reuse_heap: bool, batch: int) -> str | None:
    """Make two updates of a model of its own on blank images; what refused them, if anything did.

    The second has Adam's averages beside its activations, as all later ones have.
    """
    source = images[0][0]
    name = f"update-{source.shape[1]}-batch-{batch}-{Fit(batch, reuse_heap).heap}"
    try:
        with trial.attempts.trying(name), trial.ceiling.limited(reuse_heap=reuse_heap):
            model = trial.make_model(images).train()
            optimizer = torch.optim.Adam(model.parameters())
            sources = [TensorSource(torch.zeros(source.shape, dtype=source.dtype)) for _ in range(batch)]
            labels = torch.zeros(batch, dtype=torch.int64, device=trial.task.device)
            for _ in range(2):
                optimizer.zero_grad(set_to_none=True)
                trial.method.begin_update(model, sources)
                F.cross_entropy(model(sources), labels).backward()
                optimizer.step()
    except Refused as error:
        return str(error)
    except ValueError as error:
        if batch > 1 or "more than 1 value per channel" not in str(error):
            raise
        return "batch norm cannot be trained on one image, and two do not fit"
    return None
