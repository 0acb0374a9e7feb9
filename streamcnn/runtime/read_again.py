"""The user's data that a backward pass reads again, which must not change after the forward pass."""

from __future__ import annotations

from collections.abc import Collection
from itertools import chain

from torch import Tensor

from streamcnn.data.source_batch import SourceBatch
from streamcnn.runtime.streamed_pass import Pass


def tensors_read_again(run: Pass) -> list[Tensor]:
    """States without a gradient, and images, that the backward pass of ``run`` reads again."""
    read, current = _read_again(run), run.current
    states = [current.states[n] for n in current.program.states if n in read and n not in current.leaf_states]
    images = chain(*(batch.shared_tensors for batch in _batches_of(run, read)))
    # Tensors made in inference mode have no version counter.
    return [*states, *(image for image in images if not image.is_inference())]


def arrays_read_again(run: Pass) -> list[tuple[str, bytes]]:
    """Names and some pixels of the caller's arrays that the backward pass of ``run`` reads again."""
    return list(chain(*(batch.samples() for batch in _batches_of(run, _read_again(run)))))


def _read_again(run: Pass) -> set[str]:
    """Operands of the operators that the backward pass runs again."""
    differentiated = (phase for phase in run.current.plan.phases if phase.differentiated)
    return {
        operand
        for phase in (*differentiated, *chain(*run.current.plan.rematerialised.values()))
        for name in phase.nodes
        for operand in run.current.program.nodes[name].operands
    }


def _batches_of(run: Pass, names: Collection[str]) -> list[SourceBatch]:
    """The images and maps among ``names``."""
    batches: dict[str, SourceBatch] = {run.current.program.image: run.reader}
    batches |= {name: run.maps[key] for name, key in run.current.program.maps.items()}
    return [batch for name, batch in batches.items() if name in names]
