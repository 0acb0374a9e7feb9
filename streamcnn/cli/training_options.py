"""Options of ``train``. Defaults repeat those of the settings, whose import would load PyTorch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Annotated, Any

import typer

from streamcnn.cli.arguments import (
    Budget,
    ChannelsLast,
    EmptyMasks,
    Inputs,
    KeyValues,
    Level,
    Masks,
    ModelOption,
    Series,
    Tile,
    choice_of,
    parse,
    parse_extent,
    parse_key_values,
    parse_names,
    parse_numbers,
)
from streamcnn.support.units import parse_bytes

if TYPE_CHECKING:
    from streamcnn.training import RunConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class RunOptions:
    """Options for a run's configuration, besides model and data: see `RunConfig`."""

    task: Annotated[str, typer.Option(help="classification, or segmentation.")] = "classification"
    budget: Budget = None
    tile: Tile = None
    device: Annotated[str, typer.Option(help="cpu, or cuda.")] = "cpu"
    model_option: ModelOption = None
    inputs: Inputs = None
    series: Series = None
    level: Level = None
    channels_last: ChannelsLast = None
    split: Annotated[str, typer.Option(help="Images to train on.")] = "train"
    validation_split: Annotated[
        str | None, typer.Option(help="Images to choose the best weights by; default: a share of the former.")
    ] = None
    validation_share: Annotated[float, typer.Option(help="That share.")] = 0.1
    mean: Annotated[float, typer.Option(help="Taken from pixels of 0 to 1.")] = 0.5
    std: Annotated[float, typer.Option(help="By which they are divided then.")] = 0.5
    mirrors: Annotated[bool, typer.Option("--mirrors", help="Mirror half of the images.")] = False
    turns: Annotated[bool, typer.Option("--turns", help="Turn images by quarters.")] = False
    inversion: Annotated[float, typer.Option(help="Share of images that are inverted.")] = 0.0

    masks: Masks = None
    empty_masks: EmptyMasks = False
    loss: Annotated[
        str | None,
        typer.Option(
            help="Of segmentation: cross_entropy, dice, tversky, or a sum such as cross_entropy+dice."
        ),
    ] = None
    ignore_index: Annotated[int | None, typer.Option(help="Value in masks that does not count.")] = None
    class_weights: Annotated[
        str | None, typer.Option(metavar="NUMBER,...", help="In the cross-entropy, one for each class.")
    ] = None
    label_smoothing: Annotated[float | None, typer.Option(help="In the cross-entropy of segmentation.")] = (
        None
    )
    loss_option: KeyValues = None
    class_names: Annotated[
        str | None,
        typer.Option(
            metavar="NAME,...",
            help="Of segmentation: what the classes from 0 on are called, a name for each; none can hold a "
            "comma.",
        ),
    ] = None
    key: Annotated[
        str | None, typer.Option(help="Of several results of the model the one that is the map of scores.")
    ] = None

    def config(self, model: str, data: str, settings: SettingsOptions) -> Callable[[], RunConfig]:
        """A function that makes the run's config, or raises `ValueError` if a value has no meaning.

        Text that cannot be parsed ends the command as wrong usage, before anything is imported.
        """
        model_options = parse("--model-option", parse_key_values, self.model_option)
        budget = parse("--budget", parse_bytes, self.budget)
        tile = None if self.tile is None else parse("--tile", parse_extent, self.tile)
        loss, of_settings = self._loss_values(), settings.values()

        def make() -> RunConfig:
            from streamcnn.data.augmentation import RandomAugmentation
            from streamcnn.data.normalisation import Normalise
            from streamcnn.data.sources.places import local_path
            from streamcnn.training import RunConfig, SegmentationLoss, TrainSettings

            return RunConfig(
                task=self.task,
                masks=None if self.masks is None else str(local_path(self.masks).resolve()),
                empty_masks=self.empty_masks,
                loss=SegmentationLoss(**loss) if loss else None,
                key=self.key,
                class_names=None if self.class_names is None else parse_names(self.class_names),
                model=model,
                model_options=model_options,
                data=str(local_path(data).resolve()),
                inputs=parse_names(self.inputs),
                choice=choice_of(self.series, self.level, self.channels_last),
                split=self.split,
                validation_split=self.validation_split,
                validation_share=self.validation_share,
                budget=budget,
                tile=tile,
                device=self.device,
                normalise=Normalise(self.mean, self.std),
                augmentation=RandomAugmentation(
                    mirrors=self.mirrors, turns=self.turns, inversion=self.inversion
                ),
                settings=TrainSettings(**of_settings),
            )

        return make

    def _loss_values(self) -> dict[str, Any]:
        """The values of a segmentation's loss that are given."""
        given = {
            "name": self.loss,
            "ignore_index": self.ignore_index,
            "class_weights": parse("--class-weights", parse_numbers, self.class_weights),
            "label_smoothing": self.label_smoothing,
            "options": parse("--loss-option", parse_key_values, self.loss_option) or None,
        }
        return {name: value for name, value in given.items() if value is not None}


@dataclass(frozen=True, slots=True, kw_only=True)
class SettingsOptions:
    """Options for a run's settings: see `TrainSettings`."""

    epochs: Annotated[int, typer.Option(help="Most passes over the images.")] = 10
    batch: Annotated[int, typer.Option(help="Images of a forward pass, in each process.")] = 1
    accumulate: Annotated[int, typer.Option(help="Forward passes of an update, in each process.")] = 1
    optimizer: Annotated[str, typer.Option(help="A class of torch.optim.")] = "Adam"
    learning_rate: Annotated[float, typer.Option(help="Of the optimiser.")] = 1e-3
    optimizer_option: KeyValues = None
    schedule: Annotated[str | None, typer.Option(help="A class of torch.optim.lr_scheduler.")] = None
    schedule_option: KeyValues = None
    schedule_every: Annotated[str, typer.Option(help="epoch or update.")] = "epoch"
    clip_norm: Annotated[float | None, typer.Option(help="Largest norm of all gradients.")] = None
    ema_decay: Annotated[float | None, typer.Option(help="Average the weights with this decay.")] = None
    autocast: Annotated[str | None, typer.Option(help="bfloat16 or float16.")] = None
    balanced: Annotated[bool, typer.Option("--balanced", help="As many images of each label.")] = False
    patience: Annotated[int | None, typer.Option(help="Epochs without a gain to end after.")] = None
    save_every: Annotated[int, typer.Option(help="Updates between checkpoints.")] = 100
    seed: Annotated[int, typer.Option(help="Of weights, order and augmentations.")] = 0

    def values(self) -> dict[str, Any]:
        """Values of `TrainSettings`; text that cannot be parsed ends the command as wrong usage."""
        values = asdict(self)
        return {
            "batch_size": values.pop("batch"),
            "optimizer_options": parse(
                "--optimizer-option", parse_key_values, values.pop("optimizer_option")
            ),
            "schedule_options": parse("--schedule-option", parse_key_values, values.pop("schedule_option")),
            **values,
        }
