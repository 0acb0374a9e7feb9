"""What ``streamcnn demo`` runs: a small CNN learns whole images under a memory budget.

It makes large images, overfits a CNN with train-mode batch norm to them, one whole image per
update, and draws one of them with the plan's tiles. Overfitting to four images proves nothing
about the model; it proves that gradients are right.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.progress import Progress
from torch import Tensor, nn

from streamcnn.data.dataset import TileDataset
from streamcnn.data.sources import ImageSource
from streamcnn.data.thumbnails import sampled
from streamcnn.data.ultramnist import NUM_CLASSES, Recipe, Spec, load_digits
from streamcnn.data.ultramnist.generate import generate
from streamcnn.runtime.streaming_model import StreamingModel
from streamcnn.support.disk import writing
from streamcnn.support.extras import require
from streamcnn.support.text import as_text
from streamcnn.support.units import format_bytes, format_count, format_duration, parse_bytes, plural

_FIGURE_PIXELS = 1000  # edge in pixels of the figure, which shows every n-th pixel

LabelledImages = Sequence[tuple[ImageSource, int]]


@dataclass(frozen=True, slots=True, kw_only=True)
class DemoSettings:
    """Settings of the demo; with the defaults it takes a few minutes on two cores."""

    size: int = 4000
    """Height and width of the images in pixels."""
    num_images: int = 4
    epochs: int = 8
    """Passes over all images, with one update per image."""
    budget: int | str = "384MiB"
    """Bytes that the streamed step may hold, as `streamcnn.support.units.parse_bytes` reads them."""
    seed: int = 0
    """Seed of the images and of the network's initial weights."""
    learning_rate: float = 3e-3
    output: Path = Path("demo-output")
    """Folder for the images and the figure; created if missing."""


@dataclass(frozen=True, slots=True)
class DemoResult:
    """The result of the demo."""

    losses: tuple[float, ...]
    """Mean cross-entropy of each epoch."""
    labels: tuple[int, ...]
    predictions: tuple[int, ...]
    """The predicted class of each image after training, in eval mode, so with running statistics."""
    measured_bytes: int | None
    """The largest peak of any update; None if the device gave no reading."""
    seconds: float
    """Seconds of the training alone."""
    figure: Path

    @property
    def num_right(self) -> int:
        """Number of images that are classified correctly."""
        return sum(a == b for a, b in zip(self.predictions, self.labels, strict=True))

    @property
    def overfitted(self) -> bool:
        """Whether the network classifies every image correctly, as it should."""
        return self.num_right == len(self.labels)


class PlanView(Protocol):
    """The part of a plan's interface that the demo uses."""

    @property
    def tile(self) -> tuple[int, int]:
        """Height and width of a tile in input pixels."""


class SqueezeExcite(nn.Module):
    """Scales each channel by a gate computed from the means of all channels (Hu et al. 2018)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.squeeze = nn.Conv2d(channels, channels // 4, 1)
        self.excite = nn.Conv2d(channels // 4, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        """``x`` ``(N, C, H, W)`` with its channels scaled; the same shape."""
        gates = self.excite(F.relu(self.squeeze(x.mean((2, 3), keepdim=True))))
        return x * torch.sigmoid(gates)


def build_network(size: int) -> nn.Module:
    """A CNN from images ``(N, 1, size, size)`` to logits ``(N, 28)``.

    It halves the image until 3 to 6 pixels are left, so that the pooled features depend on all of it:
    ten times from 4000 pixels, with 260,000 parameters.
    """
    num_halvings = max(5, int(math.log2(size / 3)))
    last = nn.Conv2d(64, 64, 3, stride=2, padding=1)
    nn.init.kaiming_normal_(last.weight, nonlinearity="relu")
    return nn.Sequential(
        _conv_norm_relu(1, 8, stride=2),
        _conv_norm_relu(8, 16, stride=2),
        _conv_norm_relu(16, 32, stride=2),
        SqueezeExcite(32),
        _conv_norm_relu(32, 32),
        _conv_norm_relu(32, 64, stride=2),
        *(_conv_norm_relu(64, 64, stride=2) for _ in range(num_halvings - 5)),
        # No norm here: it would give all images' features the same mean, which is what is pooled.
        last,
        nn.ReLU(inplace=True),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(64, NUM_CLASSES),
    )


def normalise(tile: Tensor) -> Tensor:
    """A uint8 tile as float32 from -1 to 1; the same shape."""
    return (tile.float() - 127.5) / 127.5


def run_demo(settings: DemoSettings, console: Console) -> DemoResult:
    """Make images, train on them, and report on ``console``; files go to ``settings.output``.

    Raises
    ------
    ValueError
        If a setting cannot be used.
    StreamError
        If the budget is too small, or an optional dependency is missing.
    """
    budget = parse_bytes(settings.budget)
    require("matplotlib.figure", extra="plots")  # fail now rather than after minutes of training
    images = _make_images(settings, console)
    torch.manual_seed(settings.seed)
    net = build_network(settings.size)
    model = StreamingModel(net, budget=budget, preprocess=normalise)
    plan = model.plan((1, 1, settings.size, settings.size))
    console.print(
        f"network: {format_count(sum(p.numel() for p in net.parameters()))} parameters; one update holds "
        f"{format_bytes(plan.plain_bytes)} in plain PyTorch, "
        f"the budget is {'none' if budget is None else format_bytes(budget)}",
        soft_wrap=True,
    )
    console.print(as_text(plan.explain()), soft_wrap=True)
    started = time.perf_counter()
    losses, measured = train(model, images, settings, console)
    seconds = time.perf_counter() - started
    predictions = predict(model, images)
    figure = settings.output / "demo.png"
    draw_tiles(images[0], predictions[0], plan, figure)
    labels = tuple(label for _, label in images)
    result = DemoResult(losses, labels, predictions, measured, seconds, figure)
    _print_result(result, settings, console)
    return result


def train(
    model: StreamingModel, images: LabelledImages, settings: DemoSettings, console: Console
) -> tuple[tuple[float, ...], int | None]:
    """Train with one update per image.

    Returns
    -------
    tuple of float
        Mean loss of each epoch.
    int or None
        The largest peak of any update in bytes; None if that of any update is unknown.
    """
    optimizer = torch.optim.AdamW(model.parameters(), lr=settings.learning_rate)
    losses: list[float] = []
    readings: list[int | None] = []
    model.train()
    with _progress(console, settings.epochs * len(images)) as progress:
        for epoch in range(1, settings.epochs + 1):
            started = time.perf_counter()
            total = 0.0
            for source, label in images:
                loss = F.cross_entropy(model(source), torch.tensor([label]))
                loss.backward()  # type: ignore[no-untyped-call]
                optimizer.step()
                optimizer.zero_grad()
                total += loss.item()
                report = model.last_report
                assert report is not None
                readings.append(report.measured_bytes)
                progress.advance(progress.task_ids[0])
            losses.append(total / len(images))
            seconds = format_duration(time.perf_counter() - started)
            progress.console.print(
                f"epoch {epoch:2d}/{settings.epochs}  loss {losses[-1]:.4f}  "
                f"peak {_format_reading(_peak(readings))}  {seconds}"
            )
    return tuple(losses), _peak(readings)


def predict(model: StreamingModel, images: LabelledImages) -> tuple[int, ...]:
    """Predict the class of each image in eval mode; the model stays in eval mode."""
    model.eval()
    with torch.no_grad():
        return tuple(int(model(source).argmax()) for source, _ in images)


def draw_tiles(image: tuple[ImageSource, int], prediction: int, plan: PlanView, path: Path) -> None:
    """Write a picture of the image with the plan's tile grid, its prediction and its label.

    Raises
    ------
    MissingExtra
        If matplotlib is not installed.
    CannotWrite
        If there is no room, or the folder may not be written to.
    """
    source, label = image
    _, height, width = source.shape
    step = max(1, max(height, width) // _FIGURE_PIXELS)
    pixels = sampled(source, step)[0]
    # A Figure rather than pyplot, which keeps figures and looks for a display.
    figure = require("matplotlib.figure", extra="plots").Figure(figsize=(8, 8.4), layout="constrained")
    axes = figure.add_subplot()
    axes.imshow(pixels, cmap="gray", extent=(0, width, height, 0), interpolation="nearest")
    tile_height, tile_width = plan.tile
    axes.hlines(range(tile_height, height, tile_height), 0, width, colors="tab:orange", linewidth=1)
    axes.vlines(range(tile_width, width, tile_width), 0, height, colors="tab:orange", linewidth=1)
    axes.set_title(
        f"{height}x{width} pixels in tiles of {tile_height}x{tile_width}: "
        f"predicted sum {prediction}, true sum {label}"
    )
    with writing(path):
        figure.savefig(path, dpi=130)


def _conv_norm_relu(channels_in: int, channels_out: int, *, stride: int = 1) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(channels_in, channels_out, 3, stride=stride, padding=1, bias=False),
        nn.BatchNorm2d(channels_out),
        nn.ReLU(inplace=True),
    )


def _make_images(settings: DemoSettings, console: Console) -> LabelledImages:
    # A folder for each kind of image, so that an earlier run's images can be reused.
    folder = settings.output / f"images-{settings.size}-{settings.seed}"
    spec = Spec(seed=settings.seed, recipe=Recipe.BALANCED, size=settings.size)
    for _ in generate(folder, spec, load_digits("uci"), num_train=settings.num_images, num_test=0, workers=0):
        pass
    dataset = TileDataset(folder, "train", positions=range(settings.num_images))
    images = [dataset[position][:2] for position in range(settings.num_images)]
    labels = ", ".join(str(label) for _, label in images)
    console.print(
        as_text(
            f"images: {len(images)} of {settings.size}x{settings.size} pixels in {folder}, "
            f"sums of digits {labels}"
        ),
        soft_wrap=True,
    )
    return images


@contextmanager
def _progress(console: Console, num_updates: int) -> Iterator[Progress]:
    """A progress bar on a terminal; elsewhere only the lines printed on its console."""
    with Progress(console=console, disable=not console.is_terminal, transient=True) as progress:
        progress.add_task("training", total=num_updates)
        yield progress


def _peak(readings: Sequence[int | None]) -> int | None:
    """The largest reading; None if one is missing, since that may be larger."""
    known = [reading for reading in readings if reading is not None]
    return max(known) if known and len(known) == len(readings) else None


def _format_reading(nbytes: int | None) -> str:
    return "unknown" if nbytes is None else format_bytes(nbytes)


def _print_result(result: DemoResult, settings: DemoSettings, console: Console) -> None:
    budget = parse_bytes(settings.budget)
    of_budget = "" if budget is None else f" of a budget of {format_bytes(budget)}"
    console.print(
        f"trained {plural(settings.epochs, 'epoch')} in {format_duration(result.seconds)}; "
        f"held at most {_format_reading(result.measured_bytes)}{of_budget}",
        soft_wrap=True,
    )
    for index, (prediction, label) in enumerate(zip(result.predictions, result.labels, strict=True)):
        verdict = "right" if prediction == label else "WRONG"
        console.print(f"image {index}: predicted {prediction:2d}, label {label:2d}  {verdict}")
    if result.overfitted:
        console.print(f"the network knows all {len(result.labels)} images by heart")
    else:
        console.print(
            f"the network knows only {result.num_right} of {len(result.labels)} images: "
            f"it did not overfit in {plural(settings.epochs, 'epoch')}; give more --epochs",
            soft_wrap=True,
        )
    console.print(as_text(f"figure: {result.figure}"), soft_wrap=True)
