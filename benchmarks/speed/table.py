"""A result as tables for a terminal."""

from __future__ import annotations

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from benchmarks.speed.results import Result, Row
from streamcnn.support.text import as_text
from streamcnn.support.units import format_bytes, format_count, format_duration

_PASSES = ("", "median", "range, s", "ratio", "user, s", "kernel, s", "faults", "memory", "ratio", "own")
"""Ratios are to plain PyTorch's. ``own`` is what streamcnn measured; on a card, all that the process held
there."""
_PLANS = (
    "",
    "first pass",
    "projected",
    "and bytes",
    "tiles",
    "phases",
    "recomputed",
    "retries",
    "on disk",
    "plan",
)
_NOTHING = "-"


def tables(result: Result) -> RenderableType:
    """What each kind took, how streamed ones were planned, and why others made no passes."""
    parts: list[RenderableType] = [Text(f"{result.case}, {result.device}", style="bold"), _passes(result)]
    if any(row.plan for row in result.rows):
        parts.append(_plans(result))
    if any(row.rests for row in result.rows):
        parts.append(Text("* gave its memory back between passes; one that is not counted filled it again"))
    parts += [as_text(f"{row.label}: {row.reason}") for row in result.rows if row.reason]
    return Group(*parts)


def _passes(result: Result) -> Table:
    """Seconds and memory, with their ratios to plain PyTorch's."""
    table = _table(_PASSES)
    for row in result.rows:
        if not row.is_finished:
            table.add_row(row.label, row.outcome)
            continue
        seconds = row.values("seconds")
        table.add_row(
            row.label + (" *" if row.rests else ""),
            format_duration(result.seconds(row)),
            f"{min(seconds):.3g} to {max(seconds):.3g}",
            _ratio(result.seconds_ratio(row)),
            f"{row.median('user_seconds'):.3g}",
            f"{row.median('kernel_seconds'):.3g}",
            format_count(row.median("minor_faults")),
            _bytes(result.memory(row)),
            _ratio(result.memory_ratio(row)),
            _bytes(row.most("measured_bytes")),
        )
    return table


def _plans(result: Result) -> Table:
    """The streamed kinds: what was projected, and what the plans do."""
    table = _table(_PLANS)
    for row in result.rows:
        if row.plan is not None and row.is_finished:
            table.add_row(row.label, *_plan(row, row.plan))
    return table


def _plan(row: Row, plan: dict[str, object]) -> list[str]:
    assert row.first_seconds is not None
    assert isinstance(plan["stored_bytes"], dict)
    assert isinstance(plan["projected_seconds"], float)
    assert isinstance(plan["projected_bytes"], int)
    return [
        format_duration(row.first_seconds),
        format_duration(plan["projected_seconds"]),
        format_bytes(plan["projected_bytes"]),
        *(str(plan[name]) for name in ("tiles", "phases", "recomputation")),
        str(row.most("retries")),
        format_bytes(plan["stored_bytes"]["disk"]),
        str(plan["digest"]),
    ]


def _table(columns: tuple[str, ...]) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0))
    for index, column in enumerate(columns):
        table.add_column(column, justify="right" if index else "left", no_wrap=True)
    return table


def _ratio(ratio: float | None) -> str:
    return _NOTHING if ratio is None else f"{ratio:.2f}"


def _bytes(nbytes: int | None) -> str:
    return _NOTHING if nbytes is None else format_bytes(nbytes)
