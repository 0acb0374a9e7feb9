"""What came of all rows: the paper's tables with measured columns beside the published ones, and figures."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.harness.catalogue import load_methods
from benchmarks.harness.legibility import LEGIBLE_PIXELS, legibility_ceiling
from benchmarks.harness.method import Method
from benchmarks.harness.results import read, results_folder
from benchmarks.harness.scales import Scale
from streamcnn.data.ultramnist import Recipe
from streamcnn.support.disk import writing
from streamcnn.support.extras import require
from streamcnn.support.units import format_bytes, format_duration

PAPER_TABLES = {"Table 1": ("unrestricted", "11 GB"), "Table 4": ("24 GB, full", "24 GB, best")}
"""Columns of accuracies by the paper's table."""
_COLUMNS = tuple(
    "budget,method,backbone,input,legible,accuracy,seeds,batch,epochs,training,peak,start,note".split(",")
)
_NOTHING = "-"
_SETTING = ("budget", "device_kind", "pretrained", "images")
"""Fields of results whose runs are never averaged or joined by a line."""
_COLORS = ("#1f6feb", "#d97706", "#7b3fb5", "#16803c", "#c62828", "#0891b2", "#be185d", "#6b4f2a")


@dataclass(frozen=True, slots=True)
class Measured:
    """The runs of a method that differ in nothing but the seed."""

    method: Method
    runs: tuple[dict[str, Any], ...]

    @property
    def budget(self) -> int:
        """Bytes."""
        return int(self.runs[0]["budget"])

    @property
    def setting(self) -> tuple[Any, ...]:
        """What they have in common besides the method."""
        return tuple(self.runs[0][name] for name in _SETTING)

    @property
    def finished(self) -> list[dict[str, Any]]:
        """Those that ended with a score."""
        return [run for run in self.runs if run["outcome"] == "finished"]

    @property
    def accuracy(self) -> float | None:
        """Mean over seeds; None if no run finished."""
        found = [run["test_accuracy"] for run in self.finished]
        return statistics.mean(found) if found else None

    @property
    def spread(self) -> float | None:
        """Standard deviation over seeds; None of fewer than two."""
        found = [run["test_accuracy"] for run in self.finished]
        return statistics.stdev(found) if len(found) > 1 else None

    @property
    def peak_bytes(self) -> int:
        """The most that any run held, in training or inference."""
        readings = ("training_peak_bytes", "inference_peak_bytes")
        return max((run[name] or 0 for run in self.finished for name in readings), default=0)

    @property
    def outcome(self) -> str:
        """The accuracy in percent with its spread, or what happened instead."""
        if self.accuracy is None:
            return str(self.runs[0]["outcome"])
        spread = "" if self.spread is None else f" ± {100 * self.spread:.1f}"
        mark = "" if all(run["selected"] for run in self.finished) else "*"
        return f"{100 * self.accuracy:.1f}{spread}{mark}"

    @property
    def reason(self) -> str:
        """Why a run did not finish; nothing if all did."""
        return next((f"{run['outcome']}: {run['reason']}" for run in self.runs if run["reason"]), "")


def measured(scale: Scale) -> list[Measured]:
    """What was measured at a scale, by setting, then in the order of the methods."""
    methods, groups = load_methods(), dict[tuple[Any, ...], list[dict[str, Any]]]()
    for line in read(scale.name):
        if line["method"] in methods:
            groups.setdefault((*(line[name] for name in _SETTING), line["method"]), []).append(line)
    order = list(methods)
    return [
        Measured(methods[key[-1]], tuple(runs))
        for key, runs in sorted(groups.items(), key=lambda item: (item[0][:-1], order.index(item[0][-1])))
    ]


def write_table(scale: Scale, folder: Path | None = None) -> list[Path]:
    """Write ``table.md`` and the figures; where they are.

    Parameters
    ----------
    scale
        Whose results.
    folder
        Created where it is missing; None takes one beside the results.

    Raises
    ------
    CannotWrite
        If there is no room, or the folder may not be written to.
    """
    folder = results_folder(scale.name) if folder is None else folder
    found = measured(scale)
    written = [folder / "table.md"]
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        written[0].write_text(markdown(scale, found), encoding="utf-8")
        if any(each.finished for each in found):
            for name, draw in (("resolution.png", _against_resolution), ("memory.png", _against_memory)):
                figure = draw(scale, found)
                figure.savefig(folder / name, dpi=120, bbox_inches="tight")
                written.append(folder / name)
    return written


def markdown(scale: Scale, found: Sequence[Measured]) -> str:
    """The paper's tables and ours as Markdown."""
    lines = [
        f"# UltraMNIST at scale `{scale.name}`",
        "",
        f"{scale.num_train} training and {scale.num_test} test images of {scale.canvas} x {scale.canvas} "
        f"pixels, recipe `{scale.recipe.value}`, {scale.recipe.num_classes} classes, at most "
        f"{scale.epochs} epochs"
        + (f" ({scale.epochs_when_shrunk} on shrunk images)" if scale.epochs_when_shrunk else "")
        + ("" if scale.seconds is None else f" and {scale.seconds:.0f} s of training")
        + f". A guess is right in {100 / scale.recipe.num_classes:.1f} %.",
        "",
    ]
    lines += _measured_table(scale, found)
    lines += _paper_tables(scale, found)
    return "\n".join(lines) + "\n"


def _measured_table(scale: Scale, found: Sequence[Measured]) -> list[str]:
    """Everything that was measured."""
    lines = [
        "## Measured",
        "",
        "Accuracy on the test images in percent, with the standard deviation over seeds where there are "
        f"several. *Legible*: images whose digits all keep {LEGIBLE_PIXELS} pixels at that resolution. "
        "*Peak*: the most that was held in training or inference, weights and optimiser included. *Start*: "
        "random or pretrained weights. A star: time was over before a first validation, so the last weights "
        "were scored.",
        "",
        "| " + " | ".join(_COLUMNS) + " |",
        "|---" * len(_COLUMNS) + "|",
    ]
    for each in found:
        pixels = _resolution(each, scale)
        cells = [format_bytes(each.budget), each.method.name, each.method.family, f"{pixels}²"]
        cells += [f"{100 * legibility_ceiling(scale, pixels):.0f} %", each.outcome, *_costs(each)]
        cells += ["pretrained" if each.runs[0]["pretrained"] else "random", each.reason.replace("|", "/")]
        lines.append("| " + " | ".join(cells) + " |")
    return [*lines, ""]


def _costs(each: Measured) -> list[str]:
    """Seeds, batch, epochs, seconds and peak of the runs that finished."""
    if not each.finished:
        return [""] * 5
    finished, started = len(each.finished), len(each.runs)
    return [
        f"{finished}" if finished == started else f"{finished} of {started}",
        ", ".join(map(str, sorted({run["batch_size"] for run in each.finished}))),
        f"{statistics.mean(run['epochs'] for run in each.finished):.3g}",
        format_duration(statistics.mean(run["training_seconds"] for run in each.finished)),
        format_bytes(each.peak_bytes),
    ]


def _paper_tables(scale: Scale, found: Sequence[Measured]) -> list[str]:
    """The paper's tables with a column of ours for each budget."""
    settings = sorted({each.setting for each in found})
    ours = {(each.method.name, each.setting): each for each in found}
    caution = _caution(scale, found)
    lines: list[str] = []
    for title, columns in PAPER_TABLES.items():
        lines += [
            f"## The paper's {title}",
            "",
            "Published figures are those of arXiv 2206.12681, on 28,000 images of 4000 x 4000 pixels with "
            f"pretrained weights.{caution}",
            "",
            "| method | backbone | input | "
            + " | ".join([f"published, {c}" for c in columns] + [f"ours, {_shown(s)}" for s in settings])
            + " | note |",
            "|---" * (4 + len(columns) + len(settings)) + "|",
        ]
        for name, method in load_methods().items():
            published = [method.published.get(column, _NOTHING) for column in columns]
            cells = [ours.get((name, setting)) for setting in settings]
            if title != next(iter(PAPER_TABLES)) and not any(p != _NOTHING for p in published):
                continue
            shown = [_NOTHING if cell is None else cell.outcome for cell in cells]
            lines.append(
                "| "
                + " | ".join([name, method.family, method.input_text, *published, *shown, method.note])
                + " |"
            )
        lines.append("")
    return lines


def _caution(scale: Scale, found: Sequence[Measured]) -> str:
    """Why ours and the published figures are not to be compared, if so."""
    if scale.recipe is Recipe.SINGLE:
        return " Ours are of another, easier task, and not to be compared with them."
    if scale.num_train < 28_000:
        return f" Ours are of the same task with {scale.num_train} images, and not to be compared with them."
    digits = sorted({str(run["digits"]) for each in found for run in each.runs})
    if digits and digits != ["mnist"]:
        return f" Ours show other digits ({', '.join(digits)}), and are not to be compared with them."
    return ""


def _shown(setting: tuple[Any, ...]) -> str:
    """A setting in a column's head."""
    budget, device, pretrained, _ = setting
    return f"{budget / 1e9:g} GB, {device}, {'pretrained' if pretrained else 'random'} weights"


def _resolution(each: Measured, scale: Scale) -> int:
    """Height and width in pixels that a method's network sees."""
    return scale.canvas if each.method.resolution is None else scale.pixels(each.method.resolution)


def _against_resolution(scale: Scale, found: Sequence[Measured]) -> Any:
    """Accuracy against resolution, a line for each backbone, and the legibility ceiling."""
    figure, axes = _figure("accuracy against resolution", scale)
    good = [each for each in found if each.finished]
    colors = _colors(good)
    for points in _series(good):
        points.sort(key=lambda each: _resolution(each, scale))
        method = points[0].method
        axes.errorbar(
            [_resolution(each, scale) for each in points],
            [100 * (each.accuracy or 0) for each in points],
            yerr=[100 * (each.spread or 0) for each in points],
            fmt=method.marker,
            markersize=13 if method.stands_out else 6,
            capsize=3,
            color=colors[method.family],
            label=f"{method.family}, {method.label}" if method.label else method.family,
        )
    ends = sorted({_resolution(each, scale) for each in good} | {scale.canvas})
    steps = [round(ends[0] * (ends[-1] / ends[0]) ** (k / 40)) for k in range(41)] if len(ends) > 1 else ends
    axes.plot(
        steps,
        [100 * legibility_ceiling(scale, x) for x in steps],
        "--",
        color="#8a94a6",
        label=f"all digits keep {LEGIBLE_PIXELS} pixels",
    )
    axes.set_xscale("log", base=2)
    axes.set_xticks(ends, [str(x) for x in ends])
    axes.minorticks_off()
    axes.set_xlabel("height and width of what the network sees, pixels")
    _finish(axes, scale)
    return figure


def _against_memory(scale: Scale, found: Sequence[Measured]) -> Any:
    """Accuracy against peak memory, and the budgets."""
    figure, axes = _figure("accuracy against peak memory", scale)
    good = [each for each in found if each.finished]
    palette = require("matplotlib", extra="plots").colormaps["tab20"]
    for index, each in enumerate(good):
        axes.plot(
            each.peak_bytes / 2**20,
            100 * (each.accuracy or 0),
            each.method.marker[0],
            markersize=13 if each.method.stands_out else 7,
            color=palette(index % 20),
            label=each.method.name,
        )
    for budget in sorted({each.budget for each in found}):
        axes.axvline(budget / 2**20, color="#c62828", linestyle="--")
        axes.annotate(
            f"budget {format_bytes(budget)}",
            (budget / 2**20, 102),
            (-6, 0),
            textcoords="offset points",
            ha="right",
            fontsize=8,
            color="#c62828",
        )
    axes.set_xlim(left=0)
    axes.set_xlabel("peak memory in training and inference, MiB")
    _finish(axes, scale)
    return figure


def _colors(found: Sequence[Measured]) -> dict[str, str]:
    families = dict.fromkeys(each.method.family for each in found)
    return {family: _COLORS[index % len(_COLORS)] for index, family in enumerate(families)}


def _series(found: Sequence[Measured]) -> list[list[Measured]]:
    """What is joined by a line: results of one backbone and kind, in one setting."""
    series: dict[tuple[str, str, tuple[Any, ...]], list[Measured]] = {}
    for each in found:
        series.setdefault((each.method.family, each.method.kind, each.setting), []).append(each)
    return list(series.values())


def _figure(title: str, scale: Scale) -> tuple[Any, Any]:
    figure = require("matplotlib.figure", extra="plots").Figure(figsize=(8, 5), layout="constrained")
    axes = figure.add_subplot()
    axes.set_title(f"UltraMNIST, scale {scale.name}: {title}")
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _finish(axes: Any, scale: Scale) -> None:
    chance = 100 / scale.recipe.num_classes
    axes.axhline(chance, color="#8a94a6", linestyle=":", label="a guess")
    axes.set_ylim(0, 108)
    axes.set_ylabel("accuracy on the test images, %")
    axes.legend(frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))
