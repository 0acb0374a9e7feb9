"""Figures of a profile as PNG files: memory and seconds against tile size, memory over time, the plan."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from streamcnn.profiling.plan_drawing import draw_plan
from streamcnn.profiling.scales import bytes_ticks, upper_edge
from streamcnn.profiling.shapes import Arc, Box, Drawing, Label, Lines, Shape
from streamcnn.profiling.tile_profile import TileProfile, fastest
from streamcnn.profiling.timeline import BETWEEN, GLOBAL_VALUES, TAIL, Timeline
from streamcnn.profiling.timeline_chart import (
    OTHERS,
    areas,
    directions,
    highest,
    limits,
    peak_label,
    phase_color,
)
from streamcnn.support.extras import require
from streamcnn.support.units import format_bytes

FIGURES = ("memory.png", "time.png", "memory_over_time.png", "plan.png")

_COLORS = {"measured": "#1f6feb", "projected": "#8a94a6", "budget": "#c62828", "plain": "#7b3fb5"}
_PIXELS_PER_INCH = 96
"""Resolution for a drawing's pixels."""
_COLUMNS_PER_ROW = 20
"""A plan with more columns is folded, as a picture does not scroll."""


def memory_figure(profiles: Sequence[TileProfile], title: str) -> Any:
    """Peak memory against tile size with the budget and plain PyTorch's bytes, a matplotlib ``Figure``.

    Raises
    ------
    MissingExtra
        If matplotlib is not installed.
    """
    figure, axes = _against_tile_size(profiles, title)
    axes.plot(*_points(profiles, "projected_bytes"), "o--", color=_COLORS["projected"], label="projected")
    axes.plot(*_points(profiles, "measured_bytes"), "o-", color=_COLORS["measured"], label="measured")
    top = upper_edge(profiles)
    _draw_limits(axes, profiles, top)
    _mark_beyond(axes, profiles, top)
    _bytes_axis(axes, top)
    axes.set_ylabel("peak memory above the baseline")
    axes.legend()
    return figure


def time_figure(profiles: Sequence[TileProfile], title: str) -> Any:
    """Seconds of forward and backward against tile size, a matplotlib ``Figure``.

    Raises
    ------
    MissingExtra
        If matplotlib is not installed.
    """
    figure, axes = _against_tile_size(profiles, title)
    axes.plot(*_points(profiles, "seconds"), "o-", color=_COLORS["measured"])
    axes.set_ylim(0, 1.08 * axes.get_ylim()[1])
    axes.set_ylabel("forward and backward [s]")
    for profile in profiles:
        if profile.seconds is None:
            axes.annotate("not run", (profile.tile, 0), (0, 4), textcoords="offset points", ha="center")
    return figure


def timeline_figure(profiles: Sequence[TileProfile], title: str) -> Any:
    """Memory over time, one below the other for each tile size that ran, a matplotlib ``Figure``.

    Raises
    ------
    MissingExtra
        If matplotlib is not installed.
    """
    ran = [(p, p.timeline) for p in sorted(profiles, key=lambda p: p.tile) if p.timeline is not None]
    rows = max(1, len(ran))
    figure = _new_figure((10, 0.8 + 2.5 * rows))
    figure.suptitle(title, fontsize="medium")
    panels = figure.subplots(rows, 1, squeeze=False)[:, 0]
    for axes, (profile, timeline) in zip(panels, ran, strict=False):
        _draw_timeline(axes, profile, timeline, highest(profiles))
    if ran:
        _timeline_key(figure)
    else:
        panels[0].set_axis_off()
        panels[0].text(0.5, 0.5, "no update ran to its end, or its memory cannot be read", ha="center")
    return figure


def plan_figure(profiles: Sequence[TileProfile], title: str) -> Any:
    """The plan of the fastest tile size, or of the first if none ran, a matplotlib ``Figure``.

    Raises
    ------
    MissingExtra
        If matplotlib is not installed.
    """
    profile = fastest(profiles) or profiles[0]
    drawing = draw_plan(profile.plan, _COLUMNS_PER_ROW)
    head, margin = 34, 8
    figure = _new_figure((1, 1), layout="none")
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set_axis_off()
    text = axes.text(
        0,
        -12,
        f"{title}, tiles of {profile.tile} pixels",
        fontsize=_points_of(14),
        weight="bold",
        parse_math=False,
    )
    # A plan of few phases is narrower than the text above it.
    written = text.get_window_extent().width * _PIXELS_PER_INCH / figure.dpi
    right, height = max(drawing.width, written) + margin, drawing.height + head
    figure.set_size_inches((right + margin) / _PIXELS_PER_INCH, height / _PIXELS_PER_INCH)
    axes.set_xlim(-margin, right)
    axes.set_ylim(drawing.height, -head)
    _paint(axes, drawing)
    return figure


def write_figures(profiles: Sequence[TileProfile], title: str, folder: Path) -> None:
    """Write ``FIGURES`` into the folder.

    Raises
    ------
    MissingExtra
        If matplotlib is not installed.
    """
    for name, draw in zip(FIGURES, (memory_figure, time_figure, timeline_figure, plan_figure), strict=True):
        draw(profiles, title).savefig(folder / name, dpi=130)


def _new_figure(size: tuple[float, float], layout: str = "constrained") -> Any:
    # A Figure of its own rather than pyplot, which keeps figures and looks for a display.
    return require("matplotlib.figure", extra="plots").Figure(figsize=size, layout=layout)


def _against_tile_size(profiles: Sequence[TileProfile], title: str) -> tuple[Any, Any]:
    figure = _new_figure((8, 5))
    axes = figure.add_subplot()
    tiles = sorted({profile.tile for profile in profiles})
    axes.set_xscale("log", base=2)
    axes.set_xlim(tiles[0] / 1.2, tiles[-1] * 1.2)
    axes.set_xticks(tiles, [str(tile) for tile in tiles])
    axes.set_xticks([], minor=True)
    axes.set_xlabel("largest edge of a tile [pixels]")
    axes.set_title(title, fontsize="medium", parse_math=False)
    axes.grid(alpha=0.25)
    return figure, axes


def _bytes_axis(axes: Any, top: int) -> None:
    axes.set_ylim(0, top)
    axes.set_yticks(*zip(*bytes_ticks(top), strict=True))


def _points(profiles: Sequence[TileProfile], field: str) -> tuple[list[int], list[float]]:
    """Tile sizes and the values of a field, in order, without those not measured."""
    known = sorted((p.tile, getattr(p, field)) for p in profiles if getattr(p, field) is not None)
    return [tile for tile, _ in known], [value for _, value in known]


def _draw_limits(axes: Any, profiles: Sequence[TileProfile], top: int) -> None:
    budget, plain = profiles[0].budget, max(profile.plain_bytes for profile in profiles)
    if budget is not None:
        axes.axhline(budget, color=_COLORS["budget"], label=f"budget {format_bytes(budget)}")
    label = f"plain PyTorch {format_bytes(plain)} (projected)"
    if plain <= top:
        axes.axhline(plain, color=_COLORS["plain"], linestyle=":", label=label)
    else:
        axes.plot([], [], color=_COLORS["plain"], linestyle=":", label=f"{label}, off the scale")


def _mark_beyond(axes: Any, profiles: Sequence[TileProfile], top: int) -> None:
    """Arrow heads at the top edge with the projected bytes of tile sizes that are off the scale."""
    for tile, nbytes in zip(*_points(profiles, "projected_bytes"), strict=True):
        if nbytes > top:
            axes.plot([tile], [top], "^", color=_COLORS["projected"], clip_on=False)
            axes.annotate(
                format_bytes(int(nbytes)), (tile, top), (0, -14), textcoords="offset points", ha="center"
            )


def _draw_timeline(axes: Any, profile: TileProfile, timeline: Timeline, top: int) -> None:
    """Draw one panel: the spans as areas, the limits as lines, the peak with a label."""
    for color, edge in areas(timeline):
        axes.fill_between(*zip(*edge, strict=True), color=color, linewidth=0.3)
    for name, words, nbytes in limits(profile):
        style, right, shift = ("-", 1, 3) if name == "budget" else ("--", 0, -10)
        axes.axhline(min(nbytes, top), color=_COLORS[name], linestyle=style, linewidth=1.4)
        axes.annotate(
            words if nbytes <= top else f"{words} (off the scale)",
            (right, min(nbytes, top)),
            (-4 if right else 4, shift),
            xycoords=("axes fraction", "data"),
            textcoords="offset points",
            ha="right" if right else "left",
            fontsize="small",
            color=_COLORS[name],
        )
    peak, end = timeline.peak, timeline.end
    moment = timeline.seconds[peak]
    axes.plot([moment], [timeline.nbytes[peak]], "o", mfc="none", mec="black", markersize=6)
    axes.annotate(
        peak_label(timeline),
        (moment, timeline.nbytes[peak]),
        (8 if moment < end / 2 else -8, 5),
        textcoords="offset points",
        ha="left" if moment < end / 2 else "right",
        fontsize="small",
    )
    axes.set_xlim(0, end or 1.0)
    _bytes_axis(axes, top)
    for name, start, stop in directions(timeline):
        axes.plot([start, stop], [0, 0], color=phase_color(name, 0.7), linewidth=6, solid_capstyle="butt")
    axes.set_title(f"tiles of {profile.tile} pixels", fontsize="small", loc="left")
    axes.set_xlabel("seconds", fontsize="small")


def _timeline_key(figure: Any) -> None:
    patches = require("matplotlib.patches", extra="plots")
    named = {f"phases, {name}": phase_color(name, 0.7) for name in ("forward", "backward")}
    named.update({name: OTHERS[name] for name in (GLOBAL_VALUES, TAIL, BETWEEN)})
    handles = [patches.Patch(color=color, label=name) for name, color in named.items()]
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles), fontsize="small")


def _paint(axes: Any, drawing: Drawing) -> None:
    for group in drawing.groups:
        for shape in group.shapes:
            _paint_shape(axes, shape)


def _paint_shape(axes: Any, shape: Shape) -> None:
    patches, paths = (require(f"matplotlib.{name}", extra="plots") for name in ("patches", "path"))
    match shape:
        case Box():
            corner = (shape.x, shape.y)
            axes.add_patch(
                patches.Rectangle(
                    corner, shape.width, shape.height, fc=shape.fill, ec=shape.stroke, lw=_points_of(1)
                )
            )
        case Lines():
            collections = require("matplotlib.collections", extra="plots")
            width = _points_of(shape.width)
            axes.add_collection(collections.LineCollection(shape.strokes, color=shape.color, lw=width))
        case Arc():
            codes = [paths.Path.MOVETO, *[paths.Path.CURVE4] * 3]
            curve = paths.Path(shape.handles(), codes)
            axes.add_patch(patches.PathPatch(curve, fc="none", ec=shape.color, lw=_points_of(1.3)))
            axes.add_patch(patches.Polygon(shape.head(), fc=shape.color, ec="none"))
        case Label():
            axes.text(
                shape.x,
                shape.y,
                shape.text,
                color=shape.color,
                fontsize=_points_of(shape.size),
                weight="bold" if shape.bold else "normal",
                ha="center" if shape.centred else "left",
            )


def _points_of(pixels: float) -> float:
    """``pixels`` in points, of which an inch has 72."""
    return pixels * 72 / _PIXELS_PER_INCH
