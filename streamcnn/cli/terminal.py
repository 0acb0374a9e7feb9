"""Whether output fits on the terminal."""

from __future__ import annotations

from rich.console import Console, RenderableType

_ANY_WIDTH = 10_000


def fits(shown: RenderableType, console: Console) -> bool:
    """Whether the terminal is wide enough to show ``shown`` without cutting or wrapping it."""
    options = console.options.update(max_width=_ANY_WIDTH)
    return console.measure(shown, options=options).maximum <= console.width
