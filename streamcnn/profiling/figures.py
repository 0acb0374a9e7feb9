"""Figures of a profile: peak memory and seconds against tile size, as PNG files."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from streamcnn.extras import require
from streamcnn.profiling.chart import round_step, upper_edge
from streamcnn.profiling.tile_profile import TileProfile
from streamcnn.units import format_bytes


def memory_figure(profiles: Sequence[TileProfile], title: str) -> Any:
    """Peak memory against tile size with the budget and plain PyTorch's bytes, a matplotlib ``Figure``.

    Raises
    ------
    MissingExtra
        If matplotlib is not installed.
    """
    figure, axes = _new_figure(profiles, title)
    axes.plot(*_points(profiles, "projected_bytes"), "o--", color="#8a94a6", label="projected")
    axes.plot(*_points(profiles, "measured_bytes"), "o-", color="#1f6feb", label="measured")
    top = upper_edge(profiles)
    _draw_limits(axes, profiles, top)
    axes.set_ylim(0, top)
    axes.set_yticks(range(0, top + 1, round_step(top)))
    axes.yaxis.set_major_formatter(lambda nbytes, _: format_bytes(int(nbytes)))
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
    figure, axes = _new_figure(profiles, title)
    axes.plot(*_points(profiles, "seconds"), "o-", color="#1f6feb")
    axes.set_ylim(bottom=0)
    axes.set_ylabel("forward and backward [s]")
    return figure


def write_figures(profiles: Sequence[TileProfile], title: str, folder: Path) -> None:
    """Write ``memory.png`` and ``time.png`` into the folder.

    Raises
    ------
    MissingExtra
        If matplotlib is not installed.
    """
    memory_figure(profiles, title).savefig(folder / "memory.png", dpi=130)
    time_figure(profiles, title).savefig(folder / "time.png", dpi=130)


def _new_figure(profiles: Sequence[TileProfile], title: str) -> tuple[Any, Any]:
    # A Figure of its own rather than pyplot, which keeps figures and looks for a display.
    figure = require("matplotlib.figure", extra="plots").Figure(figsize=(8, 5), layout="constrained")
    axes = figure.add_subplot()
    tiles = sorted({profile.tile for profile in profiles})
    axes.set_xscale("log", base=2)
    axes.set_xticks(tiles, [str(tile) for tile in tiles])
    axes.set_xticks([], minor=True)
    axes.set_xlabel("largest edge of a tile [pixels]")
    axes.set_title(title, fontsize="medium")
    axes.grid(alpha=0.25)
    return figure, axes


def _points(profiles: Sequence[TileProfile], field: str) -> tuple[list[int], list[float]]:
    """Tile sizes and the values of a field, in order, without what was not measured."""
    known = sorted((p.tile, getattr(p, field)) for p in profiles if getattr(p, field) is not None)
    return [tile for tile, _ in known], [value for _, value in known]


def _draw_limits(axes: Any, profiles: Sequence[TileProfile], top: int) -> None:
    budget, plain = profiles[0].budget, max(profile.plain_bytes for profile in profiles)
    if budget is not None:
        axes.axhline(budget, color="#c62828", label=f"budget {format_bytes(budget)}")
    label = f"plain PyTorch {format_bytes(plain)} (projected)"
    if plain <= top:
        axes.axhline(plain, color="#7b3fb5", linestyle=":", label=label)
    else:
        axes.plot([], [], color="#7b3fb5", linestyle=":", label=f"{label}, off the scale")
