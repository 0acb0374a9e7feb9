"""Plans in words: a pure function from frozen data to text."""

from __future__ import annotations

from typing import TYPE_CHECKING

from streamcnn.plan.storage import StorePlan, Tier
from streamcnn.support.units import format_bytes, format_duration, plural

if TYPE_CHECKING:
    from streamcnn.plan.plan import Phase, Plan

_PLACES = {Tier.MEMORY: "in memory", Tier.HOST: "in host RAM", Tier.DISK: "on disk"}


def explain_plan(plan: Plan) -> str:
    """The plan as text: what it takes, why, and one line per phase."""
    shape = "x".join(map(str, plan.image_shape))
    budget = "no ceiling" if plan.budget is None else f"budget {format_bytes(plan.budget)}"
    lines = [
        f"image {shape} {plan.dtype}, {'training' if plan.training else 'inference'}, {budget}",
        *([f"instead of a larger budget, since {plan.limited_by}"] if plan.limited_by else []),
        _verdict(plan),
        f"projected peak {format_bytes(plan.projected_bytes)}, in {plan.worst}, at {plan.worst_operator}",
        *_terms(plan),
        *_reading(plan),
        _time(plan),
        f"plain PyTorch would need {format_bytes(plan.plain_bytes)}",
        f"{plural(len(plan.phases), 'phase')}, {_stored(plan)}",
        *_phases(plan),
        *_runs(plan),
        *_on_whole_maps(plan),
    ]
    return "\n".join(lines)


def _verdict(plan: Plan) -> str:
    """The plan in one line: whether it fits, with which tiles, and what it keeps away from the device."""
    height, width = plan.tile
    if plan.budget is None:
        fits = "runs"
    elif plan.fits:
        fits = f"fits in {format_bytes(plan.budget)}"
    else:
        beyond = format_bytes(plan.projected_bytes - plan.budget)
        return (
            f"does not fit: the smallest plan needs {beyond} more, in {plan.worst}, at {plan.worst_operator}"
        )
    away = [
        f"{format_bytes(plan.bytes_on(tier))} of checkpoints and their gradients {_PLACES[tier]}"
        for tier in (Tier.HOST, Tier.DISK)
        if plan.bytes_on(tier)
    ]
    return ", ".join([f"{fits} with tiles of {height}x{width} pixels", *(f"up to {each}" for each in away)])


def _terms(plan: Plan) -> list[str]:
    """The terms of the projected peak that are not zero."""
    terms = [term for term in plan.terms if term.nbytes]
    width = max([36, *(len(term.name) + 1 for term in terms)])
    return [f"  {term.name:<{width}}{format_bytes(term.nbytes):>12}" for term in terms]


def _reading(plan: Plan) -> list[str]:
    """The line on memory for reading the image, if reading takes any."""
    held, read = plan.image_held_bytes, plan.image_read_bytes
    parts = [f"holds {format_bytes(held)}"] if held else []
    if read:
        parts.append(f"takes up to {format_bytes(read)}{' more' if held else ''} for a region")
    return [f"reading the image {' and '.join(parts)}"] if parts else []


def _time(plan: Plan) -> str:
    ratio = plan.projected_seconds / plan.plain_seconds if plan.plain_seconds else 1.0
    return (
        f"projected time {format_duration(plan.projected_seconds)}, {ratio:.2f} of the whole image at once; "
        f"arithmetic {plan.recomputation:.2f} of it"
    )


def _stored(plan: Plan) -> str:
    parts = []
    for tier, place in _PLACES.items():
        maps = [store.nbytes for store in plan.stores.values() if store.tier is tier]
        if maps:
            parts.append(f"{plural(len(maps), 'stored map')} {place} ({format_bytes(sum(maps))})")
    return ", ".join(parts) or "no stored maps"


def _phases(plan: Plan) -> list[str]:
    """A table: level, tiles, their extents in input pixels, halo, what is stored where, barriers."""
    rows = [_phase_row(plan, phase) for phase in plan.phases]
    if not rows:
        return []
    head = ("phase", "tiles", "pixels", "halo", "reduces", "stores")
    widths = [max(len(row[i]) for row in (head, *rows)) for i in range(len(head))]
    return [
        "  " + "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in (head, *rows)
    ]


def _phase_row(plan: Plan, phase: Phase) -> tuple[str, ...]:
    num_rows, num_cols = len(phase.rows), len(phase.cols)
    height, width = plan.image_shape[2:]
    stored = (
        f"{name} ({format_bytes(plan.stores[name].nbytes)} {_place(plan.stores[name])})"
        for name in phase.stored
    )
    return (
        str(phase.level),
        f"{num_rows}x{num_cols}",
        f"{-(-height // num_rows)}x{-(-width // num_cols)}",
        f"{phase.halo[0]}x{phase.halo[1]}",
        str(len(phase.reductions)),
        ", ".join(stored) or "nothing",
    )


def _place(store: StorePlan) -> str:
    dropped = "" if store.rematerialised is None else ", dropped"
    return f"{_PLACES[store.tier]}{dropped}"


def _runs(plan: Plan) -> list[str]:
    """Lines on the runs that move tiles while they compute others, and on rematerialised maps."""
    again = [phase for phases in plan.rematerialised.values() for phase in phases]
    lines = []
    if plan.overlapped:
        runs = sum(1 + phase.differentiated for phase in plan.phases) + len(again)
        beside = f"{len(plan.overlapped)} of {plural(runs, 'run')} of a phase"
        lines.append(f"{beside} move tiles while others are computed")
    if again:
        dropped = sum(plan.stores[name].nbytes for phase in again for name in phase.stored)
        lines.append(
            f"dropped between the passes and computed again: {format_bytes(dropped)}, in "
            f"{plural(len(again), 'phase')}"
        )
    return lines


def _on_whole_maps(plan: Plan) -> list[str]:
    """Lines on the resident tail, and on why other operators are resident."""
    lines = []
    if plan.num_resident:
        lines.append(f"then {plural(plan.num_resident, 'operator')} on whole maps (the resident tail)")
    return [*lines, *(f"resident: {reason}" for reason in dict.fromkeys(plan.residents))]
