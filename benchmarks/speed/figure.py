"""A result as a picture: seconds against memory, streamcnn as a curve through its budgets."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from benchmarks.speed.results import Result, Row
from streamcnn.profiling.scales import bytes_ticks
from streamcnn.support.extras import require

_COLORS = ("#7b3fb5", "#c62828", "#d97706", "#16803c", "#0891b2", "#be185d")
_MARKERS = "sDv^Ph"
_STREAMED_COLOR = "#1f6feb"
_MEMORY = {"cpu": "peak resident memory above the start", "cuda": "peak memory of the process on the card"}
_ROOM = 1.12


def write_figure(result: Result, folder: Path) -> Path:
    """Draw a result into ``speed_<case>_<cpu or cuda>.png`` of a folder; where that is.

    Raises
    ------
    MissingExtra
        If matplotlib is not installed.
    """
    name = re.sub(r"[^a-z0-9]+", "_", f"{result.case} {result.device_kind}".lower()).strip("_")
    path = folder / f"speed_{name}.png"
    folder.mkdir(parents=True, exist_ok=True)
    figure(result).savefig(path, dpi=130)
    return path


def figure(result: Result) -> Any:
    """Median seconds against peak memory, a matplotlib ``Figure``; bars reach from the least to the most."""
    # A Figure of its own rather than pyplot, which keeps figures and looks for a display.
    figure = require("matplotlib.figure", extra="plots").Figure(figsize=(7.5, 5.4), layout="constrained")
    axes = figure.add_subplot()
    axes.set_title(f"{result.case}\n{result.device}", fontsize="medium", parse_math=False)
    axes.spines[["top", "right"]].set_visible(False)
    rows = [row for row in result.finished if result.memory(row) is not None]
    others = [row for row in rows if row.budget is None]
    for index, row in enumerate(others):
        color, marker = _COLORS[index % len(_COLORS)], _MARKERS[index % len(_MARKERS)]
        _draw(axes, result, [row], color, marker, row.label)
    for kind in dict.fromkeys(row.kind for row in rows if row.budget is not None):
        curve = [row for row in rows if row.kind == kind]
        _draw(axes, result, curve, _STREAMED_COLOR, "o-" if kind == "streamed" else "o--", _name(curve[0]))
        _name_budgets(axes, result, curve)
    _scale(axes, result, rows)
    figure.legend(frameon=False, loc="outside lower center", ncols=2)
    return figure


def _draw(axes: Any, result: Result, rows: list[Row], color: str, marker: str, label: str) -> None:
    """Points with their spread, joined in the order of memory."""
    rows = sorted(rows, key=lambda row: result.memory(row) or 0)
    medians = [result.seconds(row) for row in rows]
    below = [median - min(row.values("seconds")) for row, median in zip(rows, medians, strict=True)]
    above = [max(row.values("seconds")) - median for row, median in zip(rows, medians, strict=True)]
    memory = [result.memory(row) for row in rows]
    axes.errorbar(memory, medians, (below, above), fmt=marker, color=color, capsize=3, label=label)


def _name_budgets(axes: Any, result: Result, rows: list[Row]) -> None:
    for row in rows:
        point = (result.memory(row), result.seconds(row))
        axes.annotate(
            row.budget, point, (7, 5), textcoords="offset points", fontsize=8, color=_STREAMED_COLOR
        )


def _scale(axes: Any, result: Result, rows: list[Row]) -> None:
    """Axes from zero, memory in binary units."""
    most = max((result.memory(row) or 0 for row in rows), default=1)
    slowest = max((max(row.values("seconds")) for row in rows), default=1)
    axes.set_xlim(0, _ROOM * most)
    axes.set_ylim(0, _ROOM * slowest)
    axes.set_xticks(*zip(*bytes_ticks(int(_ROOM * most)), strict=True))
    axes.set_xlabel(_MEMORY[result.device_kind])
    axes.set_ylabel("time of a pass [s]")


def _name(row: Row) -> str:
    """The label of a streamed kind without its budget, which stands at each point."""
    return row.label.removesuffix(f", {row.budget}") + ", budget by budget"
