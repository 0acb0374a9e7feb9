"""The page of a profile: one HTML file that needs nothing else, for a browser without a network."""

from __future__ import annotations

import json
from collections.abc import Sequence
from html import escape

from streamcnn.profiling.chart import draw_chart
from streamcnn.profiling.template import SCRIPT, STYLE
from streamcnn.profiling.tile_profile import TileProfile, fastest
from streamcnn.units import format_bytes, format_duration

COLUMNS = ("tile", "projected", "measured", "time", "recomputation", "moved", "verdict")
"""Headings of the table, here and on the terminal."""

_POLICY = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'"


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
    """The page as HTML; ``#tile=512`` behind its address selects that tile size.

    Parameters
    ----------
    profiles
        One per tile size.
    model, shape
        What was profiled: its name, and the batch ``(N, C, H, W)`` in pixels.

    Raises
    ------
    ValueError
        If there is no profile.
    """
    if not profiles:
        raise ValueError("there are no profiles: give one or more tile sizes")
    best = fastest(profiles) or profiles[0]
    title = escape(describe(profiles, model, shape))
    body = "\n".join(
        [
            f"<h1>{title}</h1>",
            f'<p class="headline">{escape(_headline(profiles))}</p>',
            f'<div class="top"><figure>{_LEGEND}{draw_chart(profiles)}</figure>{_DETAIL}</div>',
            _table(profiles),
            _NOTE,
            *map(_plan, profiles),
            f'<script type="application/json" id="profiles">{_data(profiles, best.tile)}</script>',
            f"<script>{SCRIPT}</script>",
        ]
    )
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>Memory profile: {title}</title>\n<style>{STYLE}</style>\n</head>\n"
        f"<body>\n{body}\n</body>\n</html>\n"
    )


_LEGEND = (
    "<figcaption>Peak memory of one training update "
    '<span class="key measured">measured</span> <span class="key projected">projected</span></figcaption>'
)
_DETAIL = '<aside id="detail" aria-live="polite"><h2></h2><dl></dl><p></p></aside>'
_NOTE = (
    '<p class="note">Point at a tile size, or reach it with the Tab key, in the chart or the table. '
    "Memory is above what the process held when the update began. Recomputation: positions computed by "
    "all tiles over positions of the maps, 1.00x without halos. Moved: bytes read from and written to "
    "stores.</p>"
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
    return f"<table>\n<thead><tr>{heads}</tr></thead>\n<tbody>\n{rows}\n</tbody>\n</table>"


def _row(profile: TileProfile) -> str:
    first, *rest = map(escape, cells(profile))
    columns = "".join(f"<td>{text}</td>" for text in rest)
    refused = "" if profile.refusal is None else ' class="refused"'
    return f'<tr{refused} data-tile="{profile.tile}" tabindex="0"><th scope="row">{first}</th>{columns}</tr>'


def _plan(profile: TileProfile) -> str:
    return (
        f"<details><summary>Plan with tiles of {profile.tile} pixels</summary>"
        f"<pre>{escape(profile.explanation)}</pre></details>"
    )


def _data(profiles: Sequence[TileProfile], selected: int) -> str:
    """What the script shows, as JSON; ``<`` is escaped, which could end the element."""
    shown = {
        profile.tile: {"values": [*zip(COLUMNS[1:], cells(profile)[1:], strict=True)], "note": _note(profile)}
        for profile in profiles
    }
    return json.dumps({"selected": selected, "tiles": shown}).replace("<", "\\u003c")


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
