"""The page of a run: how it went, what it takes for what, and pictures of what it takes wrongly.

It is made from the run's log and its validation images alone, at the end of a run or at any time before.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from streamcnn.data.dataset import ImageDataset
from streamcnn.data.thumbnails import thumbnail
from streamcnn.errors import RunMismatch
from streamcnn.support.atomic import replace_file
from streamcnn.support.disk import writing
from streamcnn.support.extras import require
from streamcnn.support.html import html_page
from streamcnn.support.text import html_text as escape
from streamcnn.support.units import format_bytes, format_duration
from streamcnn.training.log import read_log
from streamcnn.training.runs import RunConfig, read_run

REPORT = "report.html"
MAX_MISTAKES = 24
"""Pictures of mistakes on the page."""
_EDGE = 260
_BLUE, _ORANGE, _RED = "#1f6feb", "#d9730d", "#c62828"

Line = Mapping[str, Any]


def write_report(folder: Path) -> Path:
    """Write the page of the run in ``folder`` there; its path.

    Raises
    ------
    RunMismatch
        If there is no run, or none of its epochs is over, or its validation images are others now.
    MissingExtra
        If matplotlib is not installed.
    CannotWrite
        If there is no room, or the folder may not be written to.
    """
    config = read_run(folder)
    _, validation = config.datasets()
    page = render_report(config, read_log(folder), validation)
    with writing(folder / REPORT, needed=len(page.encode())):
        replace_file(folder / REPORT, page, concurrent=True)
    return folder / REPORT


def render_report(config: RunConfig, lines: Sequence[Line], validation: ImageDataset) -> str:
    """The page as HTML.

    Parameters
    ----------
    config
        Of the run.
    lines
        Of its log.
    validation
        The images that its weights were chosen by.

    Raises
    ------
    RunMismatch
        If none of its epochs is over, or the validation images are others.
    MissingExtra
        If matplotlib is not installed.
    """
    epochs = [line for line in lines if line["kind"] == "epoch"]
    updates = [line for line in lines if line["kind"] == "update"]
    if not epochs:
        raise RunMismatch("no epoch of the run is over: train it on")
    best = max(epochs, key=lambda line: line["validation_accuracy"])
    if len(best["predictions"]) != len(validation):
        raise RunMismatch(
            f"the run was validated by {len(best['predictions'])} images, there are {len(validation)} now: "
            "give it back the images that it began with"
        )
    title = f"{config.model} on {Path(config.data).name}"
    wrong = [at for at, found in enumerate(best["predictions"]) if found != validation.labels[at]]
    body = "\n".join(
        [
            f"<h1>{escape(title)}</h1>",
            f'<p class="headline">{escape(_headline(best, updates, config))}</p>',
            f'<div class="figures">{_accuracy(epochs)}{_loss(epochs)}{_memory(updates, config)}</div>',
            "<h2>Which class is taken for which</h2>",
            _confusion(best["predictions"], validation),
            f"<h2>{len(wrong)} of {len(validation)} validation images are taken wrongly</h2>",
            _mistakes(wrong[:MAX_MISTAKES], best["predictions"], validation),
            f"<details><summary>Settings</summary><pre>{escape(_settings(config))}</pre></details>",
        ]
    )
    return html_page(f"Training: {title}", _STYLE, body, also_allowed="img-src data:")


_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #1c2430; max-width: 1240px; margin: 24px auto;
  padding: 0 20px; }
h1 { font-size: 22px; margin: 0; }
h2 { font-size: 17px; margin: 28px 0 8px; }
.headline { font-size: 17px; margin: 4px 0 18px; }
.figures { display: flex; flex-wrap: wrap; gap: 16px; }
.figures figure { flex: 1 1 320px; margin: 0; min-width: 0; }
.figures img { width: 100%; }
figcaption { font-weight: 600; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: 13px; font-variant-numeric: tabular-nums; }
th { color: #5b6675; font-weight: 400; padding: 2px 7px; text-align: right; }
td { text-align: center; min-width: 22px; padding: 2px 5px; border: 1px solid #eef1f4; }
td.right { outline: 1px solid #8a94a6; outline-offset: -2px; }
.mistakes { display: flex; flex-wrap: wrap; gap: 16px; }
.mistakes figure { margin: 0; font-size: 13px; width: 260px; overflow-wrap: anywhere; }
.mistakes figcaption span { font-weight: 400; color: #5b6675; }
pre { background: #f5f7fa; padding: 12px; overflow-x: auto; font-size: 12px; }
summary { cursor: pointer; margin-top: 24px; }
"""


def _headline(best: Line, updates: Sequence[Line], config: RunConfig) -> str:
    seconds = sum(line["seconds"] for line in updates)
    speed = sum(line["megapixels_per_second"] * line["seconds"] for line in updates) / seconds
    text = (
        f"Best validation accuracy {best['validation_accuracy']:.1%}, after epoch {best['epoch'] + 1}; "
        f"{len(updates)} updates in {format_duration(seconds)}, {speed:.2g} megapixels per second"
    )
    measured = [line["measured_bytes"] for line in updates if line["measured_bytes"] is not None]
    if measured:
        limit = "" if config.budget is None else f" of the {format_bytes(config.budget)} allowed"
        text += f"; at most {format_bytes(max(measured))}{limit}"
    return text + "."


def _accuracy(epochs: Sequence[Line]) -> str:
    numbers = [line["epoch"] + 1 for line in epochs]
    axes, figure = _axes("epoch")
    axes.plot(numbers, [100 * line["accuracy"] for line in epochs], ".-", color=_BLUE, label="training")
    validated = [100 * line["validation_accuracy"] for line in epochs]
    axes.plot(numbers, validated, ".-", color=_ORANGE, label="validation")
    axes.set_ylim(0, 102)
    axes.set_ylabel("%")
    axes.legend()
    return _figure("Accuracy", figure)


def _loss(epochs: Sequence[Line]) -> str:
    numbers = [line["epoch"] + 1 for line in epochs]
    axes, figure = _axes("epoch")
    axes.plot(numbers, [line["loss"] for line in epochs], ".-", color=_BLUE, label="training")
    axes.plot(numbers, [line["validation_loss"] for line in epochs], ".-", color=_ORANGE, label="validation")
    axes.set_ylim(bottom=0)
    axes.legend()
    return _figure("Loss (mean cross-entropy)", figure)


def _memory(updates: Sequence[Line], config: RunConfig) -> str:
    known = [line for line in updates if line["measured_bytes"] is not None]
    if not known:
        return ""
    mebi = 2**20
    axes, figure = _axes("update")
    numbers = [line["update"] for line in known]
    for name, color in (("measured", _BLUE), ("projected", "#8a94a6")):
        values = [line[f"{name}_bytes"] / mebi for line in known]
        axes.plot(numbers, values, "." if len(known) == 1 else "-", color=color, label=name)
    if config.budget is not None:
        axes.axhline(config.budget / mebi, color=_RED, label="budget")
    # Room for the budget's line below the frame.
    axes.set_ylim(0, 1.1 * axes.get_ylim()[1])
    axes.set_ylabel("MiB")
    axes.legend()
    return _figure("Peak memory of each update", figure)


def _axes(label: str) -> tuple[Any, Any]:
    figure = require("matplotlib.figure", extra="plots").Figure(figsize=(4.6, 3.0), layout="constrained")
    axes = figure.subplots()
    axes.set_xlabel(label)
    axes.grid(color="#dde2e8")
    axes.spines[["top", "right"]].set_visible(False)
    axes.xaxis.get_major_locator().set_params(integer=True)
    return axes, figure


def _figure(caption: str, figure: Any) -> str:
    drawn = io.BytesIO()
    figure.savefig(drawn, format="png", dpi=160)
    return f"<figure><figcaption>{escape(caption)}</figcaption>{_image(drawn, caption)}</figure>"


def _image(png: io.BytesIO, description: str) -> str:
    encoded = base64.b64encode(png.getvalue()).decode()
    return f'<img src="data:image/png;base64,{encoded}" alt="{escape(description)}">'


def _confusion(predictions: Sequence[int], images: ImageDataset) -> str:
    """Rows are labels, columns are what they are taken for."""
    num_classes = max(images.num_classes, 1 + max(predictions))
    counts = [[0] * num_classes for _ in range(num_classes)]
    for label, found in zip(images.labels, predictions, strict=True):
        counts[label][found] += 1
    heads = "".join(f'<th scope="col">{escape(_name(images, found))}</th>' for found in range(num_classes))
    rows = "".join(
        f'<tr><th scope="row">{escape(_name(images, label))}</th>'
        + "".join(_cell(count, sum(row), right=label == found) for found, count in enumerate(row))
        + "</tr>"
        for label, row in enumerate(counts)
    )
    caption = "Rows: labels. Columns: what the images are taken for. The deeper, the larger the row's share."
    return f'<p>{caption}</p><div class="scroll"><table><tr><th></th>{heads}</tr>{rows}</table></div>'


def _cell(count: int, total: int, *, right: bool) -> str:
    share = count / total if total else 0.0
    color = "31, 111, 235" if right else "198, 40, 40"
    style = f"background: rgba({color}, {0.75 * share:.2f})"
    kind = ' class="right"' if right else ""
    return f'<td{kind} style="{style}">{count or ""}</td>'


def _mistakes(wrong: Sequence[int], predictions: Sequence[int], images: ImageDataset) -> str:
    return f'<div class="mistakes">{"".join(_mistake(at, predictions[at], images) for at in wrong)}</div>'


def _mistake(position: int, found: int, images: ImageDataset) -> str:
    source, label, *_ = images[position]
    drawn = io.BytesIO()
    thumbnail(source, _EDGE, images.truth(position) or ()).save(drawn, format="PNG")
    name = images.names[position]
    caption = f"{escape(f'{_name(images, label)}, taken for {_name(images, found)}')}<br>"
    caption += f"<span>{escape(name)}</span>"
    return f"<figure>{_image(drawn, name)}<figcaption>{caption}</figcaption></figure>"


def _name(images: ImageDataset, label: int) -> str:
    return str(label) if images.classes is None or label >= len(images.classes) else images.classes[label]


def _settings(config: RunConfig) -> str:
    values = config.to_dict()
    return "\n".join(f"{name}: {value}" for name, value in {**values, **values.pop("settings")}.items())
