"""Plans and reports in words: pure functions from frozen data to text."""

from __future__ import annotations

from streamcnn.plan import Home, Phase, Plan
from streamcnn.units import format_bytes, plural


def explain_plan(plan: Plan) -> str:
    """The plan as text: what it takes, why, and one line per phase."""
    shape = "x".join(map(str, plan.image_shape))
    budget = "no ceiling" if plan.budget is None else f"budget {format_bytes(plan.budget)}"
    verdict = "fits" if plan.fits else "DOES NOT FIT"
    terms = [term for term in plan.terms if term.nbytes]
    width = max([36, *(len(term.name) + 1 for term in terms)])
    lines = [
        f"image {shape} {plan.dtype}, {'training' if plan.training else 'inference'}, {budget}",
        f"projected peak {format_bytes(plan.projected_bytes)} ({verdict}), in {plan.worst}",
        f"plain PyTorch would need {format_bytes(plan.plain_bytes)}",
        *(f"  {term.name:<{width}}{format_bytes(term.nbytes):>12}" for term in terms),
        f"tile {plan.tile[0]}x{plan.tile[1]} pixels, {plural(len(plan.phases), 'phase')}, {_stored(plan)}",
        *(_phase_line(plan, phase) for phase in plan.phases),
    ]
    if plan.num_resident:
        lines.append(f"then {plural(plan.num_resident, 'operator')} on whole maps (the resident tail)")
    lines.extend(f"resident: {reason}" for reason in dict.fromkeys(plan.residents))
    return "\n".join(lines)


def _stored(plan: Plan) -> str:
    parts = []
    for home in Home:
        maps = [store.nbytes for store in plan.stores.values() if store.home is home]
        if maps:
            place = {"memory": "in memory", "host": "in host RAM", "disk": "on disk"}[home.value]
            parts.append(f"{plural(len(maps), 'stored map')} {place} ({format_bytes(sum(maps))})")
    return ", ".join(parts) or "no stored maps"


def _phase_line(plan: Plan, phase: Phase) -> str:
    stored = ", ".join(phase.stored) or "nothing"
    marks = f"{len(phase.rows)}x{len(phase.cols)} tiles, halo {phase.halo[0]}x{phase.halo[1]}"
    return f"  phase {phase.level:<4} {marks:<32} stores {stored}; reduces {len(phase.reductions)}"
