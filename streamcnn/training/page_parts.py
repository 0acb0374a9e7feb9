"""Figures and pictures of a run's page, as HTML."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from typing import Any

from streamcnn.support.extras import require
from streamcnn.support.text import html_text as escape

BLUE, ORANGE, GREEN, RED, GREY = "#1f6feb", "#d9730d", "#2e7d32", "#c62828", "#8a94a6"
EDGE = 260
"""Of pictures of images, in pixels."""


def axes_over(label: str) -> tuple[Any, Any]:
    """A figure of matplotlib and its axes, whose x-axis has whole numbers.

    Raises
    ------
    MissingExtra
        If matplotlib is not installed.
    """
    figure = require("matplotlib.figure", extra="plots").Figure(figsize=(4.6, 3.0), layout="constrained")
    axes = figure.subplots()
    axes.set_xlabel(label)
    axes.grid(color="#dde2e8")
    axes.spines[["top", "right"]].set_visible(False)
    axes.xaxis.get_major_locator().set_params(integer=True)
    return axes, figure


def percentages(epochs: Sequence[Mapping[str, Any]], caption: str, curves: Mapping[str, str]) -> str:
    """A figure of percentages over the epochs; ``curves`` maps fields of the log's lines to labels."""
    numbers = [line["epoch"] + 1 for line in epochs]
    axes, figure = axes_over("epoch")
    for (name, label), color in zip(curves.items(), (BLUE, ORANGE, GREEN), strict=False):
        axes.plot(numbers, [100 * line[name] for line in epochs], ".-", color=color, label=label)
    axes.set_ylim(-2, 102)  # points on the edges are shown whole
    axes.set_ylabel("%")
    add_legend(axes)
    return drawn(caption, figure)


def add_legend(axes: Any) -> None:
    """Add a legend above the frame, where it covers no curve."""
    axes.legend(loc="lower right", bbox_to_anchor=(1, 1), ncols=3, frameon=False, handlelength=1.2)


def drawn(caption: str, figure: Any) -> str:
    """A figure of matplotlib as HTML, with its caption."""
    png = io.BytesIO()
    figure.savefig(png, format="png", dpi=160)
    return f"<figure><figcaption>{escape(caption)}</figcaption>{_embedded(png, 'png', caption)}</figure>"


def embedded(picture: Any, description: str, *, kind: str = "png") -> str:
    """A picture of Pillow as an HTML image, embedded as ``"png"`` or ``"jpeg"``."""
    encoded = io.BytesIO()
    picture.save(encoded, format=kind.upper())
    return _embedded(encoded, kind, description)


def _embedded(content: io.BytesIO, kind: str, description: str) -> str:
    encoded = base64.b64encode(content.getvalue()).decode()
    return f'<img src="data:image/{kind};base64,{encoded}" alt="{escape(description)}">'
