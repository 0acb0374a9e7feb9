"""The ways to compute a pass: plain PyTorch in several settings, and streamcnn under a budget."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from benchmarks.speed.cases import Case

KEPT_HEAP = {
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TRIM_THRESHOLD_": str(2**36),
    "MALLOC_TOP_PAD_": str(2**26),
}
"""Environment in which glibc keeps every freed block for reuse.

By itself it gives large ones back to the kernel, which clears each page anew when it is next touched. On a
virtual machine that may be half of plain PyTorch's time, and not the same half every day."""


@dataclass(frozen=True, slots=True)
class Kind:
    """One way to compute a pass."""

    name: str
    label: str
    """For tables and figures."""
    is_streamed: bool = False
    budget: str | None = None
    """Of a streamed pass; filled in for each case."""
    keeps_heap: bool = False
    channels_last: bool = False
    checkpoints: bool = False
    """Keep each residual block's input alone and compute the block again in the backward pass."""
    activation_budget: float | None = None
    """``torch.compile``, keeping this part of the activations that it would keep by itself."""
    compiles_parts: bool = False
    """A streamed pass with ``compile=True``."""

    @property
    def serves_inference(self) -> bool:
        """Whether it is a way of its own where there is no backward pass."""
        return not self.checkpoints and self.activation_budget in (None, 1.0)


KINDS = {
    kind.name: kind
    for kind in (
        Kind("plain-kept", "plain, heap kept", keeps_heap=True),
        Kind("plain", "plain, as it comes"),
        Kind("plain-last", "plain, channels_last", keeps_heap=True, channels_last=True),
        Kind("checkpoint-kept", "checkpoint per block, heap kept", checkpoints=True, keeps_heap=True),
        Kind("checkpoint", "checkpoint per block", checkpoints=True),
        Kind(
            "checkpoint-last",
            "checkpoint per block, channels_last",
            checkpoints=True,
            keeps_heap=True,
            channels_last=True,
        ),
        Kind("compiled", "compiled", keeps_heap=True, channels_last=True, activation_budget=1.0),
        Kind(
            "compiled-half",
            "compiled, half the activations",
            keeps_heap=True,
            channels_last=True,
            activation_budget=0.5,
        ),
        Kind("streamed", "streamcnn", is_streamed=True),
        Kind("streamed-last", "streamcnn, channels_last", is_streamed=True, channels_last=True),
        Kind(
            "streamed-compiled",
            "streamcnn, compiled",
            is_streamed=True,
            channels_last=True,
            compiles_parts=True,
        ),
    )
}
DEFAULT_KINDS = {
    "cpu": ("plain-kept", "plain", "checkpoint-kept", "checkpoint", "streamed"),
    "cuda": (
        "plain-last",
        "plain",
        "checkpoint-last",
        "compiled",
        "compiled-half",
        "streamed-last",
        "streamed-compiled",
    ),
}


def kinds_of(case: Case, names: Sequence[str]) -> list[Kind]:
    """The kinds of those names that make sense for a case, a streamed one once for each budget."""
    chosen = [KINDS[name] for name in names if KINDS[name].serves_inference or not case.inference]
    return [
        replace(kind, budget=budget, label=kind.label if budget is None else f"{kind.label}, {budget}")
        for kind in chosen
        for budget in (case.budgets if kind.is_streamed else (None,))
    ]
