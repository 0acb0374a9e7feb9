"""The page of an explanation: a viewer of Deep Zoom pyramids in one HTML file, without a server."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from streamcnn.attribution.pyramid import TILE, Pyramid
from streamcnn.attribution.template import SCRIPT, STYLE
from streamcnn.support.html import html_page
from streamcnn.support.text import html_text as escape
from streamcnn.support.units import format_bytes, format_duration

if TYPE_CHECKING:
    from streamcnn.attribution.explanation import Facts

_STOPS = 16
"""Number of colours in the legend."""


def render_page(
    facts: Facts, image: Pyramid, heat: Pyramid, table: NDArray[np.uint8], *, is_signed: bool
) -> str:
    """The page as HTML, to be stored beside the pyramids' files.

    Parameters
    ----------
    table
        Colours (n, 4) of the heat map, from the smallest value to the largest.
    is_signed
        Whether the colours range from ``-limit`` to ``limit``, rather than from 0.
    """
    data = {
        "tile": TILE,
        "layers": [_layer(image), _layer(heat)],
        "grid": {"rows": facts.tile_rows, "cols": facts.tile_cols},
    }
    shown = json.dumps(data, separators=(",", ":")).replace("<", "\\u003c")
    title = f"{facts.target_name}: {facts.image}"
    body = "\n".join(
        [
            '<main><canvas id="view" tabindex="0" aria-label="Image and heat map"></canvas>',
            '<div id="zoom"><button data-zoom="2" title="Zoom in (+)">+</button>'
            '<button data-zoom="0.5" title="Zoom out (-)">&minus;</button>'
            '<button data-zoom="0" title="Whole image (0)">&#x2922;</button></div>',
            '<p id="place" aria-live="off"></p></main>',
            f"<aside>{_head(facts)}{_predictions(facts)}{_controls(facts)}"
            f"{_legend(table, is_signed=is_signed)}{_details(facts)}{_KEYS}</aside>",
            f'<script type="application/json" id="data">{shown}</script>',
            f"<script>{SCRIPT}</script>",
        ]
    )
    allowed = "script-src 'unsafe-inline'; img-src 'self' file:"
    return html_page(title, STYLE, body, also_allowed=allowed)


_KEYS = (
    '<p class="note">Drag to move, turn the wheel to zoom. Keys: <kbd>+</kbd> <kbd>&minus;</kbd> zoom, '
    "<kbd>0</kbd> whole image, arrows move, <kbd>h</kbd> heat map, <kbd>t</kbd> tiles.</p>"
)


def _layer(pyramid: Pyramid) -> dict[str, Any]:
    height, width = pyramid.size
    return {
        "name": pyramid.name,
        "ending": pyramid.ending,
        "height": height,
        "width": width,
        "last": pyramid.last,
    }


def _head(facts: Facts) -> str:
    return f'<h1>{escape(facts.target_name)}</h1><p class="file">{escape(facts.image)}</p>'


def _predictions(facts: Facts) -> str:
    rows = "".join(
        f"<li{' class=target' if name == facts.target_name else ''}><span>{escape(name)}</span>"
        f'<meter min="0" max="1" value="{share:.6f}"></meter><b>{share:.1%}</b></li>'
        for name, share in facts.predictions
    )
    return f"<h2>Prediction</h2><ol>{rows}</ol>"


def _controls(facts: Facts) -> str:
    tiles = (len(facts.tile_rows) + 1) * (len(facts.tile_cols) + 1)
    return (
        '<h2>Shown</h2><label class="row"><input type="checkbox" id="heat" checked> Heat map</label>'
        '<label class="row">Opacity <input type="range" id="opacity" min="0" max="100" value="65">'
        '<output id="percent">65%</output></label>'
        f'<label class="row"><input type="checkbox" id="grid"> Tiles of the plan ({tiles})</label>'
    )


def _legend(table: NDArray[np.uint8], *, is_signed: bool) -> str:
    """The legend as HTML: the colours as they appear over a white image."""
    at = np.linspace(0, len(table) - 1, _STOPS).round().astype(int)
    stops = ",".join(f"rgb({r} {g} {b} / {a / 255:.2f})" for r, g, b, a in table[at])
    ends = ("against", "for it") if is_signed else ("none", "most")
    return (
        f'<div class="legend" style="background-image: linear-gradient(to right,{stops})"></div>'
        f'<p class="ends"><span>{ends[0]}</span><span>{ends[1]}</span></p>'
    )


def _details(facts: Facts) -> str:
    rows = "".join(f"<dt>{escape(name)}</dt><dd>{escape(value)}</dd>" for name, value in _described(facts))
    return f"<h2>How</h2><dl>{rows}</dl>"


def _described(facts: Facts) -> Iterator[tuple[str, str]]:
    channels, height, width = facts.shape
    yield "width, height", f"{width}, {height} pixels"
    yield "channels", str(channels)
    yield "model", facts.model
    yield "method", facts.method
    if facts.layer is not None:
        yield "layer", facts.layer
    for name, value in facts.options.items():
        yield name.replace("_", " "), str(value)
    yield "time", format_duration(facts.seconds)
    yield "budget", "none" if facts.budget is None else format_bytes(facts.budget)
