"""The page of a profile: one self-contained HTML file, for a browser without a network."""

from __future__ import annotations

import json
from collections.abc import Sequence

from streamcnn.profiling.chart import draw_memory_chart, draw_time_chart
from streamcnn.profiling.plan_drawing import draw_plan
from streamcnn.profiling.template import SCRIPT, STYLE
from streamcnn.profiling.tile_profile import TileProfile, fastest
from streamcnn.profiling.timeline_chart import OTHERS, draw_timeline, highest, phase_color, timeline_data
from streamcnn.support.html import html_page
from streamcnn.support.text import html_text as escape
from streamcnn.support.units import format_bytes, format_duration

COLUMNS = ("tile", "projected", "measured", "time", "recomputation", "moved", "verdict")
"""Headings of the table, here and on the terminal."""


def cells(profile: TileProfile) -> tuple[str, ...]:
    """The values of a profile as text, one for each of ``COLUMNS``."""
    return (
        str(profile.tile),
        format_bytes(profile.projected_bytes),
        _known(profile.measured_bytes),
        "not run" if profile.seconds is None else format_duration(profile.seconds),
        f"{profile.recomputation:.2f}x",
        _known(profile.bytes_moved),
        _verdict(profile),
    )


def describe(profiles: Sequence[TileProfile], model: str, shape: tuple[int, int, int, int]) -> str:
    """One line that says model, size and budget."""
    batch, channels, height, width = shape
    budget = profiles[0].budget
    limit = "no budget" if budget is None else f"budget {format_bytes(budget)}"
    images = "image" if batch == 1 else f"images, {batch} at once"
    return f"{model}, {height}x{width}x{channels} {images}, {limit}"


def render_page(profiles: Sequence[TileProfile], model: str, shape: tuple[int, int, int, int]) -> str:
    """The page as HTML; ``#tile=512`` after its address selects that tile size.

    Parameters
    ----------
    profiles
        One for each tile size.
    model, shape
        The model's name, and the shape of the batch, ``(N, C, H, W)`` in pixels.

    Raises
    ------
    ValueError
        If there is no profile.
    """
    if not profiles:
        raise ValueError("there are no profiles: give one or more tile sizes")
    best, top = fastest(profiles) or profiles[0], highest(profiles)
    title = describe(profiles, model, shape)
    body = "\n".join(
        [
            f"<h1>{escape(title)}</h1>",
            f'<p class="headline">{escape(_headline(profiles))}</p>',
            '<div class="top">',
            f'<figure class="wide">{_MEMORY_CAPTION}{draw_memory_chart(profiles)}</figure>',
            f"<figure>{_TIME_CAPTION}{draw_time_chart(profiles)}</figure>",
            _DETAIL,
            "</div>",
            _table(profiles),
            *(_timeline(profile, top) for profile in profiles),
            *map(_plan, profiles),
            _NOTE,
            f'<script type="application/json" id="profiles">{_data(profiles, best.tile)}</script>',
            f"<script>{SCRIPT}</script>",
        ]
    )
    return html_page(f"Memory profile: {title}", STYLE, body, also_allowed="script-src 'unsafe-inline'")


_MEMORY_CAPTION = (
    "<figcaption>Peak memory "
    '<span class="key measured">measured</span> <span class="key projected">projected</span></figcaption>'
)
_TIME_CAPTION = "<figcaption>Time of one update</figcaption>"
_DETAIL = '<aside id="detail" aria-live="polite"><h2></h2><dl></dl><p></p></aside>'
_NOT_RUN = "No update ran to its end with this tile size."
_NOT_READ = "Resident memory cannot be read on this machine."
_TIMELINE_HINT = "Point at a moment to see what ran and what it held."
_PLAN_HINT = "Point at a phase to see what it runs, reads and stores."
_NOTE = (
    '<p class="note">Point at a tile size in a chart or the table to see it; click, or reach it with the '
    "Tab key, to keep it. Memory is what the process held above what it held when the update began. "
    "Recomputation: floating-point operations over those of plain PyTorch on the whole image, for halos and "
    "maps that are computed again. "
    "Moved: bytes read from and written to stores. A barrier is a result that needs a whole map, such as "
    "the statistics of a batch norm: the next phase begins when it is known.</p>"
)


def _headline(profiles: Sequence[TileProfile]) -> str:
    best = fastest(profiles)
    plain = f"Plain PyTorch is projected to need {format_bytes(max(p.plain_bytes for p in profiles))}."
    if best is None or best.seconds is None:
        return f"No tile size fits the budget. {plain}"
    return (
        f"Fastest within memory: tiles of {best.tile} pixels, {format_duration(best.seconds)} per update, "
        f"{_known(best.measured_bytes)} at peak. {plain}"
    )


def _table(profiles: Sequence[TileProfile]) -> str:
    heads = "".join(f'<th scope="col">{column}</th>' for column in COLUMNS)
    rows = "\n".join(map(_row, profiles))
    table = f"<table>\n<thead><tr>{heads}</tr></thead>\n<tbody>\n{rows}\n</tbody>\n</table>"
    return f'<div class="scroll">{table}</div>'


def _row(profile: TileProfile) -> str:
    first, *rest = map(escape, cells(profile))
    columns = "".join(f"<td>{text}</td>" for text in rest)
    refused = "" if profile.refusal is None else ' class="refused"'
    return f'<tr{refused} data-tile="{profile.tile}" tabindex="0"><th scope="row">{first}</th>{columns}</tr>'


def _timeline(profile: TileProfile, top: int) -> str:
    """The section of a tile size's memory over time, ``top`` bytes high."""
    if profile.timeline is None:
        drawn = f'<p class="absent">{_NOT_READ if profile.refusal is None else _NOT_RUN}</p>'
    else:
        chart = draw_timeline(profile, profile.timeline, top)
        drawn = f'<div class="scroll">{chart}</div><p class="info">{_TIMELINE_HINT}</p>'
    keys = _key(phase_color("forward", 0.7), "phases forward") + _key(
        phase_color("backward", 0.7), "backward"
    )
    keys += "".join(_key(color, name) for name, color in OTHERS.items())
    caption = f"<figcaption>Memory over time, tiles of {profile.tile} pixels {keys}</figcaption>"
    return f'<figure class="panel timeline" data-of="{profile.tile}" hidden>{caption}{drawn}</figure>'


def _key(color: str, text: str) -> str:
    return f'<span class="swatch" style="--swatch: {color}">{text}</span> '


def _plan(profile: TileProfile) -> str:
    """The section of a tile size's plan, drawn and in words."""
    drawing = draw_plan(profile.plan).to_svg(f"The plan with tiles of {profile.tile} pixels")
    return (
        f'<figure class="panel plan" data-of="{profile.tile}" hidden>'
        f"<figcaption>The plan, tiles of {profile.tile} pixels: the network from left to right</figcaption>"
        f'<div class="scroll" tabindex="0">{drawing}</div><p class="info">{_PLAN_HINT}</p>'
        f"<details><summary>In words</summary><pre>{escape(profile.explanation)}</pre></details></figure>"
    )


def _data(profiles: Sequence[TileProfile], selected: int) -> str:
    """The script's data as JSON; ``<`` is escaped, as it could end the element."""
    shown = {
        profile.tile: {
            "values": [*zip(COLUMNS[1:], cells(profile)[1:], strict=True)],
            "note": _note(profile),
            "timeline": None if profile.timeline is None else timeline_data(profile.timeline),
        }
        for profile in profiles
    }
    data = {"selected": selected, "hints": [_TIMELINE_HINT, _PLAN_HINT], "tiles": shown}
    return json.dumps(data, separators=(",", ":")).replace("<", "\\u003c")


def _note(profile: TileProfile) -> str:
    if profile.refusal is not None:
        return profile.refusal
    if profile.budget is None or profile.measured_bytes is None:
        return f"Peak read from {profile.reading}."
    return (
        f"{profile.measured_bytes / profile.budget:.0%} of the budget at peak, read from {profile.reading}."
    )


def _verdict(profile: TileProfile) -> str:
    if profile.refusal is not None:
        return "does not fit"
    return "ran" if profile.budget is None else "fits"


def _known(nbytes: int | None) -> str:
    return "-" if nbytes is None else format_bytes(nbytes)
