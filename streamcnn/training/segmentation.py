"""Segmentation: a mask gives the class of each pixel."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from streamcnn.data.augmentation import RandomAugmentation
from streamcnn.data.mask_dataset import MaskDataset
from streamcnn.data.reader import BatchReader
from streamcnn.data.sources import ImageChoice, ImageSource
from streamcnn.errors import DatasetMismatch, TrainingDiverged, UnsupportedModel, some
from streamcnn.metrics import SegmentationScore, class_overlaps
from streamcnn.plan.plan import Plan
from streamcnn.runtime.fake_result import captured_result, fake_result
from streamcnn.runtime.streaming_model import StreamingModel
from streamcnn.training.class_names import class_lines, require_as_many, require_names
from streamcnn.training.naming import listed, naming
from streamcnn.training.processes import Each
from streamcnn.training.segmentation_loss import SegmentationLoss
from streamcnn.training.segmentation_page import keep_maps, pictured, shown, step_of
from streamcnn.training.task import Batch, Shown, Task

_SHOWN = 5
"""Unknown classes that an error names."""


@dataclass(frozen=True, slots=True)
class Segmented:
    """A model's loss, scores and small predicted maps on a set of images."""

    loss: float
    """Mean of the images' losses."""
    score: SegmentationScore
    """The score over all images' pixels, except the ignored ones."""
    num_images: int
    maps: Mapping[int, Tensor]
    """Small maps of classes (h, w) of some images, by position."""

    @property
    def value(self) -> float:
        """The mean IoU."""
        return self.score.mean_iou

    def to_log(self) -> dict[str, Any]:
        """The scores, and the sums of overlaps that they are computed from."""
        return {
            "validation_mean_iou": self.score.mean_iou,
            "validation_mean_dice": self.score.mean_dice,
            "validation_accuracy": self.score.accuracy,
            "overlaps": self.score.overlaps.tolist(),
            "num_images": self.num_images,
        }

    def keep(self, folder: Path) -> None:
        """Write the small maps into the run's folder, for its page."""
        keep_maps(folder, self.maps)


@dataclass(frozen=True)
class Segmentation(Task[MaskDataset]):
    """Segmentation by a model that gives a map of scores (N, C, H, W), or (N, 1, H, W) for two classes."""

    masks: str | None = None
    """Folder of the masks; None where a table names them."""
    settings: SegmentationLoss = field(default_factory=SegmentationLoss)
    key: str | None = None
    """Key of the scores in the model's results; None if the scores are the only result."""
    names: tuple[str, ...] | None = None
    """Of the classes 0, 1, …; None where they are numbers."""
    empty_masks: bool = False
    """Whether masks in zarr may lack all their chunks: see `MaskDataset`."""

    name = "segmentation"
    measure = "mean IoU"
    logged = "validation_mean_iou"
    detail = "overlaps"

    def __post_init__(self) -> None:
        if self.names is not None:
            require_names(self.names)

    @property
    def loss_name(self) -> str:
        """The loss's name in texts: that of the settings."""
        return self.settings.name

    @cached_property
    def _loss(self) -> Callable[[Any, Tensor], Tensor]:
        """The loss of the model's result; always the same object, so that a pass is captured only once."""
        return _OfResult(self.settings.function(), self.key)

    def identity(self) -> dict[str, Any]:
        """The task and its loss. Masks are compared by content, as images are."""
        settings = self.settings
        return {
            "task": self.name,
            "loss": settings.name,
            "ignore_index": settings.ignore_index,
            "class_weights": settings.class_weights and list(settings.class_weights),
            "label_smoothing": settings.label_smoothing,
            "loss_options": dict(settings.options),
            "key": self.key,
            "class_names": self.names and list(self.names),
        }

    # --- data ----------------------------------------------------------------------------------------

    def open_images(
        self,
        data: str,
        split: str | None,
        *,
        choice: ImageChoice,
        positions: Sequence[int] | None = None,
        augmentation: RandomAugmentation | None = None,
        seed: int = 0,
    ) -> MaskDataset:
        """The images and masks of a table, or of two folders."""
        return MaskDataset(
            data,
            masks=self.masks,
            split=split,
            positions=positions,
            augmentation=augmentation,
            seed=seed,
            choice=choice,
            empty_masks=self.empty_masks,
        )

    def groups(self, images: MaskDataset) -> Sequence[None]:
        """One group for all images: they are set aside for validation whatever their masks hold."""
        return [None] * len(images)

    def num_classes(
        self, images: MaskDataset, validation: MaskDataset, model: StreamingModel | None = None
    ) -> int | None:
        """The number of channels of the model's result; a single channel stands for two classes."""
        return None if model is None else max(self._num_channels(model, images[0][0]), 2)

    def class_names(self, images: MaskDataset) -> tuple[str, ...] | None:
        """The names that were given; masks hold only numbers."""
        return self.names

    def open_batch(self, images: MaskDataset, positions: Sequence[int], where: str) -> Batch:
        """The images, and a list of their masks."""
        pairs = []
        for position in positions:
            with naming(where, [position], [""]):
                pairs.append(images[position])
        return [image for image, _ in pairs], [mask for _, mask in pairs]

    # --- training ------------------------------------------------------------------------------------

    def require_usable(self, model: nn.Module) -> None:
        """Make sure that the model is a ``StreamingModel``, which alone streams the loss of a map."""
        _streaming(model)

    def check(
        self, model: nn.Module, images: Mapping[str, MaskDataset], before_image: Callable[[], None]
    ) -> None:
        """Read all masks, and compare the classes in them with the model's channels."""
        channels = self._num_channels(_streaming(model), next(iter(images.values()))[0][0])
        num_classes, ignored = max(channels, 2), self.settings.ignore_index
        wrong: dict[int, str] = {}
        for each in images.values():
            for position in range(len(each)):
                before_image()
                values = each.mask_values(position).keys() - {ignored}
                if not values:
                    raise DatasetMismatch(
                        f"mask {each.mask_name(position)} holds {ignored} alone, which does not count: take "
                        "it out, as it has no loss"
                    )
                for value in values - set(range(num_classes)):
                    wrong.setdefault(value, each.mask_name(position))
        if wrong:
            value, known = min(wrong), ", ".join(map(str, sorted(wrong)[:_SHOWN]))
            but = "" if ignored is None else f", and {ignored}, which is ignored"
            raise DatasetMismatch(
                f"masks hold the classes {known} (mask {wrong[value]} holds {value}), and the model's result "
                f"has {channels} channels: allowed are 0 to {num_classes - 1}{but}; correct the masks, give "
                "the model more channels, or name one value that does not count as ignore_index"
            )

    def _num_channels(self, model: StreamingModel, source: ImageSource) -> int:
        """The number of channels of the model's result for the first image, found without computing it.

        Raises
        ------
        DatasetMismatch
            If the result is not a map of scores, or the class weights or names are not one for each class.
        """
        with naming("the first image", [0], [source.name]):
            reader = BatchReader([source], next(model.parameters()).device, model.preprocess)
            known = captured_result(model.net, reader.shape, reader.dtype, key=self.key)
            result = fake_result(model.net, reader.shape, reader.dtype) if known is None else known
        if known is None and (self.key is not None or not isinstance(result, Tensor)):
            if not isinstance(result, Mapping) or self.key not in result:
                raise DatasetMismatch(
                    f"the model's result is {_described(result)}, and key is {self.key!r}: allowed are a map "
                    "of scores without a key, and a dict with the key of one"
                )
            result = result[self.key]
        shape: tuple[int, ...] = tuple(result.shape)
        if len(shape) != 4 or shape[2:] != source.shape[1:]:
            raise DatasetMismatch(
                f"the model gives {shape} for an image of shape {tuple(source.shape)}: allowed are maps "
                "(N, C, H, W) of the image's height and width"
            )
        channels, weights = shape[1], self.settings.class_weights
        if weights is not None and len(weights) != max(channels, 2):
            raise DatasetMismatch(
                f"there are {len(weights)} class_weights, and the model tells {max(channels, 2)} classes "
                "apart: give one for each"
            )
        if self.names is not None:
            require_as_many(self.names, max(channels, 2))
        return channels

    def plan(self, model: StreamingModel, images: MaskDataset, batch_size: int, device: torch.device) -> Plan:
        """The plan of the streamed loss."""
        return self.plan_of(model, *images[0], batch_size)

    def plan_of(self, model: StreamingModel, image: ImageSource, mask: ImageSource, batch_size: int) -> Plan:
        """The plan of the streamed loss of ``batch_size`` images like this one."""
        try:
            return model.plan_loss([image] * batch_size, [mask] * batch_size, self._loss)
        except UnsupportedModel:
            # If the loss does not take the model's result, this raises a clearer error.
            self._num_channels(model, image)
            raise

    def loss(
        self, model: nn.Module, sources: list[ImageSource], targets: Any, *inputs: Tensor
    ) -> tuple[Tensor, None]:
        """The batch's loss times the number of its images."""
        assert not inputs
        return len(sources) * _streaming(model).streamed_loss(sources, targets, self._loss), None

    def sums(self, logits: Tensor | None, targets: Any) -> dict[str, float]:
        """No sums: maps are scored in validation alone."""
        return {}

    def evaluate(
        self,
        model: nn.Module,
        images: MaskDataset,
        *,
        batch_size: int,
        casting: Callable[[], AbstractContextManager[None]],
        each: Each,
        device: torch.device,
    ) -> Segmented:
        """Loss, overlaps and small maps, all from one pass over each image."""
        count, streamed, wanted = len(images), _streaming(model), pictured(len(images))

        def judged(at: int) -> tuple[float, Tensor, dict[int, Tensor]]:
            positions = range(at, min(at + batch_size, count))
            if positions.stop < count:
                images.prefetch(positions.stop)
            with casting():
                loss, overlaps, small = self._judge(streamed, images, positions)
            # Copies, since views would keep the whole batch.
            return loss, overlaps, {p: small[p - at].clone() for p in positions if p in wanted}

        losses, overlaps, maps = zip(*each(judged, range(0, count, batch_size)), strict=True)
        score = SegmentationScore(torch.stack(overlaps).sum(0))
        return Segmented(sum(losses) / count, score, count, {p: m for some in maps for p, m in some.items()})

    def _judge(
        self, model: StreamingModel, images: MaskDataset, positions: Sequence[int]
    ) -> tuple[float, Tensor, Tensor]:
        """The sum of a batch's losses, its overlaps, and its small maps of classes (N, h, w)."""
        sources, masks, *_ = self.open_batch(images, positions, "segmentation")
        names = [source.name for source in sources]
        judge: Any = partial(
            _judged,
            loss=self._loss,
            key=self.key,
            ignored=self.settings.ignore_index,
            step=step_of(sources[0].shape[1:]),
        )
        with naming("segmentation", positions, names), torch.no_grad():
            found: Any = model.streamed_loss(sources, masks, judge)
        loss, overlaps, small = (part.cpu() for part in found)
        if not math.isfinite(loss):
            raise TrainingDiverged(
                f"the loss of {listed(positions, names)} is {float(loss)}: see that the images are "
                "what the model expects, or train it anew with a smaller learning_rate, or with clip_norm"
            )
        return float(loss) * len(positions), overlaps, small

    # --- what is told of it --------------------------------------------------------------------------

    def told(self, epoch: Mapping[str, Any]) -> str:
        """The losses, and the validation's scores."""
        return (
            f"loss {epoch['loss']:.4f}; validation {epoch['validation_loss']:.4f}, "
            f"mean IoU {epoch['validation_mean_iou']:.1%}, mean Dice {epoch['validation_mean_dice']:.1%}"
        )

    def told_of_classes(self, epoch: Mapping[str, Any]) -> list[str]:
        """IoU and Dice of each class that is in the masks or the predictions."""
        return class_lines(SegmentationScore(torch.tensor(epoch["overlaps"])), self.names)

    def shown(
        self,
        epochs: Sequence[Mapping[str, Any]],
        best: Mapping[str, Any],
        images: MaskDataset,
        folder: Path | None,
    ) -> Shown:
        """Curves, each class's scores, and images beside their masks and the predictions that were kept."""
        return shown(epochs, best, images, folder, ignored=self.settings.ignore_index, names=self.names)


@dataclass(frozen=True, slots=True, eq=False)
class _OfResult:
    """A loss of the result under ``key``, or of the only result."""

    loss: Callable[[Tensor, Tensor], Tensor]
    key: str | None

    def __call__(self, result: Any, target: Tensor) -> Tensor:
        return self.loss(_part(result, self.key), target)


def _judged(
    result: Any,
    target: Tensor,
    *,
    loss: Callable[[Any, Tensor], Tensor],
    key: str | None,
    ignored: int | None,
    step: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """The loss, the overlaps (3, C), and the predicted classes (N, h, w) at every ``step``-th position."""
    scores = _part(result, key)
    few = scores[:, :, ::step, ::step]
    classes = (few[:, 0] > 0).long() if scores.shape[1] == 1 else few.argmax(1)
    return loss(result, target), class_overlaps(scores, target, ignore_index=ignored), classes


def _part(result: Any, key: str | None) -> Any:
    """The result under ``key``, or the only result."""
    return result if key is None else result[key]


def _described(result: Any) -> str:
    """A model's result in an error's text."""
    if isinstance(result, Mapping):
        return f"a dict of {some([str(name) for name in result])}"
    return "a tensor" if isinstance(result, Tensor) else f"a {type(result).__name__}"


def _streaming(model: nn.Module) -> StreamingModel:
    """``model``, as the ``StreamingModel`` that segmentation needs.

    Raises
    ------
    ValueError
        If it is not one.
    """
    if not isinstance(model, StreamingModel):
        raise ValueError(
            f"the model is a {type(model).__name__}: allowed is a StreamingModel for segmentation"
        )
    return model
