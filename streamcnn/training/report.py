"""The page of a run: its curves, and what its task shows of the best weights.

The page is made from the run's folder and its validation images, at the end of a run or at any time before.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from streamcnn.data.dataset import Images
from streamcnn.errors import RunMismatch
from streamcnn.support.atomic import replace_file
from streamcnn.support.disk import writing
from streamcnn.support.html import html_page
from streamcnn.support.text import html_text as escape
from streamcnn.support.units import format_bytes, format_duration, plural
from streamcnn.training.config import RunConfig
from streamcnn.training.log import read_log
from streamcnn.training.page_parts import BLUE, GREY, ORANGE, RED, add_legend, axes_over, drawn
from streamcnn.training.runs import read_run
from streamcnn.training.task import Task

REPORT = "report.html"

Line = Mapping[str, Any]


def write_report(folder: Path) -> Path:
    """Write the page of the run in ``folder`` into that folder, and return the page's path.

    Raises
    ------
    RunMismatch
        If there is no run, none of its epochs is over, or its validation images have changed.
    MissingExtra
        If matplotlib is not installed.
    CannotWrite
        If there is no room, or the folder may not be written to.
    """
    config = read_run(folder)
    _, validation = config.datasets()
    page = render_report(config, read_log(folder), validation, folder)
    with writing(folder / REPORT, needed=len(page.encode())):
        replace_file(folder / REPORT, page, concurrent=True)
    return folder / REPORT


def best_epoch(task: Task[Any], lines: Sequence[Line]) -> Line:
    """The line of the best epoch in a run's log.

    Raises
    ------
    RunMismatch
        If none of its epochs is over, or the log is of another task.
    """
    epochs = [line for line in lines if line["kind"] == "epoch"]
    if not epochs:
        raise RunMismatch("no epoch of the run is over: train it on")
    if any(task.detail not in line for line in epochs):
        raise RunMismatch(f"the log is not of a {task.name}: put back what `streamcnn train` wrote")
    return max(epochs, key=lambda line: line[task.logged])


def render_report(
    config: RunConfig, lines: Sequence[Line], validation: Images, folder: Path | None = None
) -> str:
    """The page of a run as HTML.

    Parameters
    ----------
    config
        The run's configuration.
    lines
        The lines of its log.
    validation
        The images by which its weights were chosen.
    folder
        The run's folder, for what it has kept besides the log; None if nothing is kept.

    Raises
    ------
    RunMismatch
        If none of its epochs is over, or the log was written for other validation images.
    MissingExtra
        If matplotlib is not installed.
    """
    task = config.make_task()
    best = best_epoch(task, lines)
    epochs = [line for line in lines if line["kind"] == "epoch"]
    updates = [line for line in lines if line["kind"] == "update"]
    title = f"{config.model} on {Path(config.data).name}"
    found = task.shown(epochs, best, validation, folder)
    curves = f"{found.curves}{_loss(epochs, task.loss_name)}{_memory(updates, config)}"
    body = "\n".join(
        [
            f"<h1>{escape(title)}</h1>",
            f'<p class="headline">{escape(_headline(task, best, updates, config))}</p>',
            f'<div class="figures">{curves}</div>',
            found.results,
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
th.name, td.name { text-align: left; overflow-wrap: anywhere; }
.legend { display: flex; flex-wrap: wrap; gap: 2px 16px; overflow-wrap: anywhere; }
.chip { display: inline-block; width: 14px; height: 14px; vertical-align: middle; }
.triples { display: flex; flex-wrap: wrap; gap: 20px 32px; }
.triples figure { margin: 0; display: flex; flex-wrap: wrap; gap: 6px; font-size: 13px; color: #5b6675; }
.triples figcaption { flex-basis: 100%; color: #1c2430; overflow-wrap: anywhere; }
pre { background: #f5f7fa; padding: 12px; overflow-x: auto; font-size: 12px; }
summary { cursor: pointer; margin-top: 24px; }
"""


def _headline(task: Task[Any], best: Line, updates: Sequence[Line], config: RunConfig) -> str:
    seconds = sum(line["seconds"] for line in updates)
    speed = sum(line["megapixels_per_second"] * line["seconds"] for line in updates) / seconds
    text = (
        f"Best validation {task.measure} {best[task.logged]:.1%}, after epoch {best['epoch'] + 1}; "
        f"{plural(len(updates), 'update')} in {format_duration(seconds)}, {speed:.2g} megapixels per second"
    )
    measured = [line["measured_bytes"] for line in updates if line["measured_bytes"] is not None]
    if measured:
        limit = "" if config.budget is None else f" of the {format_bytes(config.budget)} allowed"
        text += f"; at most {format_bytes(max(measured))}{limit}"
    return text + "."


def _loss(epochs: Sequence[Line], name: str) -> str:
    numbers = [line["epoch"] + 1 for line in epochs]
    axes, figure = axes_over("epoch")
    axes.plot(numbers, [line["loss"] for line in epochs], ".-", color=BLUE, label="training")
    axes.plot(numbers, [line["validation_loss"] for line in epochs], ".-", color=ORANGE, label="validation")
    axes.set_ylim(0, 1.05 * axes.get_ylim()[1])
    add_legend(axes)
    return drawn(f"Loss (mean {name})", figure)


def _memory(updates: Sequence[Line], config: RunConfig) -> str:
    known = [line for line in updates if line["measured_bytes"] is not None]
    if not known:
        return ""
    mebi = 2**20
    axes, figure = axes_over("update")
    numbers = [line["update"] for line in known]
    for name, color in (("measured", BLUE), ("projected", GREY)):
        values = [line[f"{name}_bytes"] / mebi for line in known]
        axes.plot(numbers, values, "." if len(known) == 1 else "-", color=color, label=name)
    if config.budget is not None:
        axes.axhline(config.budget / mebi, color=RED, label="budget")
    # Room for the budget's line below the frame.
    axes.set_ylim(0, 1.1 * axes.get_ylim()[1])
    axes.set_ylabel("MiB")
    add_legend(axes)
    return drawn("Peak memory of each update", figure)


def _settings(config: RunConfig) -> str:
    """All settings as text, a line ``name: value`` each, as in JSON; nested names are joined by dots."""
    values = config.to_dict()
    values |= values.pop("settings")
    if config.budget is not None:
        values["budget"] = f"{config.budget} ({format_bytes(config.budget)})"
    return "\n".join(f"{name}: {text}" for name, text in _lines(values))


def _lines(values: Mapping[str, Any], within: str = "") -> Iterator[tuple[str, str]]:
    for name, value in values.items():
        if isinstance(value, dict) and value:
            yield from _lines(value, f"{within}{name}.")
        else:
            text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
            yield f"{within}{name}", text
